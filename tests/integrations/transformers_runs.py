"""Small real runs of transformers.Trainer on the CPU, for the tests of the callback."""

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from gradclip.integrations.transformers import ClippingTrainerMixin

STEPS, BATCH = 8, 4
LIMIT = 0.5


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)

    def forward(self, inputs, targets):
        outputs = self.down(torch.tanh(self.norm(self.up(inputs))))
        return {"loss": nn.functional.mse_loss(outputs, targets), "logits": outputs}


class ClippedTrainer(ClippingTrainerMixin, Trainer):
    pass


TRAINERS = [Trainer, ClippedTrainer]


def dataset(steps=STEPS, window=1):
    inputs = torch.randn(steps * window * BATCH, 8, generator=torch.Generator().manual_seed(11))
    return [{"inputs": row, "targets": row.sum(0, keepdim=True) * 3} for row in inputs]


def arguments(folder, **options):
    known = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "learning_rate": 0.05,
        "max_grad_norm": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "label_names": ["targets"],
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**known, **options})


def trained(folder, callback, trainer=Trainer, *, optimizers=(None, None), others=(), **options):
    """Train a model; return the trainer."""
    model = Model()
    made = trainer(
        model,
        arguments(folder, **options),
        train_dataset=dataset(),
        callbacks=[*others, callback] if callback else [*others],
        optimizers=optimizers,
    )
    made.train()
    return made


def poisoned(trainer, step, value):
    """Return a trainer that sets one element of one gradient before the clip of one step."""

    class Poisoned(trainer):
        def training_step(self, model, *args, **options):
            loss = super().training_step(model, *args, **options)
            if self.state.global_step == step:
                self.model.down.weight.grad[0, 3] = value
            return loss

    return Poisoned


class Keep(TrainerCallback):
    """Keeps what each step left: the result, the weights, the optimizer's state, the rate."""

    def __init__(self, clipping=None):
        self.clipping = clipping
        self.results, self.weights, self.moments, self.rates, self.gradients = [], [], [], [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.gradients.append(
            {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        )

    def on_step_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **_):
        if self.clipping is not None:
            self.results.append(self.clipping.last)
        self.weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
        moments = optimizer.state_dict().get("state", {})  # DeepSpeed's has another form
        self.moments.append({k: {n: t.clone() for n, t in m.items()} for k, m in moments.items()})
        self.rates.append(lr_scheduler.get_last_lr()[0])


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
