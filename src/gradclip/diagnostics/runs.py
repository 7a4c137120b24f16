"""The runs in a file, as figure and report draw them: of our records, and of others' logs."""

import math
from dataclasses import dataclass
from pathlib import Path

from gradclip.diagnostics.readers import LoggedRun, own_record, read_log
from gradclip.diagnostics.readers.source import open_log
from gradclip.diagnostics.record import StepRecord
from gradclip.diagnostics.summary import finding
from gradclip.record.columns import Steps
from gradclip.record.reader import read_steps

__all__ = ["Run", "read_runs"]

_LARGEST = 2**63
"""No step is as large."""


@dataclass(frozen=True, eq=False)
class Run:
    """A run that can be drawn.

    Attributes:
        name: The file, and which run of it, where it has several.
        steps: Its steps, or what a log has of them.
        counted: What they are.
        axis: What their numbers are.
        norms: What their norms are.
        record: The record that it is of, where it is of one.
        optimizer: Which of the record's optimizers.
        log: What was read, where it is a log of others.
    """

    name: str
    steps: Steps
    counted: str = "steps"
    axis: str = "optimizer step"
    norms: str = "gradient norm before clipping"
    record: Path | None = None
    optimizer: int = 0
    log: LoggedRun | None = None

    @property
    def has_norms(self) -> bool:
        """Whether a norm is finite, so that there is something to draw."""
        return any(map(math.isfinite, self.steps.column("norm_pre")))

    @property
    def finding(self) -> str:
        """What clipping did, in one line."""
        return finding(self.steps, counted=self.counted)


def read_runs(
    path: str | Path,
    *,
    norm_key: str | None = None,
    step_key: str | None = None,
    loss_key: str | None = None,
) -> list[Run]:
    """Read the runs of a record, one for each optimizer, or those of a log, whatever wrote it.

    Args:
        path: As ``read_log`` takes it.
        norm_key: The column of the norms of a log, where its name is not a known one.
        step_key: The column of the steps.
        loss_key: The column of the losses.

    Raises:
        LogError: GC303, it cannot be read, or has no norm.
        ArgumentValueError: GC010, a line of a record is damaged.
        MissingDependencyError: GC401, it is a TensorBoard event file, and tensorboard is missing.
    """
    source = open_log(path)
    parts = Path(path).parts
    # Many a folder is called "record", so it is named with the one around it.
    name = "/".join(parts[-2:]).lstrip("/") if source.path.is_dir() else Path(path).name
    if not (norm_key or step_key or loss_key) and own_record.claims(source):
        steps = read_steps(path)
        if not steps:
            raise source.error("it is a record without a step")
        numbers = sorted(set(steps.optimizer))
        if len(numbers) == 1:
            return [Run(name, steps, record=source.path, optimizer=numbers[0])]
        return [
            Run(
                f"{name}, optimizer {number}",
                Steps.of(step for step in steps if step.optimizer == number),
                record=source.path,
                optimizer=number,
            )
            for number in numbers
        ]
    runs = read_log(path, norm_key=norm_key, step_key=step_key, loss_key=loss_key)
    if len(runs) == 1:
        return [_logged(name, runs[0])]
    return [_logged(f"{name}, run {number}", run) for number, run in enumerate(runs, 1)]


def _logged(name: str, run: LoggedRun) -> Run:
    """Return what a log has of a run; what was clipped is known where it names the limit."""
    whole = run.spacing is not None and all(
        math.isfinite(step) and step.is_integer() and 0 <= step < _LARGEST
        for step in run.steps.tolist()
    )
    numbers = map(int, run.steps.tolist()) if whole else range(len(run.norms))
    steps = Steps.of(
        StepRecord(
            step=step,
            loss=None if math.isnan(loss) else loss,
            norm_pre=norm,
            threshold=run.limit,
            clipped=run.limit is not None and run.limit < norm < math.inf,
            nonfinite=int(not math.isfinite(norm)),
        )
        for step, norm, loss in zip(numbers, run.norms.tolist(), run.losses.tolist(), strict=True)
    )
    axis = "optimizer step" if whole else "norms in the log, counted from 0"
    return Run(name, steps, "logged steps", axis, "gradient norm, as it was logged", log=run)
