"""Gradient clipping for PyTorch that is right, fast, and shows what it did.

``import gradclip`` is light: torch is imported when a name that needs it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from gradclip import config as config
from gradclip import errors as errors

if TYPE_CHECKING:
    from gradclip.clipping import AGCClip as AGCClip
    from gradclip.clipping import ClipResult as ClipResult
    from gradclip.clipping import ClipStats as ClipStats
    from gradclip.clipping import EMAClip as EMAClip
    from gradclip.clipping import GradientClipper as GradientClipper
    from gradclip.clipping import GuardClip as GuardClip
    from gradclip.clipping import NormClip as NormClip
    from gradclip.clipping import ObserveClip as ObserveClip
    from gradclip.clipping import QuantileClip as QuantileClip
    from gradclip.clipping import Schedule as Schedule
    from gradclip.clipping import ValueClip as ValueClip
    from gradclip.clipping import ZScoreClip as ZScoreClip
    from gradclip.clipping import clip_grad_norm_ as clip_grad_norm_
    from gradclip.clipping import clip_grad_value_ as clip_grad_value_
    from gradclip.clipping import clip_grads_with_norm_ as clip_grads_with_norm_
    from gradclip.clipping import get_total_norm as get_total_norm
    from gradclip.clipping import withhold as withhold
    from gradclip.diagnostics.advice import Advice as Advice
    from gradclip.diagnostics.advice import suggest as suggest
    from gradclip.diagnostics.replay import Replay as Replay
    from gradclip.diagnostics.replay import replay as replay
    from gradclip.integrations.torch_optim import attach as attach
    from gradclip.integrations.torch_optim import attached as attached

__version__ = "0.1.0"
__all__ = [
    "AGCClip",
    "Advice",
    "ClipResult",
    "ClipStats",
    "EMAClip",
    "GradientClipper",
    "GuardClip",
    "NormClip",
    "ObserveClip",
    "QuantileClip",
    "Replay",
    "Schedule",
    "ValueClip",
    "ZScoreClip",
    "__version__",
    "attach",
    "attached",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "config",
    "errors",
    "get_total_norm",
    "presets",
    "replay",
    "suggest",
    "withhold",
]

_ELSEWHERE = {
    "attach": "gradclip.integrations.torch_optim",
    "attached": "gradclip.integrations.torch_optim",
    "Advice": "gradclip.diagnostics.advice",
    "Replay": "gradclip.diagnostics.replay",
    "replay": "gradclip.diagnostics.replay",
    "suggest": "gradclip.diagnostics.advice",
}


def __getattr__(name: str) -> object:
    """Import the engine, and torch with it, on the first use of one of its names."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "presets":
        return import_module("gradclip.presets")
    found: object = getattr(import_module(_ELSEWHERE.get(name, "gradclip.clipping")), name)
    globals()[name] = found  # so that this is not asked for it again
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
