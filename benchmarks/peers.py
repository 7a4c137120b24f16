"""Other packages that clip gradients; a package that is not installed is left out.

- ``autoclip`` (0.2.1): a quantile of earlier norms is the limit of torch's own function.
- ``smartclip`` (0.1.1): ``torch.dot`` of each tensor with itself, in the dtype of the tensor, each
  read by the host and added up there. It scales tensor by tensor, and writes nothing where the norm
  is within the limit.

Both find their limits from earlier norms. What is compared is the work on the gradients, so
smartclip is told a limit; autoclip has one that is never exceeded, and writes nevertheless, as
torch does.
"""

from collections.abc import Callable
from typing import NamedTuple

from timing import Function, optional
from torch import Tensor, nn


class Peer(NamedTuple):
    """A package at work on some parameters.

    Args:
        clip: A call.
        norm: Of the last call.
    """

    clip: Function
    norm: Callable[[], float]


def peers(parameters: list[Tensor], limit: float) -> dict[str, Peer]:
    """Return the packages that are installed, by name.

    Args:
        parameters: With gradients.
        limit: Of the norm.
    """
    found = {}
    if autoclip := optional("autoclip.torch"):
        quantile = autoclip.QuantileClip(parameters, quantile=1.0, global_threshold=True)
        norms = quantile.state
        found["autoclip"] = Peer(quantile.step, lambda: float(norms["global_history"][-1]))
    if smartclip := optional("smartclip"):
        module = nn.ParameterList(parameters)
        clipper = smartclip.AutoClip(warmup_steps=0, min_history=0)
        clipper.threshold = lambda _: limit
        told: dict[str, float] = {}
        found["smartclip"] = Peer(
            lambda: smartclip.apply(module, clipper, told.update), lambda: told["grad_norm"]
        )
    return found
