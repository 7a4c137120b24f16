"""Which gradients count: names, patterns, groups, parameters that come, go and are replaced."""

import itertools
import math
import warnings

import pytest
import torch

import oracle
from gradclip import GradientClipper, NormClip, ObserveClip, ValueClip, clip_grad_norm_
from gradclip.clipping.collect.sources import OptimizerParameters
from gradclip.errors import ArgumentValueError

backends = pytest.mark.parametrize("backend", oracle.BACKENDS)


def net():
    """Six parameters: a.weight, a.bias, b.0.weight, b.0.bias, head.weight, head.bias."""
    parts = {"a": torch.nn.Linear(3, 4), "b": torch.nn.ModuleList([torch.nn.Linear(4, 4)])}
    model = torch.nn.Module()
    for name, part in (parts | {"head": torch.nn.Linear(4, 2)}).items():
        model.add_module(name, part)
    fill(model)
    return model


def fill(model, scale=10.0):
    for i, p in enumerate(model.parameters()):
        p.grad = oracle.randn(*p.shape, seed=i) * scale


def part(model, *prefixes):
    return [p.grad for n, p in model.named_parameters() if n.startswith(prefixes)]


def check_groups(clipper, model):
    """``a`` is limited to 1, ``b`` to 2 (by the largest element), ``head`` is left alone."""
    fill(model)
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    alone = oracle.look(model.head.parameters())
    result = clipper.clip()
    oracle.assert_untouched(model.head.parameters(), alone)
    oracle.assert_bounded(part(model, "a."), 1.0)
    oracle.assert_bounded(part(model, "b."), 2.0, math.inf)
    old_a = [g for n, g in before.items() if n.startswith("a.")]
    old_b = [g for n, g in before.items() if n.startswith("b.")]
    a, b = result.groups["a.*"], result.groups["b.*"]
    assert oracle.relative(a.norm_pre, oracle.norm(old_a)) <= 1e-6
    assert oracle.relative(b.norm_pre, oracle.norm(old_b, math.inf)) <= 1e-6
    assert (float(a.threshold), float(b.threshold)) == (1.0, 2.0)
    oracle.assert_scaled(old_a, part(model, "a."), float(a.coefficient))
    oracle.assert_scaled(old_b, part(model, "b."), float(b.coefficient))
    assert float(result.coefficient) == min(float(a.coefficient), float(b.coefficient))
    assert bool(result.clipped)


GROUPS = {"a.*": 1.0, "b.*": NormClip(max_norm=2.0, norm_type=math.inf), "*": None}


class Wrapper(torch.nn.Module):
    """What DDP (``module``), ``torch.compile`` (``_orig_mod``) and FSDP put before every name."""

    def __init__(self, inner, prefix):
        super().__init__()
        self.add_module(prefix, inner)


@pytest.mark.smoke
@backends
def test_groups_by_module(backend):
    model = net()
    check_groups(GradientClipper(model, GROUPS, backend=backend), model)


def test_groups_by_pairs():
    model = net()
    check_groups(GradientClipper(model.named_parameters(), GROUPS), model)
    check_groups(GradientClipper(list(model.named_parameters()), GROUPS), model)


def test_groups_by_the_names_in_the_optimizer():
    model = net()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    check_groups(GradientClipper(optimizer, GROUPS), model)


def test_groups_by_an_optimizer_with_its_module():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    check_groups(GradientClipper(OptimizerParameters(optimizer, model), GROUPS), model)


def test_patterns_are_for_the_names_of_the_module_where_the_optimizer_has_relative_ones():
    model = net()
    optimizer = torch.optim.SGD([*model.b.named_parameters()], lr=0.1)
    clipper = GradientClipper(OptimizerParameters(optimizer, model), {"b.*": 0.5, "*": None})
    clipper.clip()
    oracle.assert_bounded([p.grad for p in model.b.parameters()], 0.5)


