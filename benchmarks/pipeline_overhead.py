"""What a training pipeline adds to a step: ours, Lightning's and transformers.Trainer's, paired.

    python benchmarks/pipeline_overhead.py [--rounds 5] [--check]

One tiny model, one dataset, one optimizer, norm clipping at 1.0 and no logging in all. The time of
a step is the difference between a long and a short run, so that set-up does not count. The
overhead is that minus the step of a plain loop; ours is compared with a plain loop that clips with
``torch.nn.utils`` (as the others do), and, for what the pipeline alone costs, with one that clips
with ours. Medians over rounds in turn, one thread. Writes
``benchmarks/results/pipeline_overhead.csv``; with ``--check`` fails above 25 %.
"""

import argparse
import csv
import logging
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, Dataset

from gradclip import GradientClipper
from gradclip.pipeline import HookBasedTrainer, SimpleBatchProcessor
from gradclip.pipeline.hooks import GradientClippingHookConfig

RESULTS = Path(__file__).parent / "results" / "pipeline_overhead.csv"
SHORT, LONG, BATCH = 50, 450, 8
LIMIT = 0.25


class Pairs(Dataset[dict[str, torch.Tensor]]):
    """A linear map with noise."""

    def __init__(self, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(length, 16, generator=generator)
        self.y = self.x.sum(1, keepdim=True) + torch.randn(length, 1, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[index], "labels": self.y[index]}


class Model(nn.Module):
    """A small perceptron that returns its loss, as transformers expects."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.mse_loss(self.layers(x), labels)}


def loader(steps: int) -> DataLoader[dict[str, torch.Tensor]]:
    return DataLoader(Pairs(steps * BATCH), batch_size=BATCH)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)


def plain(steps: int, clip: Callable[[nn.Module], Callable[[], object]] | None = None) -> None:
    model = Model()
    optimizer = adam(model)
    scheduler = constant(optimizer)
    clip_gradients = (clip or torchs)(model)
    for batch in loader(steps):
        model(**batch)["loss"].backward()
        clip_gradients()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def torchs(model: nn.Module) -> Callable[[], object]:
    return lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def plain_with_gradclip(steps: int) -> None:
    plain(steps, lambda model: GradientClipper(list(model.parameters()), 1.0).clip)


def ours(steps: int) -> None:
    model = Model()
    optimizer = adam(model)

    def forward(
        model: nn.Module, batch: dict[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        outputs = model(**batch)
        return outputs, outputs["loss"]

    HookBasedTrainer(
        model=model,
        dataloader=loader(steps),
        batch_processor=SimpleBatchProcessor.from_callable(forward),
        optimizer=optimizer,
        lr_scheduler=constant(optimizer),
        max_epoch=1,
        grad_clip=GradientClippingHookConfig(clip_mode="norm", max_norm=1.0),
    )()


class LightningModel(lightning.LightningModule):
    """The same model and optimizer, as Lightning wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        return self.model(**batch)["loss"]

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = adam(self.model)
        scheduler = {"scheduler": constant(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def with_lightning(steps: int) -> None:
    lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(LightningModel(), loader(steps))


def with_transformers(steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            learning_rate=1e-3,
            max_grad_norm=1.0,
            optim="adamw_torch",  # as in the others; the default is a fused one
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        transformers.Trainer(
            model=Model(), args=arguments, train_dataset=Pairs(steps * BATCH)
        ).train()


def step_time(run: Callable[[int], None]) -> float:
    """Microseconds a step, without the set-up."""
    times = []
    for steps in (SHORT, LONG):
        start = time.perf_counter()
        run(steps)
        times.append(time.perf_counter() - start)
    return (times[1] - times[0]) / (LONG - SHORT) * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)

    runs = {
        "plain": plain,
        "plain_with_gradclip": plain_with_gradclip,
        "gradclip": ours,
        "lightning": with_lightning,
        "transformers": with_transformers,
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(options.rounds + 1):
        for name, run in runs.items():
            measured = step_time(run)
            if round_:
                times[name].append(measured)

    step = {name: statistics.median(values) for name, values in times.items()}
    overhead = {name: value - step["plain"] for name, value in step.items()}
    machine = f"{platform.machine()} torch {torch.__version__}"
    versions = f"lightning {lightning.__version__} transformers {transformers.__version__}"
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["loop", "step_us", "overhead_us", "machine", "versions"])
        for name in runs:
            row = [name, f"{step[name]:.1f}", f"{overhead[name]:.1f}"]
            print(*row)
            writer.writerow([*row, machine, versions])
    pipeline = step["gradclip"] - step["plain_with_gradclip"]
    shares = [pipeline / overhead[name] for name in ("lightning", "transformers")]
    print(
        f"the pipeline alone {pipeline:.1f} us: {shares[0]:.2f} of Lightning's overhead, ", end=""
    )
    print(f"{shares[1]:.2f} of transformers.Trainer's")
    return int(options.check and max(shares) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
