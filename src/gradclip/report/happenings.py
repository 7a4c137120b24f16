"""The table of events: steps that were skipped or not finite, the largest norms, new limits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gradclip.diagnostics.arrays import np
from gradclip.diagnostics.known import Known
from gradclip.report.faults import Faults
from gradclip.report.words import number

__all__ = ["Happening", "happenings"]

_NOT_MADE = 12
_LARGEST = 8
_OTHERS = 5
_NAMED = 3
_WHY = {
    "nonfinite": "not finite, skipped",
    "overflow": "loss scale too large, skipped",
    "policy": "skipped by the policy",
    "rank": "skipped: another process failed",
}


@dataclass(frozen=True)
class Happening:
    """A row of the table.

    Attributes:
        step: When.
        what: Happened.
        parameters: Where; empty where that is not known.
        norm: Of the step, in words; empty where it has none.
    """

    step: int
    what: str
    parameters: str
    norm: str


def happenings(run: Known, faults: Faults, short: Mapping[str, str]) -> tuple[list[Happening], str]:
    """Return the events in the order of steps, and which of how many they are.

    Args:
        run: The run.
        faults: Where gradients were not finite.
        short: The parameters' names as they are shown.
    """
    rows, said = [], []

    def listed(names: Sequence[str]) -> str:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return ", ".join(short.get(name, name) for name in names[:_NAMED]) + more

    not_made = np.flatnonzero(run.skipped | run.nonfinite)
    for at in not_made[:_NOT_MADE].tolist():
        what = _WHY.get(run.reasons.get(at, ""), "skipped") if run.skipped[at] else "not finite"
        if run.skipped[at] and run.nonfinite[at] and at not in run.reasons:
            what = _WHY["nonfinite"]
        step = int(run.step[at])
        rows.append(Happening(step, what, listed(faults.names.get(step, [])), ""))
    if len(not_made) > _NOT_MADE:
        said.append(
            f"the first {_NOT_MADE} of {len(not_made):,} steps that were not finite or not made"
        )
    for at in _largest(run):
        step = int(run.step[at])
        what = "large norm, clipped" if run.clipped[at] else "large norm"
        rows.append(
            Happening(step, what, listed(_heaviest(run, step)), number(float(run.norm[at])))
        )
    if any(row.norm for row in rows):
        count = sum(bool(row.norm) for row in rows)
        said.append(f"the {count} largest norms" if count > 1 else "the largest norm")
    changes = [(int(run.step[at]), f"new limit: {text}") for at, text in run.policies.items()]
    errors = [
        (event["step"], f"{event.get('code', 'error')}: {event.get('error', '')}")
        for event in run.events
        if event["event"] == "error"
    ]
    for each in (sorted(changes), errors):
        rows += [Happening(step, what, "", "") for step, what in each[:_OTHERS]]
    return sorted(rows, key=lambda row: row.step), " and ".join(said)


def _largest(run: Known) -> list[int]:
    """Return the places of the largest norms, each the largest around it."""
    finite = np.where(np.isfinite(run.norm), run.norm, -np.inf)
    apart, found = max(1, len(run) // 200), list[int]()
    for at in np.argsort(-finite, kind="stable")[: 50 * _LARGEST].tolist():
        if np.isfinite(finite[at]) and all(abs(at - each) >= apart for each in found):
            found.append(at)
        if len(found) == min(_LARGEST, len(run) // 4):
            break
    return found


def _heaviest(run: Known, step: int) -> list[str]:
    """Return the parameter with the largest norm at a step, where that is known."""
    if run.parameters is None:
        return []
    at = int(np.searchsorted(run.parameters.steps, step))
    if at == len(run.parameters.steps) or run.parameters.steps[at] != step:
        return []
    norms = run.parameters.norms[at]
    known = np.where(np.isfinite(norms), norms, -1)
    return [run.parameters.names[int(known.argmax())]] if known.max() > 0 else []
