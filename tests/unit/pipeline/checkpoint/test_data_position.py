"""Coming back to any batch of any kind of dataloader, with what was drawn in between."""

import itertools
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

from gradclip.errors import ArgumentValueError, CheckpointError
from gradclip.pipeline.checkpoint import data_position as data_position_module
from gradclip.pipeline.checkpoint.data_position import DataPosition
from gradclip.pipeline.preparation import prepared_dataloader

try:
    from torchdata.stateful_dataloader import StatefulDataLoader
except ImportError:
    StatefulDataLoader = None

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


class Remembering:
    """No DataLoader: knows its place and its seed, draws as it loads, and counts what is loaded."""

    def __init__(self):
        self.place = {"seed": random.randrange(10**6), "epoch": 0, "batches": 0}
        self.loaded = []

    def __iter__(self):
        place = self.place
        generator = torch.Generator().manual_seed(place["seed"] + place["epoch"])
        order = torch.split(NUMBERS[torch.randperm(len(NUMBERS), generator=generator)], 3)
        for batch in order[place["batches"] :]:
            place["batches"] += 1
            self.loaded.append(batch)
            yield batch + torch.rand(())
        place |= {"epoch": place["epoch"] + 1, "batches": 0}

    def state_dict(self):
        return self.place

    def load_state_dict(self, state):
        self.place |= state


class RememberingDataLoader(DataLoader):
    """A DataLoader with a state of its own, which Accelerate would build anew without it."""

    def __init__(self):
        super().__init__(NUMBERS, batch_size=3)
        vars(self)["place"] = Remembering()

    def __iter__(self):
        return iter(self.place)

    def state_dict(self):
        return self.place.state_dict()

    def load_state_dict(self, state):
        self.place.load_state_dict(state)


class RememberingStream(IterableDataset):
    """A stream with a state of its own, as torchdata asks for; it draws as it loads."""

    def __init__(self):
        self.state = {"seed": random.randrange(10**6), "next": 0}

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.state["seed"])
        order = torch.randperm(len(NUMBERS), generator=generator)
        for number in range(self.state["next"], len(NUMBERS)):
            self.state["next"] = number + 1
            yield NUMBERS[order[number]] + torch.rand(())
        self.state = {"seed": self.state["seed"] + 1, "next": 0}

    def state_dict(self):
        return dict(self.state)

    def load_state_dict(self, state):
        self.state = dict(state)


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
    "that remembers": Remembering,
    "DataLoader that remembers": RememberingDataLoader,
}


def of_torchdata(dataset=None, **options):
    dataset = TensorDataset(NUMBERS) if dataset is None else dataset
    return StatefulDataLoader(dataset, batch_size=3, **options)


OF_TORCHDATA = {
    "torchdata, shuffled": lambda: of_torchdata(shuffle=True),
    "torchdata, drawing": lambda: of_torchdata(Drawing(), shuffle=True, drop_last=True),
    "torchdata, with a generator": lambda: of_torchdata(
        shuffle=True, generator=torch.Generator().manual_seed(5)
    ),
    "torchdata, weighted": lambda: of_torchdata(sampler=WeightedRandomSampler([1.0] * 11, 11)),
    "torchdata, with a worker": lambda: of_torchdata(shuffle=True, num_workers=1),
    "torchdata, stream": lambda: of_torchdata(Stream()),
    "torchdata, stream that remembers": lambda: of_torchdata(RememberingStream()),
    "torchdata, dispatched": lambda: of_torchdata(RememberingStream()),
    "made one by Accelerate": lambda: shuffled(Drawing()),
    "a batch sampler made one by Accelerate": batched,
}


def of_any_torchdata(test):
    test = pytest.mark.parametrize("kind", OF_TORCHDATA)(test)
    test = pytest.mark.skipif(StatefulDataLoader is None, reason="torchdata is not there")(test)
    # torchdata calls what torch 2.13 calls deprecated.
    return pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")(test)


def prepared(kind, seedable=False):
    configuration = DataLoaderConfiguration(
        use_seedable_sampler=seedable,
        use_stateful_dataloader="by Accelerate" in kind or "dispatched" in kind,
    )
    accelerator = Accelerator(cpu=True, dataloader_config=configuration)
    loader = (KINDS | OF_TORCHDATA)[kind]()
    if "dispatched" in kind:  # as on a GPU
        loader = accelerator.prepare(loader)
    return prepared_dataloader(accelerator, loader)


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
    finds_every_place_again(tmp_path, kind, seedable)


@pytest.mark.parametrize("seedable", [False, True])
@of_any_torchdata
def test_every_place_of_torchdatas_loaders_is_found_again(tmp_path, kind, seedable):
    finds_every_place_again(tmp_path, kind, seedable)


