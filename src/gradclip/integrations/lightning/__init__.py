"""Clips under Lightning's ``Trainer``: a callback between the backward pass and the step.

Fabric needs no callback: ``gradclip.attach(optimizer, 1.0)`` takes what ``fabric.setup`` returned.
"""

from gradclip.integrations.lightning.callback import (
    GradientClippingCallback as GradientClippingCallback,
)

__all__ = ["GradientClippingCallback"]
