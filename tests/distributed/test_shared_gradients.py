"""What else one call does on many ranks: scopes, patterns, dtypes, scales, the functions."""

import math
from typing import ClassVar, Literal

import layouts
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import gradclip
import oracle
from gradclip import GradientClipper, NormClip, ValueClip
from gradclip.clipping import Policy
from gradclip.clipping.policies import Decision
from gradclip.errors import ArgumentTypeError, ArgumentValueError
from processes import together


class RowClip(Policy):
    scope: ClassVar[Literal["unit"]] = "unit"
    clip_mode: Literal["row"] = "row"
    max_norm: float = 1.0

    def decide(self, seen, state):
        return Decision(self.max_norm, self.max_norm)


class TensorClip(RowClip):
    scope: ClassVar[Literal["tensor"]] = "tensor"
    clip_mode: Literal["tensor"] = "tensor"


def values_of(held, seed=3):
    return {name: layouts.full(name, shape, seed) for name, shape in held.shapes.items()}


def by_rows(value, scope):
    """The truth: each row, or each tensor, brought down to a norm of one."""
    rows = (
        value.reshape(len(value), -1)
        if scope == "unit" and value.dim() > 1
        else value.reshape(1, -1)
    )
    norms = torch.stack([torch.tensor(oracle.norm([row])) for row in rows]).float()
    return (rows * (1 / norms).clamp(max=1)[:, None]).reshape(value.shape)


def scoped(rank, build, missing):
    held = getattr(layouts, build)(rank)
    for policy in (RowClip(), TensorClip()):
        clipper = GradientClipper(held.source, policy, **held.options)
        for step in range(2):
            values = values_of(held, step)
            held.fill(values)
            if step and missing and rank == 0:
                dict(held.source)["block.weight"].grad = None
            result = clipper.clip()
            assert bool(result.clipped)
            assert len(result.scope_names) == len(result.norms_S)
            if step and missing:
                continue
            for name, after in held.read().items():
                wanted = by_rows(values[name], policy.scope)
                torch.testing.assert_close(after, wanted, rtol=1e-5, atol=1e-7)
    return True


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("layout", ["tp", "partial", "dp_tp", "experts"])
def test_rows_and_tensors_have_norms_of_their_own(layout, missing):
    together(scoped, 2 if layout in layouts.TWO else 4, layout, missing)


def flat_rows(rank):
    model = FullyShardedDataParallel(nn.Linear(4, 3), device_id=torch.device("cpu"))
    with pytest.raises(ArgumentValueError, match="flat parameter of FSDP1"):
        GradientClipper(model, TensorClip())


def test_a_flat_parameter_has_no_rows():
    together(flat_rows, 2)


def by_pattern(rank):
    held = layouts.dp_tp(rank)
    policies = {
        "embed.*": NormClip(max_norm=2.0, norm_type=1),
        "block.weight": NormClip(max_norm=0.1, norm_type=math.inf),
        "block.bias": ValueClip(clip_value=0.2),
        "scale": None,
        "*": 0.5,
    }
    clipper = GradientClipper(held.source, policies)
    for step in range(2):
        values = values_of(held, step)
        held.fill(values)
        result = clipper.clip(grad_scale=4.0)
        bounded = [value for name, value in values.items() if name != "scale"]
        assert oracle.relative(result.norm_pre, oracle.norm(bounded) / 4) < 1e-6
        after = held.read()
        wanted = {
            "embed.weight": values["embed.weight"] * 8 / oracle.norm([values["embed.weight"]], 1),
            "block.weight": values["block.weight"]
            * 0.4
            / oracle.norm([values["block.weight"]], math.inf),
            "block.bias": values["block.bias"].clamp(-0.8, 0.8),
            "head.weight": values["head.weight"] * min(1, 2 / oracle.norm([values["head.weight"]])),
            "scale": values["scale"],
        }
        for name, value in wanted.items():
            torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-7)
        left = [value for name, value in wanted.items() if name != "scale"]
        assert (
            oracle.relative(result.groups["block.bias"].norm_post, oracle.norm([left[2]]) / 4)
            < 1e-5
        )
    return [result.groups[key].norm_pre.item().hex() for key in result.groups]


def test_limits_by_pattern_and_a_scale():
    assert len({tuple(said) for said in together(by_pattern, 4)}) == 1


