"""Ways in through the trainer of transformers."""

from functools import partial

from tiny_model import TinyModel, batches, sgd, weights
from trained import Trained
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers_runs import ClippedTrainer

from gradclip.integrations.transformers import GradientClippingCallback


class Note(TrainerCallback):
    """Keeps the weights after each step, and the last log: as a logger, it comes first.

    Args:
        assign: Assigns the next policy.
    """

    def __init__(self, assign):
        self.after, self.logged, self._assign = [], {}, assign

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.logged = dict(logs)

    def on_step_end(self, args, state, control, model=None, **_):
        self.after.append(weights(model))
        self._assign(self.after)


class TinyModelOfTrainer(TinyModel):
    def forward(self, body, head):
        return {"loss": super().forward(body, head)}


def options(gradients, folder):
    """Return the checkpoint to go on from, and the trainer's arguments for these steps."""
    checkpoint = get_last_checkpoint(folder)
    done = int(checkpoint.rpartition("-")[2]) if checkpoint else 0
    return checkpoint, {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "per_device_train_batch_size": 1,
        "train_sampling_strategy": "sequential",
        "max_steps": done + len(gradients),
        "max_grad_norm": 0,
        "lr_scheduler_type": "constant",
        "save_steps": len(gradients),
        "logging_steps": len(gradients),
    }


def callback(feature, gradients, folder, trainer=Trainer):
    checkpoint, common = options(gradients, folder)
    model, clipping = TinyModelOfTrainer(), GradientClippingCallback(**feature.clip)
    note = Note(partial(feature.assign, clipping))
    trainer(
        model,
        TrainingArguments(str(folder), **common),
        train_dataset=batches(gradients),
        callbacks=[note, clipping],
        optimizers=(sgd(model), None),
    ).train(resume_from_checkpoint=checkpoint)
    return Trained(note.after, clipping.stats, note.logged)


def callback_with_mixin(feature, gradients, folder):
    return callback(feature, gradients, folder, ClippedTrainer)
