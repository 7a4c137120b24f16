"""What a run resumes from, and what a run must leave alone: the checkpoints of another one."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from gradclip.errors import ArgumentValueError, CheckpointError
from gradclip.pipeline.checkpoint import robo_orchard
from gradclip.pipeline.checkpoint.store import holds_checkpoints, last_step
from gradclip.pipeline.processes import together

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["AUTO", "refuse_another_run", "resumed_path"]

AUTO = "auto"
"""Resume where there is a checkpoint, and start where there is none."""


def resumed_path(
    resume_from: str | None, roots: Iterable[Path], accelerator: "Accelerator"
) -> Path | None:
    """Return where a checkpoint is looked for; None to start from scratch.

    Args:
        resume_from: A checkpoint, a folder of them, ``"auto"``, or None.
        roots: The folders that the run saves to.
        accelerator: Knows the processes.

    Raises:
        ArgumentValueError: GC010, ``"auto"``, and the run saves nowhere.
        CheckpointError: GC301, it is on another machine.
    """
    if resume_from is not None and "://" in resume_from:
        raise CheckpointError(
            f"resume_from is {resume_from!r}, on another machine: copy the checkpoint to a folder, "
            "and name that"
        )
    if resume_from != AUTO:
        return None if resume_from is None else Path(resume_from)
    roots = list(roots)
    if not roots:
        raise ArgumentValueError(
            'resume_from="auto" resumes from the folder that SaveCheckpoint saves to, and there is '
            "no SaveCheckpoint among hooks. Add one, or name a checkpoint."
        )
    found = None
    with together(accelerator) as all_processes:
        if accelerator.is_main_process:
            found = max(filter(holds_checkpoints, roots), key=last_step, default=None)
            found = found or next(filter(robo_orchard.find, roots), None)
    return all_processes.from_main(found)


def refuse_another_run(root: Path, resume_from: str | None) -> None:
    """Refuse to save among the checkpoints of a run that this one does not go on with.

    Raises:
        CheckpointError: GC301, there are some.
    """
    goes_on = resume_from == AUTO or (
        resume_from is not None
        and root.resolve() in (Path(resume_from).resolve(), Path(resume_from).resolve().parent)
    )
    if goes_on or not holds_checkpoints(root):
        return
    raise CheckpointError(
        f"{root} has the checkpoints of an earlier run, which got to batch {last_step(root)}, and "
        "this run would save among them and remove the oldest. Nothing was changed. Three ways "
        'out: go on with that run (resume_from="auto", which starts where there is nothing and '
        f'resumes where there is something, or resume_from="{root}"); give this run another '
        "save_root; or move that folder away."
    )
