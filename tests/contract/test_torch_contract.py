"""What callers of ``torch.nn.utils`` rely on, held to by the four functions of the same name."""

import inspect
import math
import re

import pytest
import torch
from torch.nn import utils as theirs

import gradclip as ours
import oracle
from gradclip.errors import NonFiniteGradientError
from pairwise import pairwise

ORDERS = (0.5, 1, 1.5, 2, 2.0, 3.0, 4, math.inf, "inf")
FOREACH = (None, True, False)
NAMES = ("clip_grad_norm_", "clip_grad_value_", "get_total_norm", "clip_grads_with_norm_")
WORDS = r"The total norm of order {} for gradients .*is non-finite"

orders = pytest.mark.parametrize("p", ORDERS)
foreach = pytest.mark.parametrize("foreach", FOREACH)


def model(seed=0):
    """A layer with a gradient of norm near 100, so that torch's epsilon does not show."""
    torch.manual_seed(seed)
    layers = torch.nn.Sequential(torch.nn.Linear(10, 10), torch.nn.Linear(10, 4))
    for i, p in enumerate(layers.parameters()):
        p.grad = oracle.randn(*p.shape, seed=seed + i) * 10
    return layers


def close(mine, reference, rel=2e-6):
    for one, other in zip(mine.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=rel, atol=0)


@pytest.mark.smoke
@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_torchs(name):
    def shape(function):
        signature = inspect.signature(function)
        return [(p.name, p.kind, p.default) for p in signature.parameters.values()]

    assert shape(getattr(ours, name)) == shape(getattr(theirs, name))


@pairwise(max_norm=[0.5, 2, 1e9], foreach=FOREACH, p=ORDERS)
def test_clip_grad_norm(max_norm, foreach, p):
    mine, reference = model(), model()
    before = oracle.gradients(mine.parameters())
    norm = ours.clip_grad_norm_(mine.parameters(), max_norm, p, foreach=foreach)
    expected = theirs.clip_grad_norm_(reference.parameters(), max_norm, p, foreach=foreach)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    close(mine, reference)
    after = oracle.gradients(mine.parameters())
    assert all(a is b for a, b in zip(after, before, strict=True)), "not in place"
    oracle.assert_bounded(after, max_norm, float(p))


@orders
@foreach
def test_gradients_keep_their_direction(foreach, p):
    layer = torch.nn.Linear(10, 10)
    layer.weight.grad = torch.arange(1.0, 101).view(10, 10)
    layer.bias.grad = torch.ones(10).div(1000)
    before = [g.clone() for g in oracle.gradients(layer.parameters())]
    norm = ours.clip_grad_norm_(layer.parameters(), 2, norm_type=p, foreach=foreach)
    assert oracle.relative(norm, oracle.norm(before, float(p))) <= 1e-6
    factors = torch.cat(
        [
            (b / a).reshape(-1)
            for a, b in zip(before, oracle.gradients(layer.parameters()), strict=True)
        ]
    )
    assert factors.std() <= 2e-7 * factors.mean()
    small = [g.clone().div_(1e3 * oracle.norm(before, float(p))) for g in before]
    layer.weight.grad, layer.bias.grad = (g.clone() for g in small)
    ours.clip_grad_norm_(layer.parameters(), 2, norm_type=p, foreach=foreach)
    assert torch.equal(layer.weight.grad, small[0])
    assert torch.equal(layer.bias.grad, small[1])


@foreach
@pytest.mark.parametrize("value", [0, 0.3, 2.5, 1000])
def test_clip_grad_value(value, foreach):
    mine, reference = model(), model()
    assert ours.clip_grad_value_(mine.parameters(), value, foreach=foreach) is None
    theirs.clip_grad_value_(reference.parameters(), value, foreach=foreach)
    close(mine, reference, rel=0)


