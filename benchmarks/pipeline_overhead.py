"""What loops around a training step add to it: pipelines, callbacks and an attachment, paired.

    python benchmarks/pipeline_overhead.py [--rounds 9] [--check]

Small perceptrons of 4, 12 and 30 tensors, one dataset, one optimizer, a norm limit of 1.0 and no
logging in all. The time of a step is the difference between a long and a short run, so that set-up
does not count; what is added is that minus the step of a plain loop which clips with
``torch.nn.utils``, in the same round. One thread. Frameworks that are not installed are left out.

- plain, plain with the object, plain with attach: a loop written by hand
- gradclip: our trainer, which is compared with the plain loop with the object too ("alone")
- lightning, transformers: with the clipping that they have; with our callback in its place; and
  with the one of smartclip. A step with a callback is compared with a step without it.

Writes ``benchmarks/results/pipeline_overhead.csv``; with ``--check`` fails where our trainer alone
adds more than a quarter of what Lightning or transformers.Trainer adds.
"""

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from timing import RESULTS, Function, Times, machine, optional, paired, rounded, write
from torch import nn
from torch.utils.data import DataLoader, Dataset

import gradclip
from gradclip.pipeline import HookBasedTrainer, SimpleBatchProcessor
from gradclip.pipeline.hooks import GradientClippingHookConfig

SHORT, LONG, BATCH = 50, 250, 8
TENSORS = (4, 12, 30)
SHARE = 0.25
FRAMEWORKS = ("lightning", "transformers")

Run = Callable[[int, int], None]
"""Of so many steps, with a model of so many tensors."""


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

    def __init__(self, tensors: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Linear(16, 32), nn.ReLU()]
        for _ in range(tensors // 2 - 2):
            layers += [nn.Linear(32, 32), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(32, 1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.mse_loss(self.layers(x), labels)}


def loader(steps: int) -> DataLoader[dict[str, torch.Tensor]]:
    return DataLoader(Pairs(steps * BATCH), batch_size=BATCH)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)


def plain(clip: Callable[[nn.Module, torch.optim.Optimizer], Function], steps: int, n: int) -> None:
    model = Model(n)
    optimizer = adam(model)
    scheduler = constant(optimizer)
    clip_gradients = clip(model, optimizer)
    for batch in loader(steps):
        model(**batch)["loss"].backward()
        clip_gradients()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def torchs(model: nn.Module, _: torch.optim.Optimizer) -> Function:
    return lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def the_object(model: nn.Module, _: torch.optim.Optimizer) -> Function:
    return gradclip.GradientClipper(list(model.parameters()), 1.0).clip


def attached(_: nn.Module, optimizer: torch.optim.Optimizer) -> Function:
    gradclip.attach(optimizer, 1.0)
    return lambda: None


def ours(steps: int, tensors: int) -> None:
    model = Model(tensors)
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


def in_lightning(lightning: Any, callback: Callable[[], Any] | None, steps: int, n: int) -> None:
    """Train in Lightning, with a callback in the place of its own clipping or without one."""

    class LightningModel(lightning.LightningModule):  # type: ignore[misc,name-defined]
        """The same model and optimizer, as Lightning wants them."""

        def __init__(self) -> None:
            super().__init__()
            self.model = Model(n)

        def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
            return self.model(**batch)["loss"]

        def configure_optimizers(self) -> dict[str, object]:
            optimizer = adam(self.model)
            scheduler = {"scheduler": constant(optimizer), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        gradient_clip_val=None if callback else 1.0,
        callbacks=[callback()] if callback else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(LightningModel(), loader(steps))


def in_transformers(
    transformers: Any, callback: Callable[[], Any] | None, steps: int, n: int
) -> None:
    """Train in transformers, with a callback in the place of its own clipping or without one."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            learning_rate=1e-3,
            max_grad_norm=0.0 if callback else 1.0,
            optim="adamw_torch",  # as in the others; the default is a fused one
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model=Model(n),
            args=arguments,
            train_dataset=Pairs(steps * BATCH),
            callbacks=[callback()] if callback else [],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


def runs() -> dict[str, Run]:
    """Return all loops whose frameworks are installed."""
    found: dict[str, Run] = {
        "plain": partial(plain, torchs),
        "plain with the object": partial(plain, the_object),
        "plain with attach": partial(plain, attached),
        "gradclip": ours,
    }
    smartclip = optional("smartclip")
    for name, train in (("lightning", in_lightning), ("transformers", in_transformers)):
        framework = optional(name)
        if framework is None:
            continue
        found[name] = partial(train, framework, None)
        callback = optional(f"gradclip.integrations.{name}").GradientClippingCallback
        found[f"{name} with our callback"] = partial(train, framework, partial(callback, 1.0))
        theirs = smartclip and optional("smartclip.backends.torch.integrate")
        if theirs:
            named = {"lightning": "SmartClipCallback", "transformers": "SmartClipTrainerCallback"}
            other = partial(getattr(theirs, named[name]), smartclip.AutoClip())
            found[f"{name} with smartclip's callback"] = partial(train, framework, other)
    return found


def steps_of(found: dict[str, Run], tensors: int, rounds: int) -> dict[str, Times]:
    """Return the times of a step in each loop, without the set-up."""
    both: dict[str, Function] = {
        f"{name} {steps}": partial(run, steps, tensors)
        for name, run in found.items()
        for steps in (SHORT, LONG)
    }
    times = paired(both, rounds, warm_up=1)
    return {
        name: (times[f"{name} {LONG}"] - times[f"{name} {SHORT}"]) / (LONG - SHORT)
        for name in found
    }


def lines(tensors: int, times: dict[str, Times]) -> Iterator[dict[str, object]]:
    """Yield what a step takes, and what is added to one, for a model of so many tensors."""
    for who, each in times.items():
        loop, _, clips_otherwise = who.partition(" with ")
        columns = each.columns(times[loop] if clips_otherwise else None)
        yield {"tensors": tensors, "what": "step", "who": who, **columns}
    for who, each in times.items():
        if who != "plain":
            added = each - times["plain"]
            yield {"tensors": tensors, "what": "added", "who": who, **added.columns()}
    alone = times["gradclip"] - times["plain with the object"]
    yield {"tensors": tensors, "what": "added", "who": "gradclip alone", **alone.columns()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    found = runs()
    rows: list[dict[str, object]] = []
    shares: list[float] = []
    for tensors in TENSORS:
        times = steps_of(found, tensors, options.rounds)
        for line in lines(tensors, times):
            rows.append({**line, "machine": machine("cpu")})
            print(rounded(line))
        alone = (times["gradclip"] - times["plain with the object"]).cpu_ms
        for name in FRAMEWORKS:
            if tensors == TENSORS[0] and name in times:
                shares.append(alone / (times[name] - times["plain"]).cpu_ms)
                print(f"the pipeline alone takes {shares[-1]:.2f} of what {name} adds")
    write(RESULTS / "pipeline_overhead.csv", rows)
    return int(options.check and max(shares, default=0.0) > SHARE)


if __name__ == "__main__":
    sys.exit(main())
