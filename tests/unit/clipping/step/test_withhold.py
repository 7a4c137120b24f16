"""The step that is withheld: nothing changes, and nothing is left behind."""

import copy
import itertools
import math

import pytest
import torch

import oracle
from gradclip import GradientClipper, withhold
from gradclip.errors import ArgumentTypeError
from pairwise import pairwise

INF, NAN = math.inf, math.nan

OPTIMIZERS = {
    "SGD": lambda ps, **k: torch.optim.SGD(ps, lr=0.1, **k),
    "SGD momentum": lambda ps, **k: torch.optim.SGD(ps, lr=0.1, momentum=0.9, **k),
    "AdamW": lambda ps, **k: torch.optim.AdamW(ps, lr=0.1, weight_decay=0.1, **k),
    "Adagrad": lambda ps, **k: torch.optim.Adagrad(ps, lr=0.1, **k),
}  # fmt: skip
WAYS = ({"foreach": False}, {"foreach": True}, {"fused": True})
kinds = pytest.mark.parametrize(("kind", "way"), list(itertools.product(OPTIMIZERS, WAYS)), ids=str)
flags = pytest.mark.parametrize("flag", [bool, torch.tensor])


def trainee(kind, way):
    params = [torch.nn.Parameter(oracle.randn(5, seed=i)) for i in range(3)]
    return params, OPTIMIZERS[kind](params, **way)


def give_gradients(params, seed):
    for i, p in enumerate(params):
        p.grad = oracle.randn(5, seed=100 * seed + i)


def everything(params, optimizer):
    """The bits of all weights and of all state: moments and step counts."""
    state = [
        (i, name, oracle.bits(v) if isinstance(v, torch.Tensor) else v)
        for i, p in enumerate(params)
        for name, v in sorted(optimizer.state.get(p, {}).items())
    ]
    return [oracle.bits(p) for p in params], state


@kinds
@flags
def test_a_withheld_step_changes_nothing(kind, way, flag):
    params, optimizer = trainee(kind, way)
    give_gradients(params, 1)
    optimizer.step()
    before, attributes = everything(params, optimizer), set(vars(optimizer))
    give_gradients(params, 2)
    with withhold(optimizer, flag(True)):
        optimizer.step()
    assert everything(params, optimizer) == before
    assert set(vars(optimizer)) == attributes
    assert not hasattr(optimizer, "found_inf")
    assert not hasattr(optimizer, "grad_scale")
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@kinds
@flags
def test_the_step_after_a_withheld_first_one_is_a_first_step(kind, way, flag):
    params, optimizer = trainee(kind, way)
    weights, attributes = [oracle.bits(p) for p in params], set(vars(optimizer))
    give_gradients(params, 1)
    with withhold(optimizer, flag(True)):
        optimizer.step()
    assert [oracle.bits(p) for p in params] == weights
    assert set(vars(optimizer)) <= attributes | {"_need_device_dtype_check_for_fused"}
    reference, their_optimizer = trainee(kind, way)
    for seed in (2, 3):
        for ps, opt in ((params, optimizer), (reference, their_optimizer)):
            give_gradients(ps, seed)
            opt.step()
    assert everything(params, optimizer) == everything(reference, their_optimizer)


@kinds
@flags
def test_a_step_that_is_not_withheld_is_the_ordinary_one(kind, way, flag):
    params, optimizer = trainee(kind, way)
    reference, their_optimizer = trainee(kind, way)
    for seed in (1, 2, 3):
        give_gradients(params, seed)
        give_gradients(reference, seed)
        grads = oracle.look(params)
        with withhold(optimizer, flag(False)):
            optimizer.step()
        their_optimizer.step()
        oracle.assert_untouched(params, grads)
        assert everything(params, optimizer) == everything(reference, their_optimizer)
    assert set(vars(optimizer)) == set(vars(their_optimizer))


@pytest.mark.smoke
@kinds
def test_a_parameter_that_joins_late_is_withheld_too(kind, way):
    (params, optimizer), (reference, theirs) = trainee(kind, way), trainee(kind, way)
    for ps, opt in ((params, optimizer), (reference, theirs)):
        give_gradients(ps, 1)
        opt.step()
        ps.append(torch.nn.Parameter(oracle.randn(5, seed=9)))
        opt.add_param_group({"params": [ps[-1]]})
    weights = [oracle.bits(p) for p in params]
    give_gradients(params, 2)
    with withhold(optimizer, torch.tensor(True)):
        optimizer.step()
    assert [oracle.bits(p) for p in params] == weights
    for ps, opt in ((params, optimizer), (reference, theirs)):
        give_gradients(ps, 3)
        opt.step()
    assert everything(params, optimizer) == everything(reference, theirs)


@pytest.mark.parametrize("skipped", [True, False])
def test_what_a_scaler_put_on_the_optimizer_comes_back(skipped):
    params, optimizer = trainee("AdamW", {"fused": True})
    give_gradients(params, 1)
    optimizer.step()
    found, scale = torch.zeros(()), None
    optimizer.found_inf, optimizer.grad_scale = found, scale
    give_gradients(params, 2)
    with withhold(optimizer, torch.tensor(skipped)):
        optimizer.step()
    assert optimizer.found_inf is found
    assert float(found) == 0.0
    assert optimizer.grad_scale is None


@pytest.mark.parametrize("skipped", [True, False])
def test_an_overflow_that_a_scaler_found_is_not_doubled(skipped):
    """A ``found_inf`` of 2 would let the update run, with a step count that falls."""
    params, optimizer = trainee("AdamW", {"fused": True})
    give_gradients(params, 1)
    optimizer.step()
    before = everything(params, optimizer)
    optimizer.found_inf = torch.ones(())
    with withhold(optimizer, torch.tensor(skipped)):
        optimizer.step()
    assert everything(params, optimizer) == before


