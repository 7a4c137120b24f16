"""What is known of a run, as arrays: all that the report is made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradclip.diagnostics.arrays import Flags, Numbers, Places, np
from gradclip.diagnostics.readers import LoggedRun
from gradclip.diagnostics.readers.logged import spacing_of
from gradclip.diagnostics.record import read_header
from gradclip.diagnostics.runs import Run
from gradclip.record.columns import Steps
from gradclip.record.reader import Norms, read_events, read_norms

__all__ = ["Group", "Known", "known"]


@dataclass(frozen=True, eq=False)
class Group:
    """The norms of a name pattern or of a parameter group.

    Attributes:
        name: Of it.
        norm: At each step of the run; NaN where it has none.
        limit: Likewise what was allowed.
    """

    name: str
    norm: Numbers
    limit: Numbers


@dataclass(frozen=True, eq=False, kw_only=True)
class Known:
    """A run; NaN stands for what was not measured.

    Attributes:
        name: The file, and which run of it.
        counted: What the steps are.
        axis: What their numbers are.
        norms_are: What the norms are.
        step: The number of each step.
        norm: Before clipping.
        limit: What was allowed.
        loss: Of each step.
        lost: Whether the loss was measured, and was not finite.
        rate: The learning rate.
        kept: What the gradients were multiplied by.
        clipped: Whether they were scaled down.
        skipped: Whether the step was not made.
        nonfinite: Whether a gradient, or the logged norm, was not finite.
        tells_clipping: Whether it is known what was clipped.
        reasons: Why steps were skipped, by position.
        policies: Policies that were assigned, by position.
        groups: The norms by pattern.
        parameters: The norm of each parameter at some steps, or None.
        is_euclidean: Whether the squares of those add up to that of the whole norm.
        events: What happened, as the record tells it.
        about: What the record says of the optimizer.
        log: What was read, where it is a log of others.
    """

    name: str
    counted: str
    axis: str
    norms_are: str
    step: Places
    norm: Numbers
    limit: Numbers
    loss: Numbers
    lost: Flags
    rate: Numbers
    kept: Numbers
    clipped: Flags
    skipped: Flags
    nonfinite: Flags
    tells_clipping: bool
    reasons: dict[int, str]
    policies: dict[int, str]
    groups: Sequence[Group]
    parameters: Norms | None
    is_euclidean: bool
    events: Sequence[dict[str, Any]]
    about: dict[str, Any]
    log: LoggedRun | None

    def __len__(self) -> int:
        return len(self.step)

    @property
    def usable(self) -> Numbers:
        """The norms that say something: finite, and above 0."""
        found: Numbers = self.norm[np.isfinite(self.norm) & (self.norm > 0)]
        return found

    @property
    def unclipped(self) -> str:
        """What is said in the place of clipped steps: a record would have them, a log may not."""
        return "not known" if self.log is not None else "none was seen"

    @property
    def noun(self) -> str:
        """What one of the steps is called."""
        return "step" if self.axis == "optimizer step" else "entry"

    @property
    def spacing(self) -> float | None:
        """How many steps lie between two that are known; None where that is not known."""
        if self.log is not None:
            return self.log.spacing
        return spacing_of(self.step.astype(np.float64))


def known(run: Run, *, rank: int | None = None) -> Known:
    """Gather what is known of a run.

    Args:
        run: As it was read.
        rank: Whose norms of parameters to take, while other ranks may still write; None for all.
    """
    steps = run.steps
    order = np.argsort(np.asarray(steps.step), kind="stable")  # of a file that was put together

    def column(name: str) -> Any:
        return np.asarray(steps.column(name))[order]

    step = column("step").astype(np.int64)
    place = np.argsort(order)

    def texts(name: str) -> dict[int, str]:
        return {int(place[at]): text for at, text in steps.text(name).items()}

    about, parts, events, norms = _of_folder(run, rank)
    measured = np.zeros(len(steps), np.bool_)
    measured[steps.measured("loss")] = True
    return Known(
        name=run.name,
        counted=run.counted,
        axis=run.axis,
        norms_are=run.norms,
        step=step,
        norm=_of_log(run) if run.log is not None else column("norm_pre"),
        limit=_bounded(column("threshold")),
        loss=column("loss"),
        lost=measured[order] & ~np.isfinite(column("loss")),
        rate=column("lr") if run.log is None else run.log.rates,
        kept=column("coefficient"),
        clipped=column("clipped").astype(np.bool_),
        skipped=column("skipped").astype(np.bool_),
        nonfinite=column("nonfinite") > 0,
        tells_clipping=bool(
            column("clipped").any() or steps.patterns or steps.measured("threshold")
        ),
        reasons=texts("reason"),
        policies=texts("new_policy"),
        groups=_groups(steps, step),
        parameters=norms,
        is_euclidean=all(p == 2 for part in parts for p in part["orders"]),  # noqa: PLR2004
        events=events,
        about=about,
        log=run.log,
    )


def _of_log(run: Run) -> Numbers:
    """Return the norms of a log; what no gradients of numbers can have is not finite."""
    assert run.log is not None
    return np.where(run.log.is_norm | (run.log.norms == 0), run.log.norms, np.nan)


def _bounded(limits: Numbers) -> Numbers:
    return np.where(np.isfinite(limits), limits, np.nan)


def _groups(steps: Steps, step: Places) -> list[Group]:
    found = []
    for name in steps.patterns:
        at = np.searchsorted(step, np.asarray(steps.of_group(name, "norm_pre")[0]))
        columns = []
        for field in ("norm_pre", "threshold"):
            values = np.full(len(step), np.nan)
            values[at] = np.asarray(steps.of_group(name, field)[1])
            columns.append(values)
        found.append(Group(name, columns[0], _bounded(columns[1])))
    return found


def _of_folder(
    run: Run, rank: int | None
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]], Norms | None]:
    """Return what the folder of a record has beside its steps, of this optimizer."""
    folder = run.record
    if folder is None:
        return {}, [], [], None
    header = read_header(folder)
    if not folder.is_dir():
        return header, [], [], None
    about: dict[str, Any] = next(
        (e for e in header["optimizers"] if e["optimizer"] == run.optimizer), {}
    )
    parts = about.get("norms", [])
    events = [each for each in read_events(folder) if each.get("optimizer", 0) == run.optimizer]
    norms = read_norms(folder, optimizer=run.optimizer, rank=rank) if parts else None
    if norms is not None and not (len(norms.steps) and len(norms.names)):
        norms = None
    return {**header, **about}, parts, events, norms