def test_a_pattern_may_be_for_what_another_optimizer_steps():
    model = net()
    policy = {"a.*": 1.0, "b.*": 0.5, "*": None}
    for part, limit in ((model.a, 1.0), (model.b, 0.5)):
        optimizer = torch.optim.SGD(part.parameters(), lr=0.1)
        GradientClipper(OptimizerParameters(optimizer, model), policy).clip()
        oracle.assert_bounded([p.grad for p in part.parameters()], limit)
    with pytest.raises(ArgumentValueError, match=r"the pattern 'bb\.\*' of policy matches no"):
        GradientClipper(OptimizerParameters(optimizer, model), {"bb.*": 1.0, "*": 1.0})


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_what_is_stepped_in_the_backward_pass_is_refused():
    from torch.distributed.optim import _apply_optimizer_in_backward  # noqa: PLC0415

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    with pytest.raises(ArgumentValueError, match="inside the backward pass"):
        GradientClipper(optimizer, 1.0)


@pytest.mark.parametrize(
    "prefixes",
    [["module"], ["_orig_mod"], ["_fsdp_wrapped_module"], ["_orig_mod", "module"], ["module"] * 2],
)
def test_the_prefixes_of_wrappers_are_stripped(prefixes):
    model = net()
    outer = model
    for prefix in prefixes:
        outer = Wrapper(outer, prefix)
    assert all(n.startswith(prefixes[-1]) for n, _ in outer.named_parameters())
    check_groups(GradientClipper(outer, GROUPS), model)
    check_groups(GradientClipper(list(outer.named_parameters()), GROUPS), model)
    optimizer = torch.optim.SGD(outer.named_parameters(), lr=0.1)
    check_groups(GradientClipper(optimizer, GROUPS), model)
    optimizer = torch.optim.SGD(outer.parameters(), lr=0.1)
    check_groups(GradientClipper(OptimizerParameters(optimizer, outer), GROUPS), model)


def test_the_prefix_inside_a_name_is_stripped():
    model = net()
    model.b[0] = Wrapper(model.b[0], "_fsdp_wrapped_module")
    groups = {"b.0.weight": 1.0, "*": None}
    before = oracle.norm([model.b[0]._fsdp_wrapped_module.weight.grad])
    norm = GradientClipper(model, groups).clip().norm_pre
    assert oracle.relative(norm, before) <= 1e-6


@backends
def test_the_first_match_wins(backend):
    model = net()
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    groups = {"a.weight": 1.0, "a.*": None, "*.bias": 0.5, "*": ObserveClip()}
    result = GradientClipper(model, groups, backend=backend).clip()
    now = dict(model.named_parameters())
    oracle.assert_bounded([now["a.weight"].grad], 1.0)
    oracle.assert_bounded([now["b.0.bias"].grad, now["head.bias"].grad], 0.5)
    for name in ("a.bias", "b.0.weight", "head.weight"):
        assert torch.equal(now[name].grad, before[name]), name
    counted = [g for n, g in before.items() if n != "a.bias"]
    assert oracle.relative(result.norm_pre, oracle.norm(counted)) <= 1e-6
    assert not bool(result.groups["*"].clipped)
    assert bool(result.groups["*.bias"].clipped)


@backends
def test_each_group_decides_for_itself(backend):
    params = oracle.parameters(torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4]))
    pairs = list(zip(("big", "small"), params, strict=True))
    before = oracle.look(params)
    result = GradientClipper(pairs, {"big": 1.0, "small": 1.0}, backend=backend).clip()
    oracle.assert_untouched(params[1:], before[1:])
    oracle.assert_bounded(oracle.gradients(params[:1]), 1.0)
    assert oracle.relative(result.norm_pre, math.sqrt(25.25)) <= 1e-6
    assert [bool(result.groups[n].clipped) for n in ("big", "small")] == [True, False]
    assert float(result.groups["small"].coefficient) == 1.0


@backends
def test_value_and_norm_together(backend):
    params = oracle.parameters(torch.tensor([3.0, 4.0]), torch.tensor([-9.0, 0.25]))
    pairs = list(zip(("n", "v"), params, strict=True))
    result = GradientClipper(
        pairs, {"v": ValueClip(clip_value=2.0), "n": 1.0}, backend=backend
    ).clip()
    oracle.assert_bounded([params[0].grad], 1.0)
    assert params[1].grad.tolist() == [-2.0, 0.25]
    assert float(result.groups["v"].coefficient) == 1.0
    assert bool(result.groups["v"].clipped)


