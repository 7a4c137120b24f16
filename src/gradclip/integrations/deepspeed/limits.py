"""What DeepSpeed can do of a policy, and the refusal of everything else."""

from collections.abc import Mapping
from math import inf
from typing import Any

from gradclip.clipping.arguments import check_nonfinite
from gradclip.clipping.policies import NormClip, Schedule, as_given, as_policies
from gradclip.errors import DoubleClippingError

__all__ = [
    "KEY",
    "check_able",
    "check_engine",
    "check_equal",
    "check_limits",
    "checked_nonfinite",
    "limit_of",
    "refuse_change",
]

KEY = "gradient_clipping"
"""The limit in DeepSpeed's configuration; 0 is none, and an absent key is 1.0 (in 0.19)."""
_CHECKS_ANYWAY = 3
"""The stage of ZeRO that looks for a NaN whatever ``check_grad_overflow`` says."""


def limit_of(policy: Any) -> float:
    """Return DeepSpeed's word for a policy: its limit, or 0 for none.

    Raises:
        DoubleClippingError: GC101, DeepSpeed cannot do it.
    """
    if hasattr(policy, "as_policy"):
        checked_nonfinite(policy.nonfinite)
        policy = policy.as_policy()
    policies, division = as_policies(policy)
    if division == "by group" or list(policies) != ["*"]:
        raise _impossible(
            f"policy = {as_given(policies, division)!r}",
            "DeepSpeed has one limit for all parameters together, and none by name or by "
            "param_group",
        )
    (wanted,) = policies.values()
    assert wanted is not None  # a mapping that bounds nothing was refused
    limit = wanted.fixed()
    if isinstance(wanted, NormClip) and isinstance(wanted.max_norm, Schedule):
        raise _impossible(
            f"max_norm = {wanted.max_norm!r}", "DeepSpeed has one number for all steps"
        )
    if wanted.element_limit is not None or limit is None or limit.threshold != limit.target:
        raise _impossible(
            f"policy = {wanted!r}", "DeepSpeed clips by one fixed norm of all gradients alone"
        )
    if wanted.scope != "group":
        raise _impossible(f"scope = {wanted.scope!r}", "DeepSpeed has one norm of all gradients")
    if limit.skip_above < inf:
        raise _impossible(
            f"skip_above = {limit.skip_above!r}", "DeepSpeed makes every step that is finite"
        )
    if wanted.order != 2:  # noqa: PLR2004 - the p of the norm
        raise _impossible(
            f"norm_type = {wanted.order!r}", "DeepSpeed measures the 2-norm, and no other"
        )
    if limit.target == 0:
        raise _impossible(
            "max_norm = 0.0", "to DeepSpeed a limit of 0 means that nothing is clipped"
        )
    return limit.target if limit.target < inf else 0.0


def refuse_change(policy: object) -> None:
    """Refuse a policy that is assigned during a run: the engine has read its limit.

    Raises:
        DoubleClippingError: GC101.
    """
    raise _impossible(
        f"policy = {policy!r}    (assigned during the run)",
        "DeepSpeed reads its limit once, when the engine is made",
    )


def checked_nonfinite(nonfinite: object) -> str:
    """Return what to do about a NaN or an infinity, if DeepSpeed can do it.

    Raises:
        DoubleClippingError: GC101, it cannot.
    """
    if check_nonfinite(nonfinite) == "propagate":
        raise _impossible(
            'nonfinite = "propagate"',
            "DeepSpeed drops a step whose norm is not finite, and cannot be told to make it",
        )
    return str(nonfinite)


def check_engine(engine: Any, limit: float) -> None:
    """Refuse an engine that has another limit, or would not tell what it did.

    Raises:
        DoubleClippingError: GC101.
    """
    check_able(engine._config._param_dict)  # noqa: SLF001 - engine.config may be a path
    check_limits(engine, limit)


def check_limits(engine: Any, limit: float) -> None:
    """Compare what the engine was configured with, and what its optimizer divides by.

    Raises:
        DoubleClippingError: GC101, one of the two is not ``limit``.
    """
    configured, used = engine.gradient_clipping(), engine.optimizer.clip_grad
    if used not in (configured, limit):
        raise _double(used, "loaded from a checkpoint", limit, engine.global_steps)
    if configured != limit or used != limit:
        absent = KEY not in engine._config._param_dict  # noqa: SLF001
        where = "not set; DeepSpeed's default" if absent else ""
        raise _double(configured, where, limit, engine.global_steps)


