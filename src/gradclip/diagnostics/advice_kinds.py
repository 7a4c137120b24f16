"""What each word in capitals of an advice means, and what to do: said by the advice and `explain`.

It imports nothing, since ``gradclip explain`` needs nothing but gradclip.
"""

from typing import NamedTuple

__all__ = ["KINDS", "OVERTURNING", "Kind", "to_do"]


class Kind(NamedTuple):
    """A word of an advice.

    Attributes:
        code: The word.
        role: What it is of an advice: a kind, a refusal or a warning.
        summary: What it means.
        what_to_do: What to do; the advice says the same words after what it saw.
        line: The line to paste that these words name, where no framework is known.
    """

    code: str
    role: str
    summary: str
    what_to_do: str
    line: str = ""


KINDS = {
    each.code: each
    for each in (
        Kind(
            "GUARD",
            "kind",
            "The norms are as usual. The limit is twice the norm that one step in ten exceeds, "
            "or ten times the usual norm if that is less.",
            "It is insurance against the step that ruins a run, not tuning.",
        ),
        Kind(
            "BROAD",
            "kind",
            "The norms range widely: one step in ten exceeds more than 2.5 times the usual norm.",
            "Only a loose limit makes sense here. gradclip report shows which layer and which "
            "steps make the largest norms.",
        ),
        Kind(
            "FALLEN_AWAY",
            "kind",
            "In a part of the run the norms are over ten times below the limit of a guard, so "
            "it would not guard that part.",
            "Use a limit that follows the norms: twice their moving average, and never above "
            "the limit of a guard.",
        ),
        Kind(
            "STEADY",
            "kind",
            "Large norms are spread evenly over the run, so one number clips about one step in "
            "ten.",
            "Expect 5 to 30 % of the steps to be clipped in another run.",
        ),
        Kind(
            "NARROW",
            "kind",
            "The norms hardly vary, so a limit near them clips everything or nothing.",
            "Take the limit of a guard.",
        ),
        Kind(
            "RISING",
            "kind",
            "The norms rise during the run, so no single number clips evenly.",
            "Use the z-score policy, whose limit follows the norms, and never goes above the "
            "limit of a guard.",
        ),
        Kind(
            "FALLING",
            "kind",
            "The norms fall during the run, so no single number clips evenly.",
            "Use the z-score policy, whose limit follows the norms, and never goes above the "
            "limit of a guard.",
        ),
        Kind(
            "FEW",
            "refusal",
            "The log has too few norms that are finite and above 0.",
            "Give a longer log: 30 such norms are needed, and 100 to regularise.",
        ),
        Kind(
            "FEW_FOR_REGULARISE",
            "refusal",
            "After the beginning of the run there are fewer than 100 norms.",
            "100 are needed to regularise. A guard needs 30: ask with the intent guard.",
        ),
        Kind(
            "EVENTS_ONLY",
            "refusal",
            "There is no step, no loss and no learning rate beside the norms. Only outliers "
            "seem to be logged.",
            "Log the norm of every step, and the step beside it.",
        ),
        Kind(
            "PLATEAU",
            "refusal",
            "More than 5 % of the norms are the largest one. These are norms after clipping.",
            "Log the norm before clipping: clip_grad_norm_ returns it.",
        ),
        Kind(
            "COLLAPSED",
            "refusal",
            "The norm fell below 1 % of what it was and stayed there. If the loss fell with "
            "it, the run has learned. No single number fits both parts.",
            "As a next step take a limit that follows the norms: {line}. Or take one number that "
            "guards the beginning.",
            'gradclip.attach(optimizer, gradclip.EMAClip(ratio=2, scope="group"))',
        ),
        Kind(
            "LOST",
            "warning",
            "The norms are NaN or infinite to the end of the run, or they rose to more than "
            "100 times what they were and stayed there. The advice is of the part before.",
            "Skip steps with a NaN and clip ({line} does both), run again, and ask again.",
            "gradclip.attach(optimizer, 1.0)",
        ),
        Kind(
            "LOSS",
            "warning",
            "The loss at the end is not below the loss at the beginning. Norms of a run that "
            "does not learn say little about one that does.",
            "Make the run learn first, and ask again.",
        ),
        Kind(
            "SCALE",
            "warning",
            "The norms are large beside the loss. Perhaps a loss scale is left in, or the loss "
            "is a sum and not a mean.",
            "Settle that first: the limit is in the same units.",
        ),
        Kind(
            "WARM_UP",
            "warning",
            "Many norms at the beginning of the run lie above the limit.",
            "As a rule leave it so: the steps at the beginning are made, only shorter.",
        ),
        Kind(
            "DRIFT",
            "warning",
            "The norms at the end are more than twice or less than half of those at the beginning.",
            "A longer run may need another limit: ask again when it has gone on.",
        ),
        Kind(
            "SPACING",
            "warning",
            "Not every step has a norm in the log.",
            "The usual norm, and the one that a step in ten exceeds, hold. The largest spikes "
            "are not in this log.",
        ),
        Kind(
            "ZEROS",
            "warning",
            "More than 5 % of the norms are exactly 0, and were left out.",
            "Look why: frozen parameters, or a loss that does not depend on them, are usual "
            "reasons.",
        ),
        Kind(
            "NONFINITE",
            "warning",
            "Some norms are NaN or infinite, and were left out.",
            "A limit does not mend those; skipping the step does, as gradclip does.",
        ),
        Kind(
            "COARSE",
            "warning",
            "Less than half of the norms are distinct: they were rounded, say to bfloat16.",
            "Take the limit as it is: it is no finer than the log.",
        ),
        Kind(
            "LIMIT_SETS_STEP",
            "warning",
            "The limit that the run had clips more than half of its steps: it sets the step size.",
            "If that is not meant, take a higher limit and a lower learning rate.",
        ),
        Kind(
            "LIMIT_IDLE",
            "warning",
            "The limit that the run had has never acted.",
            "Nothing needs to be done: that is how a guard looks in a run without spikes.",
        ),
    )
}
"""All of them, by the word."""

OVERTURNING = ("LOST", "LOSS", "SCALE")
"""Warnings that overturn an advice: they are told before it."""


def to_do(code: str, line: str | None = None) -> str:
    """Return what to do, with a line to paste where its words name one."""
    kind = KINDS[code]
    return kind.what_to_do.replace("{line}", line or kind.line)