def of_dtype(rank, dtype, magnitude):
    mesh = init_device_mesh("cpu", (2,))
    value = oracle.randn(50, 7, dtype=torch.float64).mul(magnitude).to(dtype)
    beside = oracle.randn(9, dtype=torch.float64).mul(magnitude).to(dtype)
    sharded = nn.Parameter(distribute_tensor(torch.zeros_like(value), mesh, [Shard(0)]))
    plain = nn.Parameter(torch.zeros_like(beside))
    clipper = GradientClipper([sharded, plain], NormClip(max_norm=magnitude))
    seen = []
    for _ in range(2):
        sharded.grad = distribute_tensor(value.clone(), mesh, [Shard(0)])
        plain.grad = beside.clone()
        result = clipper.clip()
        truth = oracle.norm([value, beside])
        assert oracle.relative(result.norm_pre, truth) < (1e-13 if dtype is torch.float64 else 1e-6)
        left = oracle.norm([sharded.grad.full_tensor(), plain.grad])
        slack = oracle.ROUNDING[dtype][1] if dtype in oracle.ROUNDING else 0
        assert left <= magnitude * (1 + slack)
        seen.append(result.coefficient.item().hex())
        # Clipping twice changes nothing.
        before = plain.grad.clone()
        if dtype in (torch.float32, torch.float64):
            assert not bool(clipper.clip().clipped)
            assert torch.equal(before, plain.grad)
    return seen


@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [
        (torch.float32, 1.0),
        (torch.float32, 1e25),
        (torch.float32, 1e-25),
        (torch.bfloat16, 1.0),
        (torch.float16, 100.0),
        (torch.float64, 1.0),
        (torch.float64, 1e200),
        (torch.float64, 1e-200),
    ],
)
def test_dtypes_and_magnitudes(dtype, magnitude):
    first, second = together(of_dtype, 2, dtype, magnitude)
    assert first == second


def double_on_one_rank(rank):
    """Stages of different precision have one coefficient."""
    dtype = torch.float64 if rank else torch.float32
    parameter = oracle.parameter(oracle.randn(6).to(dtype))
    named = [(f"layers.{rank}.weight", parameter)]
    result = GradientClipper(named, 0.1, partitioned={"*": dist.group.WORLD}).clip()
    assert result.norm_pre.dtype is torch.float64
    return result.norm_pre.item().hex(), result.coefficient.item().hex()


def test_stages_of_different_precision():
    first, second = together(double_on_one_rank, 2)
    assert first == second


def functions(rank, build):
    held = getattr(layouts, build)(rank)
    parameters = [parameter for _, parameter in held.source]
    for p in (1.0, 2.0, 3.0, math.inf):
        for step in range(2):
            values = values_of(held, step)
            held.fill(values)
            truth = oracle.norm(values.values(), p)
            grads = [parameter.grad for parameter in parameters]
            assert oracle.relative(gradclip.get_total_norm(grads, p), truth) < 1e-6
            norm = gradclip.clip_grad_norm_(parameters, 0.5, p)
            assert type(norm) is torch.Tensor
            assert oracle.relative(norm, truth) < 1e-6
            for name, after in held.read().items():
                torch.testing.assert_close(after, values[name] * 0.5 / truth, rtol=1e-5, atol=1e-7)
    held.fill(values)
    gradclip.clip_grads_with_norm_(parameters, 1.0, 10.0)
    for name, after in held.read().items():
        torch.testing.assert_close(after, values[name] / 10, rtol=1e-5, atol=1e-7)
    held.fill(values)
    torchs = torch.nn.utils.get_total_norm([parameters[0].grad])
    gradclip.clip_grads_with_norm_(parameters[:1], 1.0, torchs)
    wanted = values["embed.weight"] / oracle.norm([values["embed.weight"]])
    torch.testing.assert_close(held.read()["embed.weight"], wanted, rtol=1e-5, atol=1e-7)
    held.fill(values)
    gradclip.clip_grad_value_(parameters, 0.3)
    for name, after in held.read().items():
        torch.testing.assert_close(after, values[name].clamp(-0.3, 0.3))
    return norm.item().hex()


@pytest.mark.parametrize("layout", ["tp", "partial", "dp_tp", "experts"])
def test_the_functions(layout):
    said = together(functions, 2 if layout in layouts.TWO else 4, layout)
    assert len(set(said)) == 1


def lists_differ(rank):
    """A mask of parameters by ``==`` or ``in`` raises for DTensors: accelerate#3789, PR#4294."""
    mesh = init_device_mesh("cpu", (2,))
    parameters = [nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)])) for _ in "ab"]
    for parameter in parameters:
        parameter.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    optimizer = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=0.1)
    return GradientClipper(optimizer, 1.0).clip().norm_pre.item()