def check_equal(stated: object, limit: float) -> None:
    """Refuse a limit in a configuration that is another one; absent and ``"auto"`` are none.

    Raises:
        DoubleClippingError: GC101.
    """
    if stated is None or stated == "auto":
        return
    if not isinstance(stated, int | float) or float(stated) != limit:
        raise _double(stated, "", limit, None)


def check_able(config: Mapping[str, Any]) -> None:
    """Refuse a configuration under which DeepSpeed does not tell the norm, or steps on a NaN.

    Raises:
        DoubleClippingError: GC101.
    """
    zero = config.get("zero_optimization")
    zero = zero if isinstance(zero, Mapping) else {}
    stage = zero.get("stage", 0)
    bf16 = config.get("bf16") or {}
    optimizer = config.get("optimizer") or {}
    if stage == 0:
        raise _unable(
            "zero_optimization.stage = 0",
            "without ZeRO the engine keeps no norm in float32, and steps on a NaN",
            "train with DDP, where gradclip clips by itself, or with stage 1, 2 or 3",
        )
    if zero.get("compute_grad_norm") is False:
        raise _unable(
            "zero_optimization.compute_grad_norm = false",
            "the engine would neither clip nor notice a NaN",
            "drop that key",
        )
    if bf16.get("enabled") and bf16.get("check_grad_overflow") is False and stage != _CHECKS_ANYWAY:
        raise _unable(
            "bf16.check_grad_overflow = false",
            "stages 1 and 2 would step on a NaN",
            "drop that key",
        )
    if str(optimizer.get("type", "")).lower() == "muon":
        raise _unable(
            "optimizer.type = Muon",
            "DeepSpeed takes the norm of Muon's updates, not of the gradients",
            "use another optimizer, or train without gradclip",
        )


def _double(stated: object, where: str, limit: float, steps: int | None) -> DoubleClippingError:
    seen, ours = repr(stated), repr(limit or inf)
    policy = ours if limit else "gradclip.ObserveClip()"
    origin = f"    ({where})" if where else ""
    return DoubleClippingError(
        "DeepSpeed would clip these gradients too, to another limit\n"
        f"  DeepSpeed  gradient_clipping = {seen}{origin}\n"
        f"  gradclip   max_norm          = {ours}\n"
        "  DeepSpeed clips inside engine.step(), so nothing can run between backward and update.\n"
        "  Choose one owner, before accelerator.prepare(...) or deepspeed.initialize(...):\n"
        '    set gradient_clipping to "auto", or leave it out, and call\n'
        f"    gradclip.integrations.deepspeed.lower(accelerator, {policy})"
        f"   # sets gradient_clipping to {limit!r}\n"
        f"    or drop gradclip's limit and keep DeepSpeed's {seen}\n"
        f"  {_changed(steps)}"
    )


def _impossible(wanted: str, why: str) -> DoubleClippingError:
    return DoubleClippingError(
        "DeepSpeed clips these gradients, and cannot do what gradclip is asked for\n"
        f"  gradclip   {wanted}\n"
        f"  {why}.\n"
        "  It clips inside engine.step(), so nothing can run between backward and update.\n"
        "  Use NormClip with a max_norm above 0 and norm_type=2, or ObserveClip(), with\n"
        '  nonfinite="skip" or "raise"; or train with DDP or FSDP, where gradclip itself clips.\n'
        f"  {_changed(None)}"
    )


def _unable(seen: str, why: str, advice: str) -> DoubleClippingError:
    return DoubleClippingError(
        "DeepSpeed clips these gradients, and would not tell what it did\n"
        f"  DeepSpeed  {seen}\n"
        f"  {why}. To have gradclip's limit and its verdicts, {advice}.\n"
        f"  {_changed(None)}"
    )


def _changed(steps: int | None) -> str:
    if steps:
        return f"The engine has made {steps} step{'s' if steps > 1 else ''} with its own limit."
    return "No parameters were changed."