@orders
@foreach
def test_get_total_norm(foreach, p):
    grads = oracle.gradients(model().parameters())
    before = [oracle.bits(g) for g in grads]
    norm = ours.get_total_norm(grads, p, foreach=foreach)
    torch.testing.assert_close(norm, theirs.get_total_norm(grads, p), rtol=1e-6, atol=0)
    assert [oracle.bits(g) for g in grads] == before
    alone = ours.get_total_norm(grads[0], p, foreach=foreach)
    torch.testing.assert_close(alone, theirs.get_total_norm(grads[0], p), rtol=1e-6, atol=0)


@pairwise(max_norm=[0.5, 1e9], foreach=FOREACH, p=ORDERS)
def test_measuring_and_scaling_apart_is_clipping(max_norm, foreach, p):
    apart, reference, whole = model(), model(), model()
    total = ours.get_total_norm(oracle.gradients(apart.parameters()), p, foreach=foreach)
    assert ours.clip_grads_with_norm_(apart.parameters(), max_norm, total, foreach) is None
    theirs.clip_grads_with_norm_(reference.parameters(), max_norm, total)
    close(apart, reference)
    ours.clip_grad_norm_(whole.parameters(), max_norm, p)
    close(apart, whole, rel=3e-7)
    oracle.assert_bounded(oracle.gradients(apart.parameters()), max_norm, float(p))


def test_the_given_total_norm_decides():
    mine, reference = model(), model()
    for module, library in ((mine, ours), (reference, theirs)):
        library.clip_grads_with_norm_(module.parameters(), 2.0, torch.tensor(8e3))
    close(mine, reference)
    before = oracle.look(mine.parameters())
    ours.clip_grads_with_norm_(mine.parameters(), 2.0, torch.tensor(2.0))
    oracle.assert_untouched(mine.parameters(), before)


@pytest.mark.parametrize("total", [math.inf, math.nan])
def test_a_nonfinite_total_norm_writes_nothing(total):
    """torch writes 0 or NaN into every gradient. pytorch#46849."""
    module = model()
    before = oracle.look(module.parameters())
    ours.clip_grads_with_norm_(module.parameters(), 1.0, torch.tensor(total))
    oracle.assert_untouched(module.parameters(), before)


@foreach
def test_parameters_may_be_a_generator_a_list_or_one_tensor(foreach):
    kinds = {
        "generator": lambda m: (p for p in m.parameters()),
        "list": lambda m: list(m.parameters()),
        "tuple": lambda m: tuple(m.parameters()),
        "iterator": lambda m: iter(list(m.parameters())),
        "dict values": lambda m: dict(m.named_parameters()).values(),
    }
    expected = model()
    norm = theirs.clip_grad_norm_(expected.parameters(), 1.0)
    for make in kinds.values():
        module = model()
        mine = ours.clip_grad_norm_(make(module), 1.0, foreach=foreach)
        torch.testing.assert_close(mine, norm, rtol=1e-6, atol=0)
        close(module, expected)
    for function in (ours.clip_grad_norm_, ours.clip_grad_value_):
        single = oracle.parameter(torch.tensor([0.0, -4.0]))
        function(single, 2.0, foreach=foreach)
        assert single.grad.tolist() == pytest.approx([0.0, -2.0], rel=1e-6)
    single = oracle.parameter(torch.tensor([0.0, -4.0]))
    ours.clip_grads_with_norm_(single, 2.0, torch.tensor(4.0), foreach)
    assert single.grad.tolist() == pytest.approx([0.0, -2.0], rel=1e-6)


def test_get_total_norm_takes_any_iterable():
    grads = [torch.tensor([3.0]), torch.tensor([4.0])]
    for tensors in (grads, tuple(grads), (g for g in grads), iter(grads)):
        assert float(ours.get_total_norm(tensors)) == 5.0


@foreach
def test_none_gradients_are_skipped(foreach):
    params = oracle.parameters(torch.tensor([3.0, 0.0]), None, torch.tensor([[4.0]]))
    assert float(ours.clip_grad_norm_(params, 1.0, foreach=foreach)) == 5.0
    assert params[1].grad is None
    ours.clip_grad_value_(params, 0.1, foreach=foreach)
    assert params[0].grad.tolist() == pytest.approx([0.1, 0.0])