def test_the_parameters_of_an_optimizer():
    assert together(lists_differ, 2) == [pytest.approx(math.sqrt(8))] * 2


def sharded_later(rank):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    clipper = GradientClipper(model, 1.0)
    for module in (model[0], model):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    model(torch.ones(2, 4)).sum().backward()
    truth = oracle.norm([parameter.grad.full_tensor() for parameter in model.parameters()])
    return oracle.relative(clipper.clip().norm_pre, truth)


def test_a_model_that_is_sharded_after_the_clipper_was_made():
    assert max(together(sharded_later, 2)) < 1e-6


def stage_pattern(rank):
    """A pattern that only the last stage has, and a group that only some ranks are in."""
    names = [f"layers.{rank}.weight", *(["head.weight"] if rank == 2 else [])]
    named = [(name, oracle.parameter(torch.full((4,), float(rank + 1)))) for name in names]
    group = dist.new_group([0, 1, 2])
    policies = {"head.*": 1.0, "*": 2.0}
    if rank == 3:  # it has a model of its own
        named = [("other", oracle.parameter(torch.ones(4)))]
        policies = {"*": 2.0}
    declared = {"*": group} if rank < 3 else None
    clipper = GradientClipper(named, policies, partitioned=declared)
    result = clipper.clip()
    if rank == 3:
        return result.norm_pre.item()
    assert result.groups["head.*"].norm_pre.item() == 6.0
    return result.norm_pre.item()


def test_patterns_of_one_stage():
    *stages, other = together(stage_pattern, 4)
    truth = oracle.norm([torch.full((4,), n) for n in (1.0, 2.0, 3.0, 3.0)])
    assert stages == [pytest.approx(truth)] * 3
    assert other == 2.0


def declarations(rank):
    pair = dist.new_group([0, 1])
    named = [("a", oracle.parameter(torch.ones(2)))]
    unnamed = [named[0][1]]
    for options, error, said in (
        ({"partitioned": {"*": "pp"}}, ArgumentTypeError, "expected a process group"),
        ({"partitioned": pair}, ArgumentTypeError, "expected a mapping"),
        ({"partitioned": {1: pair}}, ArgumentTypeError, "name pattern"),
        ({"partitioned": {"*": None}}, ArgumentValueError, "in none of its groups"),
        ({"duplicated": {"a": pair}}, ArgumentValueError, "counted once in any case"),
        ({"partitioned": {"b": pair}}, ArgumentValueError, "on any of the ranks"),
    ):
        with pytest.raises(error, match=said):
            GradientClipper(named, 1.0, **options)
    with pytest.raises(ArgumentValueError, match="has no name"):
        GradientClipper(unnamed, 1.0, partitioned={"a": pair})
    clipper = GradientClipper(unnamed, 1.0, partitioned={"*": [pair]})
    assert clipper.clip().norm_pre.item() == 2.0
    by_mesh = GradientClipper(named, 9.0, partitioned={"a": init_device_mesh("cpu", (2,))})
    named[0][1].grad = torch.ones(2)
    assert by_mesh.clip().norm_pre.item() == 2.0


def test_declarations_are_checked():
    together(declarations, 2)


def test_declarations_need_processes():
    with pytest.raises(ArgumentValueError, match="init_process_group first"):
        GradientClipper(oracle.parameters(torch.ones(2)), 1.0, partitioned={"*": None})


def partial_on_one_rank(rank):
    """A rank that lacks a gradient joins the reduction of its summands, and gets it."""
    mesh = init_device_mesh("cpu", (2,))
    parameters = [
        nn.Parameter(distribute_tensor(torch.zeros(3), mesh, [Replicate()])) for _ in range(2)
    ]
    clipper = GradientClipper(parameters, 1e9)
    for step in range(3):
        for parameter in parameters:
            local = torch.full((3,), float(rank + 1))
            parameter.grad = DTensor.from_local(local, mesh, [Partial()], run_check=False)
        if step == 2 and rank == 1:
            parameters[0].grad = None
        result = clipper.clip()
        first = 1.0 if step == 2 else 3.0
        assert parameters[0].grad._local_tensor.tolist() == [first] * 3
        assert result.norm_pre.item() == pytest.approx(math.sqrt(3 * (first**2 + 9)))
    return result.norm_pre.item().hex()


def test_summands_that_a_rank_lacks():
    assert len(set(together(partial_on_one_rank, 2))) == 1
