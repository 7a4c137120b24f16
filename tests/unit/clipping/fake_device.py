"""Clips on a device that has no memory, where reading a number or mixing devices raises.

Returns what raised, a line each. It runs in a process of its own: it registers a device, and makes
``torch.cat`` and ``torch.stack`` as strict as they are on a GPU.
"""

import warnings
from dataclasses import replace
from math import inf
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from every_policy import EVERY
from gradclip import (
    AGCClip,
    EMAClip,
    GradientClipper,
    GuardClip,
    NormClip,
    ObserveClip,
    QuantileClip,
    Schedule,
    ValueClip,
    ZScoreClip,
    attach,
)
from gradclip.clipping import Policy
from gradclip.clipping.collect import gradients as collected
from gradclip.clipping.collect import overlap
from gradclip.clipping.kernels import device
from gradclip.clipping.kernels.tables import Table
from gradclip.clipping.policies import Decision
from gradclip.clipping.ranks.agreement import Facts
from gradclip.clipping.ranks.dimension import Dimension
from pairwise import chosen

DEVICE = "npy:0"


class RowClip(Policy):
    scope: ClassVar[Literal["unit"]] = "unit"
    clip_mode: Literal["row"] = "row"

    def decide(self, seen, state):
        return Decision(1.0, torch.full_like(seen.norms_S, 1.0))


class RowObserver(RowClip):
    clip_mode: Literal["row_observer"] = "row_observer"
    writes: ClassVar[bool] = False


POLICIES = {
    "norm": 1.0,
    "zero": 0.0,
    "inf": inf,
    "observe": ObserveClip(),
    "value": ValueClip(clip_value=0.1),
    "value inf": ValueClip(clip_value=inf),
    "p = 3": NormClip(max_norm=1.0, norm_type=3.0),
    "p = inf": NormClip(max_norm=1.0, norm_type=inf),
    "norm and observer": {"a": 1.0, "b": ObserveClip()},
    "value and observer": {"a": ValueClip(clip_value=1.0), "b": ObserveClip()},
    "norm and value": {"a": 1.0, "b": ValueClip(clip_value=0.1)},
    "two observers": {"a": ObserveClip(), "b": ObserveClip()},
    "two orders": {"a": 1.0, "b": NormClip(max_norm=1.0, norm_type=1.0)},
    "guard": GuardClip(),
    "agc": {"a": AGCClip(units={"a": 1}), "b": AGCClip(clip_factor=1e-4)},
    "tensors": NormClip(max_norm=1.0, scope="tensor", skip_above=4.0),
    "schedule": NormClip(max_norm=Schedule(points=((0, 1.0), (4, 0.5)), shape="linear")),
    "skips": NormClip(max_norm=inf, skip_above=4.0),
    "z-score": ZScoreClip(on_spike="skip"),
    "quantiles": QuantileClip(scope="tensor", on_spike="skip"),
    "averages": {"a": EMAClip(warmup_max_norm=1.0, cap=2.0), "b": EMAClip(scope="group")},
    "rows": RowClip(),
    "observed rows": RowObserver(),
    "rows and norm": {"a": RowClip(), "b": 1.0},
}


def everyone(fact):
    """What four ranks would say, each of which holds other parameters of the same shapes."""
    said = {}
    for rank in range(4):
        said[rank] = fact
        if isinstance(fact, Facts):
            outline = fact.outline
            # Each stands at another place of its group.
            parts, apart = (
                {((rank,) * len(place), *which): value for (place, *which), value in each.items()}
                for each in (outline.parts, outline.apart)
            )
            said[rank] = replace(fact, outline=replace(outline, parts=parts, apart=apart))
    return said


def strict(function):
    def checked(tensors, *args, **kwargs):
        tensors = list(tensors)
        if len({t.device for t in tensors}) > 1:
            raise RuntimeError(f"{function.__name__} of several devices")
        return function(tensors, *args, **kwargs)

    return checked


def clip(policy, mode, missing, dtypes, grad_scale, partitioned):
    pairs = []
    for name, dtype in zip("ab", dtypes, strict=True):
        parameter = torch.nn.Parameter(torch.zeros(3, 4, device=DEVICE, dtype=dtype))
        if name not in missing:
            parameter.grad = torch.ones(3, 4, device=DEVICE, dtype=dtype)
        pairs.append((name, parameter))
    clipper = GradientClipper(pairs, policy, nonfinite=mode, partitioned=partitioned)
    result = clipper.clip(grad_scale)
    result.compute()
    torch.cat([each._packed() for each in (result, *result.groups.values())])


class NoCopies(TorchDispatchMode):
    """Raises where numbers go from one device to another."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket
        if name in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[name is torch.ops.aten.copy_]
            if source.device != result.device:
                raise RuntimeError(f"a copy from {source.device} to {result.device}")
        return result


def steps(policy):
    """Make steps of a fused optimizer: it is told on the device whether to make each."""
    weights = [torch.nn.Parameter(torch.zeros(3, 4, device=DEVICE)) for _ in range(3)]
    for weight in weights:
        weight.grad = torch.ones(3, 4, device=DEVICE)
    named = [(f"{name}.weight", weight) for name, weight in zip("abc", weights, strict=True)]
    optimizer = torch.optim.AdamW(named, lr=0.1, fused=True)
    optimizer.step()  # it is asked on the device once it has a state
    attach(optimizer, policy)
    with NoCopies():
        for _ in range(3):
            optimizer.step()


def main():
    backend_registration._setup_privateuseone_for_python_backend("npy")
    torch.cat, torch.stack = strict(torch.cat), strict(torch.stack)
    # A table's copy has no values here either.
    Table.on = lambda self, device: torch.zeros(
        self._values.shape, dtype=self._values.dtype, device=device
    )
    # Fake tensors are refused; these stand for those of a device.
    collected._intercepts = lambda tensor: False
    # Addresses are asked for, and there are none; what is read late, on purpose, is nothing.
    overlap.DisjointCheck.__call__ = lambda self, *gradients: None
    device.HostCopy = lambda values: None
    # A group whose ranks say nothing, and which is where the gradients are.
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    Dimension.device = lambda self, result_device: result_device
    Dimension.all_reduce = lambda self, values, operation: None
    Dimension.gather = lambda self, known: [everyone(known[0])]
    warnings.simplefilter("ignore")
    raised = []
    mixed = (torch.float32, torch.float64)
    for (name, policy), mode, missing, dtypes, scale, partitioned in chosen(
        list(POLICIES.items()),
        ("skip", "propagate"),
        ("", "a", "ab"),
        (mixed[:1] * 2, mixed),
        (None, 4.0),
        (None, {"a": dist.group.WORLD}),
    ):
        with FakeTensorMode(allow_non_fake_inputs=True):
            try:
                clip(policy, mode, missing, dtypes, scale, partitioned)
            except Exception as error:  # noqa: BLE001 - whatever it is
                said = str(error)[:150]
                case = f"{name} {mode} {missing} {dtypes} {scale} {partitioned is None}"
                raised.append(f"{case} {error!r:.20} {said}")
    for name, policy in EVERY.items():
        with FakeTensorMode(allow_non_fake_inputs=True):
            try:
                steps(policy)
            except Exception as error:  # noqa: BLE001 - whatever it is
                raised.append(f"attached: {name} {error!r:.150}")
    return raised
