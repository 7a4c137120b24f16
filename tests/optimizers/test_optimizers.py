"""Every optimizer of some libraries: clipped as by hand, unchanged by a step that is withheld."""

import math
import random
import warnings

import numpy as np
import pytest
import set_ups
import torch
from reachable import reachable
from refused import REFUSED

from gradclip import GradientClipper, attach, withhold
from gradclip.errors import GradClipError

ALL = [*set_ups.torchs_own(), *(each for lib in set_ups.LIBRARIES for each in set_ups.all_of(lib))]
every = pytest.mark.parametrize("set_up", ALL, ids=lambda each: f"{each.library}-{each.name}")
LIMIT = 0.5


class Run:
    """A model that is trained on gradients of my own.

    Args:
        set_up: Its optimizer.
        clips: ``"attach"``, ``"hand"``, or ``""`` for none.
    """

    def __init__(self, set_up, clips):
        random.seed(0)
        self.model = set_ups.model()
        self.optimizer = set_up.make(self.model)
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        self.private = set_up.library == "opacus"
        self.second_order = "hessian" in set_up.name.lower() or set_up.name == "SophiaH"
        self.attachment = attach(self.optimizer, LIMIT) if clips == "attach" else None
        self.clipper = GradientClipper(self.optimizer, LIMIT) if clips == "hand" else None
        torch.manual_seed(1)

    def step(self, seed, *, bad=False, withheld=None):
        self.optimizer.zero_grad()
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(8, 64, generator=generator)
        loss = (10 * self.model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        loss.backward(create_graph=self.second_order)
        parameters = list(self.model.parameters())
        if bad:
            parameters[0].grad[3, 5] = math.nan
        for parameter in parameters:
            if self.private:
                parameter.grad_sample = parameter.grad[None]
        if self.clipper is not None:
            self.clipper.clip()
        torch.manual_seed(seed)  # some draw numbers in their step
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - what they draw from
        closure = loss.detach if type(self.optimizer).__name__ == "AliG" else None
        given = () if closure is None else (closure,)
        if withheld is None:
            self.optimizer.step(*given)
        else:
            with withhold(self.optimizer, withheld):
                self.optimizer.step(*given)

    def everything(self):
        """Return all that training depends on, but for what opacus accumulates for one step."""
        inner = self.optimizer.original_optimizer if self.private else self.optimizer
        return reachable([list(self.model.parameters()), inner])


def first_difference(one, other):
    return next((k for k in one.keys() | other.keys() if one.get(k) != other.get(k)), None)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def skip_refused(set_up):
    if (set_up.library, set_up.name) in REFUSED:
        pytest.skip("it is refused")


@every
def test_it_is_clipped_as_by_hand(set_up):
    skip_refused(set_up)
    if set_up.library == "opacus":
        pytest.skip("it computes the gradients within its step, so nobody can clip them by hand")
    ours, theirs, none = (Run(set_up, clips) for clips in ("attach", "hand", ""))
    for seed in range(3):
        for run in (ours, theirs, none):
            run.step(seed)
        assert bool(ours.attachment.last.clipped)
        assert float(ours.attachment.last.norm_post) <= LIMIT
    assert first_difference(ours.everything(), theirs.everything()) is None
    assert first_difference(ours.everything(), none.everything()) is not None


@every
@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("how", ["attach", "withhold"])
def test_a_withheld_step_changes_nothing(set_up, before, how):
    """KellerJordan/Muon#56, facebookresearch/schedule_free#48, stanford-crfm/levanter#973."""
    skip_refused(set_up)
    ours, twin = (Run(set_up, how if how == "attach" else "") for _ in range(2))
    for run in (ours, twin):
        for seed in range(before):
            run.step(seed)
    if how == "attach":
        ours.step(7, bad=True)
        assert bool(ours.attachment.last.skipped)
    else:
        ours.step(7, withheld=torch.tensor(True))
    assert first_difference(ours.everything(), twin.everything()) is None
    for run in (ours, twin):
        for seed in range(8, 11):
            run.step(seed)
    assert first_difference(ours.everything(), twin.everything()) is None


@pytest.mark.parametrize(("library", "name"), REFUSED)
def test_what_cannot_be_clipped_is_refused_by_name(library, name):
    (set_up,) = [each for each in ALL if (each.library, each.name) == (library, name)]
    model = set_ups.model()
    optimizer = set_up.make(model)

    def clipped_step():
        attach(optimizer, LIMIT)
        optimizer.step(lambda: model(torch.ones(1, 64)).sum())

    with pytest.raises(GradClipError, match=f"{name}.*{REFUSED[library, name].error}"):
        clipped_step()


def test_a_subclass_of_a_wrapper_is_looked_through_too():
    """Research code derives from opacus's: its module is that of the user."""

    class Mine(set_ups.package("opacus").DPOptimizer):
        pass

    weight = torch.nn.Parameter(torch.zeros(3))
    inner = torch.optim.SGD([weight], lr=1.0)
    options = {"noise_multiplier": 0.0, "max_grad_norm": 1e6, "expected_batch_size": 1}
    optimizer = Mine(inner, **options)
    handle = attach(optimizer, LIMIT)
    weight.grad, weight.grad_sample = torch.zeros(3), torch.full((1, 3), 100.0)
    optimizer.step()
    assert float(handle.last.norm_pre) > LIMIT
    assert float(weight.detach().norm()) == pytest.approx(LIMIT, rel=1e-5)
