"""Other packages that clip gradients; a package that is not installed is left out.

- ``autoclip`` (0.2.1): a quantile of earlier norms is the limit of torch's own function.
- ``smartclip`` (0.1.1): ``torch.dot`` of each tensor with itself, in the dtype of the tensor, each
  read by the host and added up there. It scales tensor by tensor, and writes nothing where the norm
  is within the limit, which it finds from earlier norms too.

Both choose their limits themselves, so what they do to the gradients differs from what we do. What
is compared is the work: a norm of all gradients and, where every call clips, a pass that writes.
"""

from collections.abc import Callable
from typing import NamedTuple

from timing import Function, optional
from torch import Tensor, nn

NEVER = 10**9


class Peer(NamedTuple):
    """A package at work on some parameters.

    Args:
        clip: A call.
        norm: Of the last call.
    """

    clip: Function
    norm: Callable[[], float]


def peers(parameters: list[Tensor], *, clips: bool) -> dict[str, Peer]:
    """Return the packages that are installed, by name.

    Args:
        parameters: With gradients.
        clips: Whether every call clips, or none. autoclip writes in both cases, as torch does.
    """
    found = {}
    if autoclip := optional("autoclip.torch"):
        quantile = autoclip.QuantileClip(parameters, quantile=1.0, global_threshold=True)
        found["autoclip"] = Peer(quantile.step, lambda: float(quantile.state["global_history"][-1]))
    if smartclip := optional("smartclip"):
        module = nn.ParameterList(parameters)
        # Of equal norms it finds a limit that is a little lower, so each call clips.
        clipper = smartclip.AutoClip(warmup_steps=0 if clips else NEVER, min_history=0)
        last: list[float] = [0.0]

        def remember(told: dict[str, float]) -> None:
            last[0] = told["grad_norm"]

        found["smartclip"] = Peer(
            lambda: smartclip.apply(module, clipper, remember), lambda: last[0]
        )
    return found
