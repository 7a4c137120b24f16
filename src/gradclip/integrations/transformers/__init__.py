"""``transformers.Trainer`` and the trainers of TRL: a callback clips, the trainer does not.

The trainer's own clipping stays off (``max_grad_norm=0``). It then still measures every gradient
itself, before the callback does; ``ClippingTrainerMixin`` spares that.
"""

from gradclip.integrations.transformers.callback import ClippingTrainerMixin as ClippingTrainerMixin
from gradclip.integrations.transformers.callback import (
    GradientClippingCallback as GradientClippingCallback,
)

__all__ = ["ClippingTrainerMixin", "GradientClippingCallback"]
