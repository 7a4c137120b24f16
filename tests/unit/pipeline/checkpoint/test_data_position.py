"""Coming back to any batch of any kind of dataloader, with what was drawn in between."""

import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from gradclip.errors import CheckpointError
from gradclip.pipeline.checkpoint.data_position import DataPosition

NUMBERS = torch.arange(11)


class Drawing(Dataset):
    """Augments every item with all three generators of the process, and counts what is loaded."""

    def __init__(self):
        self.loaded = []

    def __len__(self):
        return len(NUMBERS)

    def __getitem__(self, item):
        self.loaded.append(item)
        noise = random.random() + np.random.rand() + torch.rand(()).item()  # noqa: NPY002
        return torch.tensor([item, noise], dtype=torch.float64)


class Stream(IterableDataset):
    def __iter__(self):
        order = torch.randperm(len(NUMBERS))
        yield from NUMBERS[order]


class Plain:
    """An iterable that is no DataLoader, and draws its order as it begins."""

    def __iter__(self):
        return iter(torch.split(NUMBERS[torch.randperm(len(NUMBERS))], 3))


def shuffled(dataset=None, **options):
    dataset = TensorDataset(NUMBERS) if dataset is None else dataset
    return DataLoader(dataset, batch_size=3, shuffle=True, **options)


def batched():
    sampler = BatchSampler(RandomSampler(NUMBERS), 3, drop_last=False)
    return DataLoader(TensorDataset(NUMBERS), batch_sampler=sampler)


KINDS = {
    "shuffled": shuffled,
    "sequential": lambda: DataLoader(TensorDataset(NUMBERS), batch_size=3),
    "drop last": lambda: shuffled(drop_last=True),
    "with a generator": lambda: shuffled(generator=torch.Generator().manual_seed(5)),
    "weighted": lambda: DataLoader(
        TensorDataset(NUMBERS), batch_size=3, sampler=WeightedRandomSampler([1.0] * 11, 11)
    ),
    "with replacement": lambda: DataLoader(
        TensorDataset(NUMBERS), batch_size=3, sampler=RandomSampler(NUMBERS, replacement=True)
    ),
    "batch sampler": batched,
    "one by one": lambda: DataLoader(NUMBERS, batch_size=None, sampler=SequentialSampler(range(4))),
    "drawing": lambda: shuffled(Drawing()),
    "stream": lambda: DataLoader(Stream(), batch_size=3),
    "plain iterable": Plain,
    "list": lambda: list(torch.split(NUMBERS, 3)),
}


def prepared(kind, seedable=False):
    configuration = DataLoaderConfiguration(use_seedable_sampler=seedable)
    loader = KINDS[kind]()
    accelerator = Accelerator(cpu=True, dataloader_config=configuration)
    return accelerator.prepare(loader) if isinstance(loader, DataLoader) else loader


def seed(number):
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002
    torch.manual_seed(number)


def step(batch):
    """What a training step does: look at the batch, and draw (dropout)."""
    noise = (random.random(), float(np.random.rand()), torch.rand(2).tolist())  # noqa: NPY002
    return repr(batch), noise


def go(position, epochs, states=None):
    """Go through epochs; note every step, and the state after it and after each epoch."""
    steps = []
    position.restore()
    for _ in range(epochs):
        for batch in position.epoch():
            steps.append(step(batch))
            if states is not None:
                states.append((len(steps), position.state_dict()))
        if states is not None:
            states.append((len(steps), position.state_dict()))
        step("between epochs")
    return steps


def one_epoch(position):
    steps = [step(batch) for batch in position.epoch()]
    step("between epochs")
    return steps


@pytest.mark.parametrize("seedable", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_place_is_found_again(tmp_path, kind, seedable):
    seed(1)
    whole, states = DataPosition(prepared(kind, seedable), lambda: True), []
    steps = go(whole, 3, states)
    per_epoch = len(steps) // 3
    assert len(states) == 3 * (per_epoch + 1)
    for done, state in states:
        torch.save(state, tmp_path / "state.pt")
        seed(99)
        again = DataPosition(prepared(kind, seedable), lambda: True)
        again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        if state["batches"] == 0:
            again.restore()
            step("between epochs")
        # After the last batch, the epoch is not over yet.
        left = 3 - done // per_epoch + (state["batches"] == per_epoch)
        rest = [each for _ in range(left) for each in one_epoch(again)]
        assert rest == steps[done:], (kind, done, state["batches"])


def test_consumed_batches_are_not_loaded_again():
    seed(1)
    position = DataPosition(prepared("drawing"), lambda: True)
    batches = position.epoch()
    for _ in range(3):
        next(batches)
    state = position.state_dict()
    again = DataPosition(prepared("drawing"), lambda: True)
    again.load_state_dict(state)
    rest = [item for batch in again.epoch() for item in batch[:, 0].tolist()]
    assert again.dataloader.dataset.loaded == rest
    assert len(rest) == 2


def test_workers_load_the_same_order():
    seed(1)
    loader = Accelerator(cpu=True).prepare(shuffled(num_workers=1))
    position, states = DataPosition(loader, lambda: True), []
    steps = go(position, 1, states)
    seed(99)
    again = DataPosition(Accelerator(cpu=True).prepare(shuffled(num_workers=1)), lambda: True)
    again.load_state_dict(states[1][1])
    assert one_epoch(again) == steps[2:]


@pytest.mark.parametrize("kind", ["shuffled", "drawing", "plain iterable"])
def test_a_run_that_stopped_goes_on_where_it_was(kind):
    seed(1)
    steps = go(DataPosition(prepared(kind), lambda: True), 2)
    seed(1)
    position = DataPosition(prepared(kind), lambda: True)
    first = []
    for batch in position.epoch():
        first.append(step(batch))
        if len(first) == 2:
            position.stop()
            break
    seed(99)
    assert first + go(position, 2) == steps


def test_stopping_takes_the_loader_out_of_accelerates_hands():
    loader = prepared("shuffled")
    position = DataPosition(loader)
    next(batches := position.epoch())
    assert loader.gradient_state.in_dataloader
    position.stop()
    batches.close()
    assert not loader.gradient_state.in_dataloader
    next(batches := position.epoch())
    assert loader.gradient_state.in_dataloader
    position.stop()
    batches.close()
    assert not loader.gradient_state.in_dataloader


@pytest.mark.parametrize("kind", ["shuffled", "list"])
def test_a_shorter_dataloader_is_an_error(kind):
    position = DataPosition(prepared(kind), lambda: True)
    batches = position.epoch()
    for _ in range(3):
        next(batches)
    state = position.state_dict()
    short = DataLoader(TensorDataset(NUMBERS[:6]), batch_size=3)
    short = Accelerator(cpu=True).prepare(short) if kind == "shuffled" else [1, 2]
    again = DataPosition(short)
    again.load_state_dict(state)
    with pytest.raises(CheckpointError, match="after 3 batches"):
        list(again.epoch())


def test_nothing_is_kept_per_batch_where_no_checkpoint_may_follow():
    position = DataPosition(prepared("drawing"), lambda: False)
    next(position.epoch())
    assert position.state_dict()["asked"] is None
