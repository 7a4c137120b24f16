"""Trains with SIGKILL at random moments, then to an end, and once without: the logs tell.

Every run is a fork of one process that has trained one step with one thread, so that a run costs no
second import.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradclip.pipeline import HookBasedTrainer, SimpleBatchProcessor
from gradclip.pipeline.checkpoint.store import find
from gradclip.pipeline.hooks import (
    GradientClippingHookConfig,
    HookContext,
    PipelineHooks,
    RecordHookConfig,
    SaveCheckpointConfig,
)


def train(root: Path, log: Path, seed: int, max_step: int) -> None:
    """Train, from the last checkpoint if there is one; log every step as it is made.

    A run that resumes is seeded differently: whatever is random must come from the checkpoint.
    """
    begun = root.exists() and any(root.glob("epoch*"))
    seed = seed if begun else 0
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 8, generator=generator)
    targets = torch.randn(60, 1, generator=generator)
    with log.open("a") as file:

        def note(arg):
            loss = float(arg.reduce_loss).hex()
            values = [p.detach().numpy().tobytes().hex() for p in model.parameters()]
            file.write(json.dumps([arg.global_step_id, loss, values]) + "\n")
            file.flush()

        noting = PipelineHooks()
        noting.register_hook("on_step", HookContext.from_callable("note", after=note))
        HookBasedTrainer(
            Accelerator(cpu=True, gradient_accumulation_steps=2),
            model,
            DataLoader(TensorDataset(inputs, targets), batch_size=4, shuffle=True),
            SimpleBatchProcessor.from_callable(
                lambda m, batch: (None, nn.functional.mse_loss(m(batch[0]), batch[1]))
            ),
            optimizer,
            torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.9),
            hooks=[
                GradientClippingHookConfig(clip_mode="norm", max_norm=0.2),
                noting,
                RecordHookConfig(path=str(root / "run.jsonl")),
                SaveCheckpointConfig(save_root=str(root), save_step_freq=4, keep_last=2),
            ],
            max_step=max_step,
            resume_from="auto",
        )()


def fork(*arguments) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            train(*arguments)
            status = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            sys.stderr.flush()
            os._exit(status)
    return child


def lines(log: Path) -> int:
    return log.read_text().count("\n") if log.exists() else 0


def finish(*arguments) -> None:
    _, status = os.waitpid(fork(*arguments), 0)
    assert status == 0


def main(folder: Path, seed: int, kills: int) -> dict[str, int]:
    train(folder / "warm", folder / "warm.log", 0, 1)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    chance = random.Random(seed)
    root, drafts = folder / "killed", 0
    for number in range(kills):
        log = folder / f"{number}.log"
        child = fork(root, log, number, 10_000)
        count = chance.randint(1, 12)
        while lines(log) < count:
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.04))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        drafts += any(p.name.endswith(".tmp") for p in root.iterdir())
    last = find(root)[1].progress.global_step_id if any(root.glob("epoch*")) else 0
    finish(root, folder / "last.log", 99, last + 50)
    finish(folder / "whole", folder / "whole.log", 0, last + 50)
    return {"resumed_at": last, "drafts": drafts}
