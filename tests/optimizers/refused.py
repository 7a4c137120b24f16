"""The optimizers that cannot be clipped before their step."""

from typing import NamedTuple


class Refusal(NamedTuple):
    """Why one is refused.

    Args:
        error: Words of the error.
        said: What the documentation says.
    """

    error: str
    said: str


_INSIDE = Refusal("inside step", "computes its gradients inside `step(closure)`")
_AGAIN = Refusal("more than once", "evaluates its closure more than once")
_BACKWARD = Refusal("inside fused_backward", "steps inside its `fused_backward()`")
_HALVES = Refusal("two halves", "steps in two halves")

REFUSED = {
    ("torch", "LBFGS"): _INSIDE,
    ("heavyball", "SAMWrapper"): _AGAIN,
    ("pytorch_optimizer", "GSAM"): _INSIDE,
    **{("pytorch_optimizer", name): _BACKWARD for name in ("AdaLOMO", "LOMO")},
    **{
        ("pytorch_optimizer", name): _HALVES
        for name in ("BSAM", "FriendlySAM", "LookSAM", "SAM", "WSAM")
    },
    **{
        ("schedulefree", f"{name}ScheduleFreeClosure"): _INSIDE
        for name in ("AdamW", "RAdam", "SGD")
    },
}
