"""Optimizers as people set them up: torch's own, and every one of some other libraries."""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

Make = Callable[[nn.Module], Any]


class SetUp(NamedTuple):
    """One optimizer.

    Args:
        library: The package that it comes from.
        name: What it is called there.
        make: Makes it for a model.
    """

    library: str
    name: str
    make: Make


def model() -> nn.Module:
    """Return a model with a weight that is large enough to be quantized: 64 x 64."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))


def of(kind: Callable[..., Any], **options: Any) -> Make:
    """Return what makes an optimizer of all parameters."""
    return lambda module: kind(module.parameters(), **options)


def momentum(module: nn.Module) -> Any:
    """Return the inner optimizer of those that wrap one."""
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


def torchs_own() -> Iterator[SetUp]:
    """Yield those of torch, with all implementations of those that have several."""
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "SGD": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
        "Adam": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
        "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
        "Adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
    }
    ways = {"plain": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    for name, (kind, options) in kinds.items():
        for way, flags in ways.items():
            yield SetUp("torch", f"{name} ({way})", of(kind, **options, **flags))
    for name in ("Adadelta", "Adafactor", "Adamax", "ASGD", "LBFGS", "NAdam", "RAdam", "RMSprop"):
        yield SetUp("torch", name, of(getattr(torch.optim, name), lr=0.01))


def all_of(library: str) -> Iterator[SetUp]:
    """Yield every optimizer of a library, but for those that are left out."""
    special, left_out = SPECIAL.get(library, {}), LEFT_OUT.get(library, set())
    for name, kind in sorted(vars(package(library)).items()):
        if _is_optimizer(kind) and name not in left_out:
            make = special.get(name, _of_parameters)
            yield SetUp(library, name, lambda m, make=make, kind=kind: make(kind, m))


def _of_parameters(kind: Any, module: nn.Module) -> Any:
    return kind(module.parameters())


def _is_optimizer(kind: object) -> bool:
    return (
        isinstance(kind, type)
        and issubclass(kind, torch.optim.Optimizer)
        and kind is not torch.optim.Optimizer
        and not kind.__module__.startswith("torch.optim")
        and not inspect.isabstract(kind)
    )


def package(name: str) -> Any:
    """Import a package, or what of it can be imported.

    To import timm takes torchvision, which its optimizers do not use.
    """
    if name != "timm":
        return importlib.import_module(MODULES.get(name, name))
    spec = find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(name)
    folder = next(iter(spec.submodule_search_locations))
    for known, path in ((name, folder), (f"{name}.optim", f"{folder}/optim")):
        sys.modules[known] = stand_in = ModuleType(known)
        stand_in.__path__ = [path]
    found = ModuleType("optimizers of timm")
    for each in TIMM:
        loaded = importlib.import_module(f"{name}.optim.{each}")
        vars(found).update({n: k for n, k in vars(loaded).items() if _is_optimizer(k)})
    return found


def _two_kinds(module: nn.Module) -> list[dict[str, Any]]:
    """Return the matrices, for Muon, and the rest, for its Adam."""
    parameters = list(module.parameters())
    return [
        {"params": [p for p in parameters if p.ndim == 2], "use_muon": True},
        {"params": [p for p in parameters if p.ndim != 2], "use_muon": False},
    ]


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.ndim == 2]


def _split(kind: Any, module: nn.Module) -> Any:
    parameters = list(module.parameters())
    return kind([{"params": [p], "optimizer": package("heavyball").AdamW} for p in parameters])


def _private(kind: Any, module: nn.Module) -> Any:
    inner = momentum(module)
    return kind(inner, noise_multiplier=0.0, max_grad_norm=1e9, expected_batch_size=1)


MODULES = {"torchao": "torchao.optim", "opacus": "opacus.optimizers"}
TIMM = ("adan", "adopt", "kron", "lamb", "lookahead", "mars", "muon")


def _by(make: Callable[[Any, nn.Module], Any], *names: str) -> dict[str, Any]:
    return dict.fromkeys(names, make)


def _wrapping(kind: Any, module: nn.Module) -> Any:
    return kind(momentum(module))


def _of_two_kinds(kind: Any, module: nn.Module) -> Any:
    return kind(_two_kinds(module))


def _of_model(kind: Any, module: nn.Module) -> Any:
    return kind(module)


def _of_rate(kind: Any, module: nn.Module) -> Any:
    return kind(module.parameters(), lr=0.01)


def _sharpness(kind: Any, module: nn.Module) -> Any:
    return kind(module.parameters(), base_optimizer=torch.optim.SGD, lr=0.05)


SPECIAL: dict[str, dict[str, Callable[[Any, nn.Module], Any]]] = {
    "schedulefree": _by(_wrapping, "ScheduleFreeWrapper", "ScheduleFreeWrapperReference"),
    "timm": _by(_wrapping, "Lookahead"),
    "torch_optimizer": _by(_wrapping, "Lookahead"),
    "pytorch_optimizer": {
        **_by(_wrapping, "Lookahead", "OrthoGrad", "PCGrad", "ScheduleFreeWrapper", "TRAC"),
        **_by(_of_two_kinds, "AdaGO", "AdaMuon", "Muon", "MuonClip", "NorMuon"),
        **_by(_of_model, "AdamMini", "AdaLOMO", "LOMO"),
        **_by(_sharpness, "FriendlySAM", "LookSAM", "SAM"),
        "GSAM": lambda kind, m: kind(
            m.parameters(), momentum(m), m, SimpleNamespace(step=lambda: 0.1)
        ),
        "WSAM": lambda kind, m: kind(m, m.parameters(), torch.optim.SGD, lr=0.05),
        "BSAM": lambda kind, m: kind(m.parameters(), num_data=10),
        "Ranger21": lambda kind, m: kind(m.parameters(), num_iterations=10),
        "SpectralSphere": lambda kind, m: kind(_matrices(m)),
    },
    "muon": {
        "SingleDeviceMuon": lambda kind, m: kind(_matrices(m)),
        **_by(_of_two_kinds, "SingleDeviceMuonWithAuxAdam"),
    },
    "optimi": _by(
        _of_rate, "Adam", "AdamW", "Adan", "Lion", "RAdam", "Ranger", "SGD", "StableAdamW"
    ),
    "heavyball": _by(_split, "SplitOpt"),
    "opacus": _by(_private, "DPOptimizer"),
}
"""Those that are not made of parameters alone."""

LEFT_OUT = {
    # They are for several processes.
    "muon": {"Muon", "MuonWithAuxAdam"},
    "opacus": {
        "AdaClipDPOptimizer",
        "DPOptimizerFastGradientClipping",
        "DPPerLayerOptimizer",
        "DistributedDPOptimizer",
        "DistributedDPOptimizerFastGradientClipping",
        "FSDPOptimizerFastGradientClipping",
        "SimpleDistributedPerLayerOptimizer",
    },
    # One more needs einops, and several processes; the other owns the loss scale, and half models.
    "pytorch_optimizer": {"DeMo", "DistributedMuon", "SafeFP16Optimizer"},
    # An accelerator; a private base.
    "torchao": {"CPUOffloadOptimizer", "_AdamW", "_AdamBase"},
    # Bases.
    "heavyball": {"PSGDBase", "SOAPBase"},
}
LIBRARIES = (
    "dadaptation",
    "heavyball",
    "lion_pytorch",
    "muon",
    "opacus",
    "optimi",
    "prodigyopt",
    "pytorch_optimizer",
    "schedulefree",
    "timm",
    "torch_optimizer",
    "torchao",
)