@kinds
def test_an_error_inside_leaves_nothing_behind(kind, way):
    params, optimizer = trainee(kind, way)
    give_gradients(params, 1)
    optimizer.step()
    before, attributes = everything(params, optimizer), set(vars(optimizer))
    give_gradients(params, 2)
    with pytest.raises(KeyError), withhold(optimizer, skipped=torch.tensor(True)):
        raise KeyError
    assert set(vars(optimizer)) == attributes
    assert everything(params, optimizer) == before
    reference, theirs = trainee(kind, way)
    for seed in (1, 2):
        give_gradients(reference, seed)
        theirs.step()
    give_gradients(params, 2)
    optimizer.step()
    assert everything(params, optimizer) == everything(reference, theirs)


@pairwise(kind=list(OPTIMIZERS), way=WAYS, bad=[INF, -INF, NAN])
def test_a_clipped_loop_with_one_bad_batch_is_a_loop_without_it(kind, way, bad):
    finals = []
    for batches in ([1, 2, None, 3], [1, 2, 3]):
        params, optimizer = trainee(kind, way)
        clipper = GradientClipper(params, 0.5)
        for seed in batches:
            give_gradients(params, seed or 7)
            if seed is None:
                params[1].grad[2] = bad
            result = clipper.clip()
            with withhold(optimizer, result.skipped):
                optimizer.step()
            assert bool(result.skipped) == (seed is None)
        finals.append(everything(params, optimizer))
    assert finals[0] == finals[1]


class Counting(torch.optim.SGD):
    """Counts its steps by itself, as schedule-free optimizers do."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1


class Ahead(torch.optim.Optimizer):
    """Steps another optimizer, and is called whatever happens."""

    def __init__(self, optimizer):
        self.optimizer, self.calls = optimizer, 0
        super().__init__(optimizer.param_groups, {})

    def step(self, closure=None):
        self.calls += 1
        self.optimizer.step(closure)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("flag", [bool, torch.tensor], ids=["bool", "tensor"])
def test_what_an_optimizer_counts_by_itself_waits_too(depth, flag):
    """Nor is one called that steps another: it may have weights of its own to move."""
    params = oracle.parameters(torch.ones(2))
    inner = outer = Counting(params, lr=0.1)
    for _ in range(depth):
        outer = Ahead(outer)
    params[0].grad = torch.ones(2)
    with withhold(outer, flag(True)):
        outer.step()
        outer.step()
    assert "k" not in inner.param_groups[0]
    assert not {"step", "__getstate__"} & vars(outer).keys()
    assert params[0].grad.tolist() == [1.0, 1.0]
    outer.step()
    assert inner.param_groups[0]["k"] == 1
    assert getattr(outer, "calls", 1) == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("inside", [False, True])
def test_a_scheduler_finds_nothing_wrong_with_a_withheld_first_step(inside):
    params = oracle.parameters(torch.ones(2))
    optimizer = torch.optim.SGD(params, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with withhold(optimizer, skipped=True):
        optimizer.step()
        if inside:
            scheduler.step()
            torch.optim.lr_scheduler.StepLR(optimizer, 1)
    if not inside:
        scheduler.step()
    before = params[0].detach().clone()
    params[0].grad = torch.ones(2)
    optimizer.step()
    assert not torch.equal(params[0].detach(), before)


class Slots:
    __slots__ = ("optimizer",)

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self):
        self.optimizer.step()


class Proxy:
    def __init__(self, optimizer):
        self.__dict__["optimizer"] = optimizer

    def __getattr__(self, name):
        return getattr(self.__dict__["optimizer"], name)

    def __setattr__(self, name, value):
        setattr(self.__dict__["optimizer"], name, value)


class Alone:
    """Has what is asked of an optimizer, and is none."""

    def __init__(self, optimizer):
        self.param_groups, self.step = optimizer.param_groups, optimizer.step


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("wrap", [Slots, Proxy, Alone])
def test_wrappers_of_any_make_are_withheld(wrap, made):
    params = oracle.parameters(torch.ones(2))
    optimizer = torch.optim.SGD(params, lr=0.1)
    before = params[0].detach().clone()
    params[0].grad = torch.ones(2)
    outer = wrap(optimizer)
    with withhold(outer, torch.tensor(not made)):
        outer.step()
    assert torch.equal(params[0].detach(), before) is not made
    assert "step" not in vars(optimizer)


class Weakless:
    __slots__ = ("__dict__", "param_groups")

    def step(self):
        pass


@pytest.mark.parametrize("skipped", [None, "yes", torch.tensor([True, False])])
def test_what_cannot_be_withheld_is_said_before_the_step(skipped):
    optimizer = torch.optim.SGD(oracle.parameters(torch.ones(2)), lr=0.1)
    with pytest.raises(ArgumentTypeError, match="expected one flag"), withhold(optimizer, skipped):
        pass
    weakless = Weakless()
    weakless.param_groups = optimizer.param_groups
    with pytest.raises(ArgumentTypeError, match="cannot be replaced"), withhold(weakless, True):
        pass


def test_what_stands_for_a_step_can_be_copied():
    optimizer = torch.optim.SGD(oracle.parameters(torch.ones(2)), lr=0.1)
    with withhold(optimizer, skipped=True):
        assert callable(copy.copy(optimizer.step))
        assert callable(copy.deepcopy(optimizer.step))
