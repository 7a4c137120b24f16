"""One sample of the data has a NaN, at step 3: what becomes of the training?

    python benchmarks/nan_at_step_3.py

It needs transformers. A small policy is trained twice by ``transformers.Trainer``, for 20 steps:
with the Trainer's own clipping, and with gradclip's callback. Prints what the Trainer logged, and
writes ``docs/images/nan-at-step-3.svg``.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from gradclip.integrations.transformers import GradientClippingCallback

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "nan-at-step-3.svg"
STEPS, BATCH, FAULTY = 20, 16, 3
CLIPPED, BROKEN, INK = "#0072b2", "#b34e00", "#333333"


class Readings(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """Sensor readings, and the actions to take. One reading of step 3 is missing: it is NaN."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for number in range(STEPS * BATCH):
            readings = torch.randn(8, generator=generator)
            actions = torch.stack([readings[:4].prod().sin(), readings[4:].sum()])
            if number == (FAULTY - 1) * BATCH:
                readings[0] = torch.nan
            yield {"readings": readings, "actions": actions}


class Policy(nn.Module):
    """Two linear layers that say what to do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, readings: Tensor, actions: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(self.layers(readings), actions)}


def train(callbacks: list[GradientClippingCallback]) -> tuple[list[float], bool]:
    """Train the policy, and return the losses that the Trainer logged, and whether it is finite."""
    torch.manual_seed(0)
    model = Policy()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=STEPS,
            logging_steps=1,
            max_grad_norm=0 if callbacks else 1.0,
            learning_rate=1e-2,
            per_device_train_batch_size=BATCH,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = Trainer(model, arguments, train_dataset=Readings(), callbacks=callbacks)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, all(bool(weight.isfinite().all()) for weight in model.parameters())


def draw(broken: list[float], kept: list[float]) -> None:
    style = {"font.size": 9, "font.family": "DejaVu Sans", "svg.hashsalt": "gradclip"}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "text.color": INK}
    steps = range(1, STEPS + 1)
    mpl.use("svg")
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(7.2, 3.0), layout="constrained")
        figure.suptitle("A NaN in one sample, at step 3", x=0.01, ha="left", fontweight="bold")
        axes.plot(steps, broken, color=BROKEN, linewidth=1.6, marker="o", markersize=3)
        made = [(step, loss) for step, loss in zip(steps, kept, strict=True) if step != FAULTY]
        axes.plot(*zip(*made, strict=True), color=CLIPPED, linewidth=1.6, marker="o", markersize=3)
        axes.plot(FAULTY, kept[FAULTY - 2], color=CLIPPED, marker="x", markersize=6)
        axes.text(
            STEPS,
            -0.12,
            "max_grad_norm=1.0: every weight is NaN from step 3 on, and the loss in the log is 0",
            color=BROKEN,
            ha="right",
            va="top",
        )
        axes.text(
            6,
            2.3,
            "GradientClippingCallback(1.0): step 3 (x) is not made,\nand the training goes on",
            color=CLIPPED,
            va="top",
        )
        axes.set_xlabel("step", color=INK)
        axes.set_ylabel("loss that the Trainer logs", color=INK)
        axes.set_xticks([1, 3, 5, 10, 15, 20])
        axes.set_ylim(bottom=-0.4)
        axes.set_yticks([0, 0.5, 1, 1.5, 2])
        figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    (broken, broken_is_finite), (kept, kept_is_finite) = (
        train([]),
        train([GradientClippingCallback(1.0)]),
    )
    print(
        f"max_grad_norm=1.0              loss {broken[-1]:.2f}, weights finite: {broken_is_finite}"
    )
    print(f"GradientClippingCallback(1.0)  loss {kept[-1]:.2f}, weights finite: {kept_is_finite}")
    draw(broken, kept)
    print(PICTURE)


if __name__ == "__main__":
    main()