def test_a_left_alone_parameter_may_be_anything():
    integers = oracle.parameter(torch.ones(3, dtype=torch.int64))
    pairs = [("w", oracle.parameter(torch.tensor([3.0, 4.0]))), ("counter", integers)]
    result = GradientClipper(pairs, {"counter": None, "*": 1.0}).clip()
    assert float(result.norm_pre) == 5.0
    assert integers.grad.tolist() == [1, 1, 1]


def test_a_nan_in_a_left_alone_parameter_is_not_ours():
    params = oracle.parameters(torch.tensor([3.0, 4.0]), torch.tensor([math.nan, 1.0]))
    pairs = list(zip(("w", "frozen"), params, strict=True))
    before = oracle.look(params[1:])
    result = GradientClipper(pairs, {"frozen": None, "*": 1.0}).clip()
    assert float(result.norm_pre) == 5.0
    assert int(result.nonfinite) == 0
    assert not bool(result.skipped)
    oracle.assert_untouched(params[1:], before)


def test_tied_weights_count_once_under_any_name():
    shared = oracle.parameter(torch.tensor([3.0, 4.0]))
    result = GradientClipper([("embedding", shared), ("head", shared)], 1.0).clip()
    assert float(result.norm_pre) == 5.0
    oracle.assert_bounded([shared.grad], 1.0)
    model = torch.nn.Module()
    model.one = torch.nn.Linear(2, 2, bias=False)
    model.two = model.one
    model.one.weight.grad = torch.full((2, 2), 5.0)
    assert float(GradientClipper(model, 1.0).clip().norm_pre) == 10.0


def test_gradients_are_read_again_at_every_call():
    params = oracle.parameters(torch.tensor([3.0, 4.0]), torch.tensor([0.0]))
    clipper = GradientClipper((p for p in params), 100.0)
    assert float(clipper.clip().norm_pre) == 5.0
    params[0].grad = torch.tensor([6.0, 8.0])
    assert float(clipper.clip().norm_pre) == 10.0
    params[0].grad = None
    params[1].grad = torch.tensor([7.0])
    assert float(clipper.clip().norm_pre) == 7.0
    params[0].data = params[0].data.double()
    params[0].grad = torch.tensor([1e-9, 24.0], dtype=torch.float64)
    result = clipper.clip()
    assert (float(result.norm_pre), result.norm_pre.dtype) == (25.0, torch.float64)
    params[1].data = params[1].data.bfloat16()
    params[0].grad, params[1].grad = None, torch.tensor([500.0], dtype=torch.bfloat16)
    result = clipper.clip()
    assert (float(result.norm_pre), bool(result.clipped)) == (500.0, True)
    assert float(params[1].grad) == pytest.approx(100.0, rel=4e-3)


def test_gradients_moved_in_memory_are_found():
    model = net()
    clipper = GradientClipper(model, 1.0)
    for step in range(5):
        model.zero_grad(set_to_none=True)
        kept = [torch.empty(step + 1) for _ in range(step)]
        fill(model, 1.0 + step)
        truth = oracle.norm(oracle.gradients(model.parameters()))
        assert oracle.relative(clipper.clip().norm_pre, truth) <= 1e-6
        del kept


def test_parameters_replaced_in_the_module_are_found():
    model = net()
    clipper = GradientClipper(model, GROUPS)
    check_groups(clipper, model)
    model.a.weight = torch.nn.Parameter(torch.zeros(5, 5))
    model.b.append(torch.nn.Linear(2, 2))
    check_groups(clipper, model)
    one = GradientClipper(model, 1.0)
    one.clip()
    model.head = torch.nn.Linear(3, 3)
    fill(model)
    one.clip()
    oracle.assert_bounded(oracle.gradients(model.parameters()), 1.0)


def test_parameters_replaced_in_the_optimizer_are_found():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = GradientClipper(optimizer, 1.0)
    clipper.clip()
    replacement = oracle.parameter(torch.full((9,), 100.0))
    optimizer.param_groups[0]["params"][0] = replacement
    truth = oracle.norm([g for p in optimizer.param_groups[0]["params"] for g in [p.grad]])
    assert truth > 300
    assert oracle.relative(clipper.clip().norm_pre, truth) <= 1e-6
    oracle.assert_bounded(oracle.gradients(optimizer.param_groups[0]["params"]), 1.0)


