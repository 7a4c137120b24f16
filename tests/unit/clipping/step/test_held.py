"""The held step: who calls it, who comes past it, what it leaves behind."""

import inspect
import warnings

import pytest
import torch
from torch import nn

from gradclip import ObserveClip, attach, withhold
from gradclip.errors import ArgumentTypeError, ArgumentValueError


def trainee(**options):
    weight = nn.Parameter(torch.zeros(2))
    return weight, torch.optim.SGD([weight], lr=1.0, momentum=0.9, **options)


def give(weight, value=3.0):
    weight.grad = torch.full((2,), value)


@pytest.mark.parametrize("when", ["before", "after", "both"])
def test_schedulers_wrap_it_and_are_wrapped(when):
    weight, optimizer = trainee()
    if when != "after":
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before = dict(vars(optimizer))
    handle = attach(optimizer, 1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    with warnings.catch_warnings(action="error"):
        give(weight, torch.nan)
        optimizer.step()
        scheduler.step()  # of a step that was withheld it hears too
    assert optimizer.param_groups[0]["lr"] == 0.5
    give(weight)
    optimizer.step()
    assert weight.tolist() == pytest.approx([-0.5 / 2**0.5] * 2, rel=1e-5)
    handle.remove()
    if when == "before":
        assert vars(optimizer)["step"] == before["step"]
    give(weight, 1.0)
    optimizer.step()  # what was made over it passes through
    assert handle.clipper.step == 2


def test_under_what_came_over_it_it_can_be_used_again():
    weight, optimizer = trainee()
    attach(optimizer, 1.0).remove()
    assert not {"step", "__getstate__"} & vars(optimizer).keys()
    first = attach(optimizer, 1.0)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    first.remove()
    second = attach(optimizer, 0.5)
    give(weight)
    optimizer.step()
    assert second.clipper.step == 1
    assert first.clipper.step == 0
    assert float(second.last.norm_post) == pytest.approx(0.5)


@pytest.mark.parametrize("how", ["bound", "class"])
@pytest.mark.parametrize("within", ["attach", "withhold"])
def test_a_call_that_comes_past_it_is_refused(how, within):
    weight, optimizer = trainee()
    taken = optimizer.step if how == "bound" else lambda: type(optimizer).step(optimizer)
    give(weight)
    if within == "attach":
        handle = attach(optimizer, 1.0)
        with pytest.raises(ArgumentValueError, match=r"SGD\.step was called past gradclip\.attach"):
            taken()
        handle.remove()
    else:
        with (
            withhold(optimizer, skipped=True),
            pytest.raises(ArgumentValueError, match=r"called past gradclip\.withhold"),
        ):
            taken()
    assert weight.tolist() == [0.0, 0.0]
    taken()
    assert weight.tolist() == [-3.0, -3.0]


def test_it_looks_like_the_step_that_it_replaces():
    _, optimizer = trainee()
    signature, name = inspect.signature(optimizer.step), optimizer.step.__qualname__
    attach(optimizer, 1.0)
    assert inspect.ismethod(optimizer.step)
    assert optimizer.step.__self__ is optimizer
    assert inspect.signature(optimizer.step) == signature
    assert optimizer.step.__qualname__ == name


def test_hooks_of_others_run_for_steps_that_are_made_and_after_clipping():
    weight, optimizer = trainee()
    seen = []
    hook = optimizer.register_step_pre_hook(lambda o, *_: seen.append(weight.grad.tolist()))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    with pytest.warns(UserWarning, match=r"SGD has step hooks \(.*<lambda>\).*after gradclip"):
        attach(optimizer, 1.0)
    give(weight)
    optimizer.step()
    give(weight, torch.inf)
    optimizer.step()
    assert seen == [pytest.approx([0.5**0.5] * 2, rel=1e-5), "after"]
    hook.remove()
    with warnings.catch_warnings(action="error"):
        attach(optimizer, ObserveClip())  # gradclip's own hook is none of others


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("where", ["pre", "post"])
def test_an_error_in_a_hook_leaves_nothing_lent(error, where):
    """Ctrl-C behind our hook left the loss scale of one step in the next."""
    weight, optimizer = trainee(fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    handle = attach(optimizer, 1.0)

    def fail(*_):
        raise error

    register = getattr(optimizer, f"register_step_{where}_hook")
    for expected in (False, True):
        hook = register(fail) if not expected else None
        give(weight, 3.0 * 1024)
        if hook is not None:
            with pytest.raises(error):
                scaler.step(optimizer)
            hook.remove()
            assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()
        else:
            scaler.step(optimizer)
        scaler.update()
        assert float(handle.last.norm_pre) == pytest.approx(18**0.5)


def test_a_closure_that_is_evaluated_again_is_refused():
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            loss = closure()
            super().step()
            return loss

    weight = nn.Parameter(torch.zeros(2))
    optimizer = Twice([weight], lr=1.0)
    attach(optimizer, 1.0)
    give(weight)
    with pytest.raises(ArgumentTypeError, match="Twice evaluates its closure more than once"):
        optimizer.step(lambda: torch.ones(()))
    assert weight.tolist() == [0.0, 0.0]


def test_steps_of_its_own_within_a_step_are_part_of_it():
    class Halves(torch.optim.SGD):
        def __init__(self, params):
            super().__init__(params, lr=0.5)
            self.depth = 0

        def step(self, closure=None):
            self.depth += 1
            if self.depth == 1:
                self.step()
            super().step()
            self.depth -= 1

    weight = nn.Parameter(torch.zeros(2))
    optimizer = Halves([weight])
    handle = attach(optimizer, 1.0)
    give(weight)
    optimizer.step()
    assert handle.clipper.step == 1
    assert weight.tolist() == pytest.approx([-(0.5**0.5)] * 2, rel=1e-5)


@pytest.mark.filterwarnings("ignore")  # of torch, about itself
def test_a_compiled_step_has_the_graphs_that_it_has_alone():
    """torch.compile(optimizer.step): the clip is a graph break, and the step is compiled."""
    from torch._dynamo.utils import counters  # noqa: PLC0415 - it takes seconds

    found = []
    for clips in (False, True):
        torch._dynamo.reset()
        counters.clear()
        weight, optimizer = trainee(foreach=True)
        before = torch.compile(optimizer.step, backend="eager")
        handle = attach(optimizer, 1.0) if clips else None
        step = torch.compile(optimizer.step, backend="eager")
        for value in (3.0, 3.0, torch.nan, 3.0) if clips else (0.5**0.5,) * 3:
            give(weight, value)
            step()
        found.append((weight.tolist(), counters["stats"]["unique_graphs"]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1] == found[1][1]
    assert handle.clipper.step == 4
    with pytest.raises(ArgumentValueError, match=r"torch\.compile\(optimizer\.step\)"):
        before()
