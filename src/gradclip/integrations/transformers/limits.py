"""Who clips in a Trainer: one owner of the limit, or a refusal that names both."""

from typing import TYPE_CHECKING, Any

from gradclip.clipping.step.wrappers import unwrapped
from gradclip.errors import DoubleClippingError
from gradclip.integrations.deepspeed import lower
from gradclip.integrations.deepspeed.limits import KEY, check_equal, checked_nonfinite, limit_of

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["lower_limit", "refuse_other_clipping"]


def lower_limit(
    accelerator: "Accelerator", policy: object, nonfinite: object, max_grad_norm: float | None
) -> None:
    """Write gradclip's limit into DeepSpeed's configuration, before the engine is made.

    Args:
        accelerator: One that is set up for DeepSpeed.
        policy: What is lowered.
        nonfinite: What to do about a NaN or an infinity, as DeepSpeed can do it.
        max_grad_norm: Of the trainer's arguments. A 0 there says that the limit is gradclip's.

    Raises:
        DoubleClippingError: GC101, DeepSpeed has another limit, or cannot do what is asked.
    """
    checked_nonfinite(nonfinite)
    limit = limit_of(policy)
    if max_grad_norm:
        check_equal(max_grad_norm, limit)
    elif accelerator.deepspeed_engine_wrapped is None:
        # transformers wrote the 0 over it.
        accelerator.deepspeed_plugin.deepspeed_config[KEY] = "auto"
    lower(accelerator, policy)


def refuse_other_clipping(max_grad_norm: float | None, optimizer: Any, policy: object) -> None:
    """Refuse a trainer that clips by itself, and DeepSpeed, which does.

    Raises:
        DoubleClippingError: GC101.
    """
    if "deepspeed" in type(optimizer).__module__ or "deepspeed" in (
        type(unwrapped(optimizer)).__module__
    ):
        raise DoubleClippingError(
            "DeepSpeed clips these gradients, and steps in the backward pass, before a callback\n"
            f"  gradclip   policy = {policy!r}    (GradientClippingCallback)\n"
            "  A callback alone can neither tell DeepSpeed its limit nor find its engine.\n"
            "  Train with the mixin, which lowers the limit and observes the engine's norm:\n"
            "    class ClippedTrainer(ClippingTrainerMixin, Trainer): pass\n"
            "  or leave the callback out and keep DeepSpeed's limit\n"
            "  No parameters were changed."
        )
    if max_grad_norm and not max_grad_norm < 0:
        raise DoubleClippingError(
            "the Trainer would clip these gradients too\n"
            f"  Trainer    max_grad_norm = {max_grad_norm!r}    (TrainingArguments; "
            "1.0 where it is not set)\n"
            f"  gradclip   policy        = {policy!r}    (GradientClippingCallback)\n"
            "  The Trainer clips first: gradclip would measure what that left, and the smaller\n"
            "  limit would win, silently. An infinity would be a NaN everywhere by then.\n"
            "  Choose one owner:\n"
            "    TrainingArguments(..., max_grad_norm=0)    # or SFTConfig: gradclip clips\n"
            f"    or leave the callback out and keep the Trainer's {max_grad_norm!r}\n"
            "  No parameters were changed."
        )