@pytest.mark.parametrize(
    "kind", ["list", "plain iterable", "that remembers", "DataLoader that remembers", "shuffled"]
)
def test_every_place_is_found_again_by_a_position_that_looks_ahead(tmp_path, kind):
    """Which it does only where Accelerate does not; a loader that draws as it loads too."""
    finds_every_place_again(tmp_path, kind, seedable=False, look_ahead=True)


def finds_every_place_again(tmp_path, kind, seedable, **options):
    seed(1)
    whole, states = DataPosition(prepared(kind, seedable), lambda: True, **options), []
    steps = go(whole, 3, states)
    per_epoch = len(steps) // 3
    assert len(states) == 3 * (per_epoch + 1)
    for done, state in states:
        torch.save(state, tmp_path / "state.pt")
        seed(99)
        again = DataPosition(prepared(kind, seedable), lambda: True, **options)
        again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        if state["batches"] == 0:
            again.restore()
            step("between epochs")
        # After the last batch, the epoch is not over yet.
        left = 3 - done // per_epoch + (state["batches"] == per_epoch)
        rest = [each for _ in range(left) for each in one_epoch(again)]
        assert rest == steps[done:], (kind, done, state["batches"])


@pytest.mark.parametrize("kind", ["shuffled", "sequential", "drop last"])
def test_the_second_epoch_is_found_again_with_accelerate_1_10(tmp_path, monkeypatch, kind):
    """Until 1.15 a loader that it rebuilds begins with epoch 0, whatever epoch it was in."""
    skip = data_position_module.skip_first_batches

    def forgetful(loader, number):
        rest = skip(loader, number)
        rest.iteration = 0
        return rest

    monkeypatch.setattr(data_position_module, "skip_first_batches", forgetful)
    finds_every_place_again(tmp_path, kind, seedable=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_resumed_is_resumed(kind):
    resumes_twice(kind)


@of_any_torchdata
def test_a_run_on_torchdatas_loader_that_resumed_is_resumed(kind):
    resumes_twice(kind)


def resumes_twice(kind):
    """Torchdata counts twice what it passes over in a stream that has no state."""
    seed(1)
    states = []
    steps = go(DataPosition(prepared(kind), lambda: True), 1, states)
    state = states[1][1]
    for done in range(2, len(steps)):
        seed(99)
        again = DataPosition(prepared(kind), lambda: True)
        again.load_state_dict(state)
        batches = again.epoch()
        assert step(next(batches)) == steps[done]
        state = again.state_dict()
    assert list(batches) == []


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


def test_a_loader_that_keeps_its_state_loads_nothing_again():
    position = DataPosition(prepared("that remembers"))
    batches = position.epoch()
    for _ in range(3):
        next(batches)
    again = DataPosition(prepared("that remembers"))
    again.load_state_dict(position.state_dict())
    assert len(list(again.epoch())) == len(again.dataloader.loaded) == 1


@pytest.mark.parametrize(
    "kinds", [("that remembers", "plain iterable"), ("list", "that remembers")]
)
def test_inside_an_epoch_it_goes_on_with_a_loader_of_the_same_kind_alone(kinds):
    before, now = (DataPosition(prepared(kind)) for kind in kinds)
    batches = before.epoch()
    next(batches)
    with pytest.raises(CheckpointError, match="a state of its own"):
        now.load_state_dict(before.state_dict())
    list(batches)
    now.load_state_dict(before.state_dict())
    now.restore()
    assert len(list(now.epoch())) == 4


def test_a_state_that_only_unpickling_could_bring_back_is_refused():
    loader = Remembering()
    loader.place["when"] = loader
    position = DataPosition(loader)
    next(position.epoch())
    with pytest.raises(ArgumentValueError, match="unpickles"):
        position.state_dict()


def test_workers_load_the_same_order():
    seed(1)
    loader = Accelerator(cpu=True).prepare(shuffled(num_workers=1))
    position, states = DataPosition(loader, lambda: True), []
    steps = go(position, 1, states)
    seed(99)
    again = DataPosition(Accelerator(cpu=True).prepare(shuffled(num_workers=1)), lambda: True)
    again.load_state_dict(states[1][1])
    assert one_epoch(again) == steps[2:]


@pytest.mark.parametrize("kind", ["shuffled", "drawing", "plain iterable", "that remembers"])
def test_a_run_that_stopped_goes_on_where_it_was(kind):
    stops_and_goes_on(kind)


@of_any_torchdata
def test_a_run_on_torchdatas_loader_that_stopped_goes_on_where_it_was(kind):
    stops_and_goes_on(kind)


def stops_and_goes_on(kind):
    seed(1)
    steps = go(DataPosition(prepared(kind), lambda: True), 2)
    for stop in range(1, len(steps) // 2 + 1):
        seed(1)
        position = DataPosition(prepared(kind), lambda: False)
        first = []
        for batch in position.epoch():
            first.append(step(batch))
            if len(first) == stop:
                position.stop()
                break
        seed(99)
        assert first + go(position, 2) == steps, stop


@pytest.mark.parametrize("kind", ["shuffled", "batch sampler", "plain iterable", "that remembers"])
def test_a_batch_that_failed_comes_again_and_the_others_after_it(kind):
    fails_and_goes_on(kind)


@of_any_torchdata
def test_a_batch_of_torchdatas_loader_that_failed_comes_again_and_the_others_after_it(kind):
    fails_and_goes_on(kind)


def fails_and_goes_on(kind):
    draws = any(word in kind for word in ("drawing", "remembers", "dispatched", "made one"))

    def items(batch):
        """Without the noise, which is another one."""
        batch = batch[0] if isinstance(batch, list) else batch
        return (batch[:, 0] if batch.dim() == 2 else batch).floor().tolist()

    seed(1)
    before = DataPosition(prepared(kind))
    list(before.epoch())
    for resumed, failed in itertools.product([False, True], range(1, 4)):
        seed(99)
        position = DataPosition(prepared(kind), lambda: True)
        if resumed:
            position.load_state_dict(before.state_dict())
            position.restore()
        steps = []
        for batch in position.epoch():
            steps.append(items(batch))
            if len(steps) == failed:
                position.give_back()
                break
        random_state = torch.get_rng_state()
        seed(42)
        again = []
        for batch in position.epoch():
            assert again or draws or torch.equal(torch.get_rng_state(), random_state)
            again.append(items(batch))
        assert again[0] == steps[-1]
        consumed = [item for batch in [*steps[:-1], *again] for item in batch]
        assert len(set(consumed)) == len(consumed) or "weighted" in kind
        assert len(steps) + len(again) - 1 == (3 if "drawing" in kind else 4)


def items(batch):
    batch = batch[0] if isinstance(batch, list) else batch
    return (batch[:, 0] if batch.dim() == 2 else batch).floor().tolist()


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize(
    "kind", ["shuffled", "batch sampler", "stream", "list", "plain iterable", "that remembers"]
)
def test_a_window_that_is_given_back_comes_again(kind, look_ahead):
    gives_a_window_back(kind, look_ahead)


@of_any_torchdata
def test_a_window_of_torchdatas_loader_that_is_given_back_comes_again(kind):
    gives_a_window_back(kind, look_ahead=False)


def gives_a_window_back(kind, look_ahead):
    """With the batch in hand or without it, also after a stop inside the window."""
    for stop, done, window, in_hand in itertools.product([0, 1], [1, 2, 3], [0, 1, 2], [0, 1]):
        if not stop + window <= done or done + in_hand > 3:
            continue
        seed(1)
        position = DataPosition(prepared(kind), lambda: True, look_ahead=look_ahead)
        fed = []
        for part in [done - stop, done] if stop else [done]:
            batches = position.epoch()
            fed += [items(next(batches)) for _ in range(part - len(fed))]
            if part < done:
                position.stop(window)
                batches.close()
        if in_hand:
            next(batches)
        else:
            position.finish()
        assert position.give_back(window) == bool(window + in_hand)
        batches.close()
        rest = [items(batch) for batch in position.epoch()]
        assert rest[:window] == fed[done - window :]
        consumed = list(itertools.chain(*fed[: done - window], *rest))
        assert len(consumed) == (9 if "drop" in kind or "drawing" in kind else 11)
        assert len(set(consumed)) == len(consumed) or "weighted" in kind


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("kind", ["shuffled", "list", "that remembers"])
def test_a_window_that_a_checkpoint_cut_can_be_given_back_whole(kind, look_ahead):
    seed(1)
    position = DataPosition(prepared(kind), lambda: True, look_ahead=look_ahead)
    fed = [items(batch) for batch in itertools.islice(position.epoch(), 2)]
    position.stop(window=1)
    seed(99)
    again = DataPosition(prepared(kind), lambda: True, look_ahead=look_ahead)
    again.load_state_dict(position.state_dict())
    fed.append(items(next(again.epoch())))
    assert again.give_back(window=1)
    assert [items(batch) for batch in again.epoch()][:2] == fed[1:]


def test_the_last_batch_is_known_where_the_position_looks_ahead():
    position = DataPosition([1, 2, 3], look_ahead=True)
    for _ in range(2):
        assert [position.is_last for _ in position.epoch()] == [False, False, True]
    assert [position.is_last for _ in DataPosition([1, 2]).epoch()] == [False, False]


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


def test_nothing_is_kept_per_batch_where_nobody_goes_on():
    position = DataPosition(prepared("drawing"))
    next(position.epoch())
    assert position.state_dict()["asked"] is None
