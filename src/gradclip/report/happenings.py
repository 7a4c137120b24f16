"""The table of events: steps that were skipped or not finite, the largest norms, new limits."""

from collections.abc import Iterator, Sequence
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
        step: When, or when first.
        last: When last; the same happened at each step between.
        what: Happened.
        parameters: Where; empty where that is not known.
        norm: Of the step, in words; empty where it has none.
    """

    step: int
    last: int
    what: str
    parameters: str
    norm: str


def happenings(run: Known, faults: Faults) -> tuple[list[Happening], str]:
    """Return the events in the order of steps, and which of how many they are.

    Args:
        run: The run.
        faults: Where gradients were not finite.
    """
    rows, said = list[Happening](), list[str]()

    def listed(names: Sequence[str]) -> str:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return ", ".join(names[:_NAMED]) + more

    not_made = np.flatnonzero(run.skipped | run.nonfinite).tolist()
    shown = 0
    for first, last in _alike(run, faults, not_made):
        if len(rows) == _NOT_MADE:
            said.append(
                f"the first {shown:,} of {len(not_made):,} steps that were not finite or not made"
            )
            break
        step, names = int(run.step[first]), faults.names.get(int(run.step[first]), [])
        rows.append(Happening(step, int(run.step[last]), _what(run, first), listed(names), ""))
        shown += last - first + 1
    for at in _largest(run):
        step = int(run.step[at])
        what = "large norm, clipped" if run.clipped[at] else "large norm"
        rows.append(
            Happening(step, step, what, listed(_heaviest(run, step)), number(float(run.norm[at])))
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
        rows += [Happening(step, step, what, "", "") for step, what in each[:_OTHERS]]
    return sorted(rows, key=lambda row: row.step), " and ".join(said)


def _what(run: Known, at: int) -> str:
    """Say what happened at a step that was not finite or not made."""
    if not run.skipped[at]:
        return "not finite"
    if at in run.reasons or not run.nonfinite[at]:
        return _WHY.get(run.reasons.get(at, ""), "skipped")
    return _WHY["nonfinite"]


def _alike(run: Known, faults: Faults, places: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Find the first and last place of each row of steps to which the same happened."""
    nothing, first, last = list[str](), -1, -1
    named, what = nothing, ""
    for at in places:
        names, now = faults.names.get(int(run.step[at]), nothing), _what(run, at)
        if at == last + 1 and now == what and (names is named or names == named):
            last = at
            continue
        if first >= 0:
            yield first, last
        first, last, named, what = at, at, names, now
    if first >= 0:
        yield first, last


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