def test_nothing_to_clip_is_zero():
    for nothing in ([], (), iter([]), (p for p in [])):
        norm = ours.clip_grad_norm_(nothing, 1.0)
        assert (norm.ndim, float(norm)) == (0, 0.0)
    assert ours.clip_grad_value_([], 1.0) is None
    assert float(ours.get_total_norm([])) == 0.0
    assert ours.clip_grads_with_norm_([], 1.0, torch.tensor(2.0)) is None


@pairwise(bad=[math.inf, -math.inf, math.nan], p=[1, 2.0, math.inf, "inf"], foreach=FOREACH)
def test_error_if_nonfinite(bad, p, foreach):
    params = oracle.parameters(torch.tensor([1.0, 2.0]), torch.tensor([bad, 2.0]), None)
    before = oracle.look(params)
    words = WORDS.format(float(p))
    with pytest.raises(RuntimeError) as caught:
        ours.clip_grad_norm_(params, 1.0, p, error_if_nonfinite=True, foreach=foreach)
    assert isinstance(caught.value, NonFiniteGradientError)
    assert re.search(words, str(caught.value).splitlines()[0])
    with pytest.raises(RuntimeError, match=words):
        ours.get_total_norm(oracle.gradients(params), p, error_if_nonfinite=True, foreach=foreach)
    norm = ours.clip_grad_norm_(params, 1.0, p, error_if_nonfinite=False, foreach=foreach)
    assert not math.isfinite(float(norm))
    oracle.assert_untouched(params, before)
    assert not math.isfinite(float(ours.get_total_norm(oracle.gradients(params), p)))


def test_error_if_nonfinite_lets_finite_gradients_pass():
    params = oracle.parameters(torch.tensor([3e38, 3e38]), torch.tensor([6e4], dtype=torch.float16))
    ours.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    oracle.assert_bounded(oracle.gradients(params), 1.0)


@foreach
@orders
def test_mixed_dtypes(p, foreach):
    params = oracle.parameters(
        *(g for d in (torch.bfloat16, torch.float16, torch.float32) for g in oracle.ragged(1, d))
    )
    truth = oracle.norm(oracle.gradients(params), float(p))
    norm = ours.clip_grad_norm_(params, truth / 2, p, foreach=foreach)
    assert oracle.relative(norm, truth) <= 1e-6
    oracle.assert_bounded(oracle.gradients(params), truth / 2, float(p))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex64, torch.float32),
        (torch.complex128, torch.float64),
    ],
    ids=str,
)
def test_the_norm_is_one_number_without_history(dtype, expected):
    grad = torch.ones(4, dtype=dtype)
    for norm in (ours.clip_grad_norm_(oracle.parameter(grad), 9.0), ours.get_total_norm([grad])):
        assert isinstance(norm, torch.Tensor)
        assert (norm.ndim, norm.dtype, norm.device.type) == (0, expected, "cpu")
        assert not norm.requires_grad
        assert float(norm) == 2.0


@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradients_that_have_a_graph():
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    (weight.pow(3).sum()).backward(create_graph=True)
    assert weight.grad.requires_grad
    truth = oracle.norm([weight.grad])
    norm = ours.clip_grad_norm_([weight], 1.0)
    assert oracle.relative(norm, truth) <= 1e-6
    assert not norm.requires_grad
    oracle.assert_bounded([weight.grad], 1.0)


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_every_gradient_mode(context):
    module = model()
    with context():
        ours.clip_grad_norm_(module.parameters(), 1.0)
        assert torch.is_grad_enabled() == (context is torch.enable_grad)
        ours.clip_grad_value_(module.parameters(), 0.01)
    assert all(float(g.abs().max()) <= 0.01 for g in oracle.gradients(module.parameters()))


def test_repeated_training_steps_follow_torch():
    mine, reference = model(3), model(3)
    reference.load_state_dict(mine.state_dict())
    for module, library in ((mine, ours), (reference, theirs)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
        for step in range(20):
            optimizer.zero_grad()
            loss = (module(oracle.randn(8, 10, seed=step)).square().mean() - 3).square() * 100
            loss.backward()
            library.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
    for one, other in zip(mine.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