def test_add_param_group():
    model, extra = net(), torch.nn.Linear(3, 3)
    fill(extra)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = GradientClipper(optimizer, 1.0)
    clipper.clip()
    optimizer.add_param_group({"params": list(extra.parameters())})
    clipper.clip()
    oracle.assert_bounded([*part(model, ""), *part(extra, "")], 1.0)
    named = torch.optim.SGD(model.named_parameters(), lr=0.1)
    grouped = GradientClipper(named, {"a.*": 1.0, "*": 2.0})
    named.add_param_group({"params": [(f"a.new.{n}", p) for n, p in extra.named_parameters()]})
    fill(model)
    fill(extra)
    grouped.clip()
    oracle.assert_bounded([*part(model, "a."), *part(extra, "")], 1.0)
    oracle.assert_bounded(part(model, "b.", "head."), 2.0)


def test_only_the_optimizers_parameters_are_clipped():
    model = net()
    optimizer = torch.optim.SGD(model.a.parameters(), lr=0.1)
    before = oracle.look(model.head.parameters())
    truth = oracle.norm(part(model, "a."))
    for params in (optimizer, OptimizerParameters(optimizer, model)):
        fill(model.a)
        assert oracle.relative(GradientClipper(params, 1e9).clip().norm_pre, truth) <= 1e-6
    GradientClipper(OptimizerParameters(optimizer, model), 1.0).clip()
    oracle.assert_bounded(part(model, "a."), 1.0)
    oracle.assert_untouched(model.head.parameters(), before)


@backends
def test_interleaved_views_that_share_no_byte_are_legal(backend):
    base = oracle.randn(24)
    grid = oracle.randn(6, 8)
    views = [base[::2], base[1::2], grid[:, :3], grid[:, 3:5], grid[::2, 5:], grid[1::2, 5:]]
    params = oracle.parameters(*views)
    truth = oracle.norm([base, grid])
    result = GradientClipper(params, 1.0, backend=backend).clip()
    assert oracle.relative(result.norm_pre, truth) <= 1e-6
    assert oracle.assert_bounded([base, grid], 1.0) >= 1 - 2e-6


@backends
def test_contiguous_windows_of_one_flat_buffer_are_legal(backend):
    flat = oracle.randn(1000)
    cuts = [0, 1, 8, 8, 135, 500, 1000]
    windows = [flat[i:j] for i, j in itertools.pairwise(cuts)]
    truth = oracle.norm([flat])
    result = GradientClipper(oracle.parameters(*windows), 1.0, backend=backend).clip()
    assert oracle.relative(result.norm_pre, truth) <= 1e-6
    oracle.assert_bounded([flat], 1.0)


def test_every_gradient_none_warns_once():
    params = oracle.parameters(None, None)
    clipper = GradientClipper(params, 1.0)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for _ in range(4):
            assert float(clipper.clip().norm_pre) == 0.0
    assert len(heard) == 1
    assert "grad" in str(heard[0].message)
    params[0].grad = torch.tensor([3.0, 4.0])
    assert float(clipper.clip().norm_pre) == 5.0


def test_nothing_at_all_is_legal():
    for nothing in ([], iter(()), torch.nn.Identity(), (p for p in ())):
        result = GradientClipper(nothing, 1.0).clip()
        assert float(result.norm_pre) == 0.0
        assert not bool(result.clipped)
        assert float(result.coefficient) == 1.0
        assert result.to_host().nonfinite == 0


def test_an_iterator_is_read_once():
    params = oracle.parameters(torch.tensor([3.0]), torch.tensor([4.0]))
    reads = []

    def generator():
        for p in params:
            reads.append(p)
            yield p

    clipper = GradientClipper(generator(), 1.0)
    clipper.clip()
    clipper.clip()
    assert len(reads) == 2
    assert float(clip_grad_norm_(generator(), 1.0)) == pytest.approx(1.0, rel=1e-6)
    assert len(reads) == 4


def test_the_warning_of_no_gradients_points_at_the_caller():
    weight = torch.nn.Parameter(torch.zeros(2))
    clipper = GradientClipper([weight], 1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        clip_grad_norm_([weight], 1.0)
        clipper.clip()
        clipper.clip()  # once is enough
    assert [warning.filename for warning in caught] == [__file__, __file__]
    assert all("every gradient is None" in str(warning.message) for warning in caught)
