"""Policies that give each tensor, or each row, a ceiling: what a new policy needs is one class."""

import copy
import pickle
from importlib.util import find_spec
from typing import ClassVar, Literal

import pytest
import torch

from gradclip import GradientClipper
from gradclip.clipping import Policy
from gradclip.clipping.policies import Decision, PolicyState
from gradclip.config import Ceiling
from gradclip.errors import ArgumentValueError, StateError

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

BACKENDS = ["foreach", "reference"] + ["triton"] * (find_spec("triton") is not None)


class TensorClip(Policy):
    """Each tensor by itself."""

    scope: ClassVar[Literal["tensor"]] = "tensor"
    clip_mode: Literal["test-tensor"] = "test-tensor"
    max_norm: Ceiling

    def decide(self, seen, state):
        ceiling_S = torch.full_like(seen.norms_S, self.max_norm)
        return Decision(ceiling_S, ceiling_S)


class RowClip(TensorClip):
    """Each row of a matrix by itself."""

    scope: ClassVar[Literal["unit"]] = "unit"


class RunningMean(Policy):
    """Clips to the mean of the norms of earlier steps: a policy with history."""

    clip_mode: Literal["test-mean"] = "test-mean"

    def initial_state(self, scopes):
        zeros_S = torch.zeros(len(scopes.names), dtype=torch.float64, device=scopes.device)
        return PolicyState({"sum": zeros_S}, {"count": torch.tensor(0, device=scopes.device)})

    def decide(self, seen, state):
        sum_S, count = state.per_scope["sum"], state.shared["count"]
        mean_S = torch.where(count > 0, sum_S / count, torch.inf)
        return Decision(
            mean_S, mean_S, PolicyState({"sum": sum_S + seen.norms_S}, {"count": count + 1})
        )


def parameter(gradient):
    tensor = torch.nn.Parameter(torch.zeros_like(gradient))
    tensor.grad = gradient
    return tensor


@pytest.mark.smoke
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_tensor_has_its_own_coefficient(backend):
    a, b = parameter(torch.tensor([3.0, 4.0])), parameter(torch.tensor([0.3, 0.4]))
    result = GradientClipper([a, b], TensorClip(max_norm=1.0), backend=backend).clip()
    torch.testing.assert_close(a.grad, torch.tensor([0.6, 0.8]))
    assert torch.equal(b.grad, torch.tensor([0.3, 0.4]))
    assert result.norms_S.tolist() == pytest.approx([5.0, 0.5])
    assert result.scope_names == ("parameters[0]", "parameters[1]")
    assert float(result.norm_pre) == pytest.approx((25 + 0.25) ** 0.5)
    assert float(result.norm_post) == pytest.approx((1 + 0.25) ** 0.5)
    assert float(result.coefficient) == pytest.approx(0.2)


