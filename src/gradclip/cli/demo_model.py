"""What the demo trains: a recurrent network that explodes by itself, on text every Python has.

A ReLU recurrence that starts at the identity (Le et al. 2015, arXiv:1504.00941) remembers for
long, and its gradients grow as long: nothing is injected.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from gradclip.clipping import ObserveClip
from gradclip.diagnostics import StepRecord, read_record
from gradclip.hook import HookContext
from gradclip.pipeline import HookBasedTrainer, SimpleBatchProcessor
from gradclip.pipeline.hooks import (
    GradientClippingHookConfig,
    PipelineHookArgs,
    PipelineHooks,
    RecordHookConfig,
)

__all__ = ["CharacterModel", "NextCharacter", "train", "windows"]

BATCH = 32
LENGTH = 64


class CharacterModel(nn.Module):
    """Predicts the next character: embedding, ReLU recurrence, linear."""

    def __init__(self, characters: int, *, embedding: int = 32, hidden: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, embedding)
        self.recurrence = nn.RNN(embedding, hidden, nonlinearity="relu")
        self.head = nn.Linear(hidden, characters)
        for name, parameter in self.recurrence.named_parameters():
            if name.startswith("weight_hh"):
                nn.init.eye_(parameter)
            elif name.startswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, text_BT: Tensor) -> Tensor:
        """Score the character after each one: (batch, time) to (time, batch, characters)."""
        states_TBH, _ = self.recurrence(self.embedding(text_BT.T))
        scores_TBC: Tensor = self.head(states_TBH)
        return scores_TBC


class NextCharacter(SimpleBatchProcessor):
    """The loss of predicting each character from those before it."""

    def forward(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Predict all but the first character of each window."""
        (windows_BW,) = batch
        scores_TBC = model(windows_BW[:, :-1])
        return scores_TBC, cross_entropy(scores_TBC.flatten(0, 1), windows_BW[:, 1:].T.flatten())


def windows(text: str) -> tuple[Tensor, int]:
    """Number the characters of a text and cut it up: (windows, LENGTH + 1); and count them."""
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}
    width = LENGTH + 1
    numbered = torch.tensor([numbers[character] for character in text])
    return numbered[: len(numbered) // width * width].view(-1, width), len(numbers)


def train(
    max_norm: float | None,
    record: Path,
    *,
    seed: int = 0,
    steps: int = 300,
    lr: float = 3e-3,
    on_step: Callable[[PipelineHookArgs], None] | None = None,
) -> list[StepRecord]:
    """Train the model once, on the CPU; the same arguments give the same numbers.

    Args:
        max_norm: The gradient norm that is allowed; None observes, and changes nothing even where
            a gradient is not finite, so that a run that diverges shows it.
        record: Where the record of the run goes.
        seed: Of the weights and of the order of the text.
        steps: Optimizer steps.
        lr: Learning rate of AdamW.
        on_step: Called after every step.

    Returns:
        The steps, as recorded.
    """
    if max_norm is None:
        clipping = GradientClippingHookConfig(policy=ObserveClip())
    else:
        # A run that diverges is a finding: it is shown to its end, and not stopped on the way.
        clipping = GradientClippingHookConfig(
            clip_mode="norm", max_norm=max_norm, max_consecutive_skips=steps
        )
    record.unlink(missing_ok=True)  # a run does not write over the record of another one
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        windows_NW, characters = windows("\n".join(topics[name] for name in sorted(topics)))
        order = torch.Generator().manual_seed(seed)
        model = CharacterModel(characters)
        watch = PipelineHooks()
        if on_step is not None:
            watch.register_hook("on_step", HookContext.from_callable(after=on_step))
        trainer = HookBasedTrainer(
            accelerator=Accelerator(cpu=True),
            model=model,
            dataloader=DataLoader(
                TensorDataset(windows_NW), BATCH, shuffle=True, drop_last=True, generator=order
            ),
            batch_processor=NextCharacter(),
            optimizer=torch.optim.AdamW(model.parameters(), lr=lr),
            hooks=[RecordHookConfig(path=str(record)), watch],
            max_step=steps,
            grad_clip=clipping,
        )
        trainer()
    return read_record(record)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small are slower on many threads, and sums then depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
