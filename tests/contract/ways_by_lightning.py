"""Ways in through Lightning's Trainer, and through Fabric."""

import warnings
from functools import partial

from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule
from lightning_runs import trainer
from tiny_model import TinyModel, batches, sgd, weights
from torch.utils.data import DataLoader
from trained import Trained

import gradclip
from gradclip.integrations.lightning import GradientClippingCallback


class Automatic(TinyModel, LightningModule):
    def training_step(self, batch):
        return self(**batch)

    def configure_optimizers(self):
        return sgd(self)


class Manual(Automatic):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self(**batch))
        optimizer.step()


class Note(Callback):
    """Keeps the weights after each step, and assigns the next policy."""

    def __init__(self, assign):
        self.after, self._assign = [], assign

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.after.append(weights(pl_module))
        self._assign(self.after)


def automatic(feature, gradients, folder, module=Automatic):
    path = folder / "run.ckpt"
    resumed = path.exists()
    clipping = GradientClippingCallback(**feature.clip)
    note = Note(partial(feature.assign, clipping))
    made = trainer(
        clipping,
        note,
        max_epochs=2 if resumed else 1,  # each run is an epoch
        log_every_n_steps=len(gradients),
    )
    with warnings.catch_warnings():
        # What Lightning says of small trainings, and what torch says of Lightning.
        warnings.filterwarnings("ignore", ".*does not have many workers")
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        loader = DataLoader(batches(gradients), batch_size=None)
        made.fit(module(), loader, ckpt_path=path if resumed else None)
    made.save_checkpoint(path)
    logged = {name: float(value) for name, value in made.logged_metrics.items()}
    return Trained(note.after, clipping.stats, logged)


def manual(feature, gradients, folder):
    return automatic(feature, gradients, folder, Manual)


def fabric(feature, gradients, folder):
    fabric = Fabric(accelerator="cpu", devices=1)
    module = TinyModel()
    model, optimizer = fabric.setup(module, sgd(module))
    handle = gradclip.attach(optimizer, **feature.clip)
    clipper = handle.clipper
    path = folder / "run.ckpt"
    if path.exists():
        saved = fabric.load(path, {"model": model, "optimizer": optimizer})
        clipper.load_state_dict(saved["clipper"])
    after = []
    for batch in batches(gradients):
        fabric.backward(model(**batch))
        optimizer.step()
        optimizer.zero_grad()
        after.append(weights(module))
        feature.assign(handle, after)
    state = {"model": model, "optimizer": optimizer, "clipper": clipper.state_dict()}
    fabric.save(path, state)
    return Trained(after, handle.stats)