@pytest.mark.smoke
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_row_has_its_own_coefficient(backend):
    matrix = parameter(torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]))
    vector = parameter(torch.tensor([6.0, 8.0]))
    result = GradientClipper(
        [("m", matrix), ("v", vector)], RowClip(max_norm=1.0), backend=backend
    ).clip()
    torch.testing.assert_close(matrix.grad, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
    torch.testing.assert_close(vector.grad, torch.tensor([0.6, 0.8]))
    assert result.norms_S.tolist() == pytest.approx([5.0, 0.5, 0.0, 10.0])
    assert result.scope_names == ("m[0]", "m[1]", "m[2]", "v[0]")


def test_a_non_finite_row_skips_everything_and_counts_one_tensor():
    matrix = parameter(torch.tensor([[1.0, 2.0], [float("nan"), 1.0]]))
    result = GradientClipper([matrix], RowClip(max_norm=1.0)).clip()
    assert bool(result.skipped)
    assert int(result.nonfinite) == 1
    assert torch.equal(matrix.grad, torch.zeros(2, 2))


@pytest.mark.smoke
def test_history_sees_finite_steps_only_and_survives_a_restart():
    def run(clipper, weight, norms):
        coefficients = []
        for norm in norms:
            weight.grad = torch.tensor([norm])
            coefficients.append(float(clipper.clip().coefficient))
        return coefficients

    norms = [1.0, 3.0, float("nan"), 8.0, float("inf"), 2.0, 40.0]
    weight = torch.nn.Parameter(torch.zeros(1))
    whole = run(GradientClipper([weight], RunningMean()), weight, norms)
    assert whole == pytest.approx([1, 1 / 3, 0, 2 / 8, 0, 1, 3.5 / 40], rel=1e-5)

    first = GradientClipper([weight], RunningMean())
    start = run(first, weight, norms[:4])
    second = GradientClipper([weight], RunningMean())
    second.load_state_dict(first.state_dict())
    assert start + run(second, weight, norms[4:]) == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_matrix_without_rows_is_no_obstacle(backend, dtype):
    shapes = [(5, 4), (0, 4), (5, 4)]
    weights = [parameter(torch.full(shape, 2.0)) for shape in shapes]
    weights[1] = parameter(torch.zeros(0, 4, dtype=dtype))
    result = GradientClipper(weights, RowClip(max_norm=1.0), backend=backend).clip()
    assert len(result.norms_S) == 10
    for weight in (weights[0], weights[2]):
        torch.testing.assert_close(weight.grad, torch.full((5, 4), 0.5))
    assert weights[1].grad.shape == (0, 4)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_clipper_can_be_copied_with_its_history(way):
    weight = parameter(torch.tensor([3.0, 4.0]))
    clipper = GradientClipper([weight], RunningMean())
    clipper.clip()
    other = way(clipper)
    for each in (clipper, other):
        (tensor,) = each._engine.source.tensors()
        tensor.grad = torch.tensor([6.0, 8.0])
        assert float(each.clip().norm_post) == pytest.approx(5.0)


class RunningMeans(RunningMean):
    """Of each tensor by itself."""

    scope: ClassVar[Literal["tensor"]] = "tensor"
    clip_mode: Literal["test-means"] = "test-means"


ZEROS, COUNT = torch.zeros(2, dtype=torch.float64), torch.tensor(1)
SAVED = {"scope": "tensor", "scopes": [["a", 0, 1], ["b", 0, 1]], "named": True}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({**SAVED, "per_scope": {"sum": ZEROS}, "shared": {}}, r"shared \['count'\], seen \[\]"),
        ({}, "seen"),
        (
            {**SAVED, "per_scope": {"sum": torch.zeros(3).double()}, "shared": {"count": COUNT}},
            r"of 2 norms, seen \(3,\)",
        ),
        (
            {**SAVED, "per_scope": {"sum": torch.zeros(2)}, "shared": {"count": COUNT}},
            r"'sum' .* seen \(2,\) torch.float32",
        ),
    ],
)
def test_a_history_that_does_not_fit_is_refused_before_a_gradient_changes(wrong, message):
    weights = [("a", parameter(torch.tensor([3.0, 4.0]))), ("b", parameter(torch.tensor([1.0])))]
    clipper = GradientClipper(weights, RunningMeans())

    def resume():
        clipper.load_state_dict({**clipper.state_dict(), "states": {"*": wrong}})
        clipper.clip()

    with pytest.raises(StateError, match=message):
        resume()
    assert weights[0][1].grad.tolist() == [3.0, 4.0]


class Growing(Policy):
    """Keeps all norms so far, which no buffer of one size can."""

    clip_mode: Literal["test-growing"] = "test-growing"

    def initial_state(self, scopes):
        return PolicyState(shared={"seen": torch.ones(1, dtype=torch.float64)})

    def decide(self, seen, state):
        every = torch.cat([state.shared["seen"], seen.norms_S])
        return Decision(every.median(), every.median(), PolicyState(shared={"seen": every}))


def test_a_history_has_one_size():
    weight = parameter(torch.tensor([3.0, 4.0]))
    with pytest.raises(ArgumentValueError, match=r"shared\['seen'\] is \(1,\) .* returned \(2,\)"):
        GradientClipper([weight], Growing()).clip()
    assert weight.grad.tolist() == [3.0, 4.0]
