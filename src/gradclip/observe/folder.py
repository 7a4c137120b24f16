"""Which folder a run is recorded in: one that is given, or a new numbered one.

The processes of one launch share it, though none asks another one: they have their parent, or the
place where they meet, in common. The first one makes the folder and links a note of its number to a
name that all of them know; the others read it there. The last one to read it deletes it.
"""

import os
import secrets
from contextlib import suppress
from pathlib import Path

from gradclip.errors import ArgumentValueError, RecordError
from gradclip.record.lines import ranked

__all__ = ["RUNS", "make_folder", "rank_and_processes"]

RUNS = "gradclip-runs"
"""Has the folders that are numbered."""


def rank_and_processes() -> tuple[int, int]:
    """Return what a launcher said: which process this is, and of how many."""
    rank, processes = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return (int(rank), int(processes)) if rank.isdecimal() and processes.isdecimal() else (0, 1)


def make_folder(given: Path | None) -> Path:
    """Make the folder of this run, and return where it is, whatever the script's folder becomes.

    Args:
        given: The one that was asked for; None for ``gradclip-runs/1``, or the next free number.

    Raises:
        ArgumentValueError: GC010, several machines would each make one.
        RecordError: GC302, it cannot be written, or has a record already.
    """
    rank, processes = rank_and_processes()
    folder = Path.cwd() / (given or RUNS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if given is None:
            return _numbered(folder, _launch(processes), processes)
    except OSError as error:
        raise RecordError(
            f"the folder {folder} cannot be made: {error.strerror or error}. Give another one: "
            "--out DIR. The script was not started."
        ) from error
    if (folder / ranked("run.json", rank)).exists():
        raise RecordError(
            f"the folder {folder} has the record of another run. Give another one, or delete it, "
            "or leave out --out for a new one. The script was not started."
        )
    return folder


def _launch(processes: int) -> str | None:
    """Return what the processes of this launch have in common; None for one alone."""
    if processes == 1:
        return None
    known = os.environ.get
    if known("LOCAL_WORLD_SIZE", str(processes)) != str(processes):
        raise ArgumentValueError(
            "processes on several machines cannot agree on a numbered folder. Give them one that "
            "they share: --out DIR. The script was not started."
        )
    names = ("MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    parts = [str(os.getppid()), *(known(name, "") for name in names)]
    with suppress(OSError):  # when the parent was started: its number comes again some day
        text = Path(f"/proc/{os.getppid()}/stat").read_text(encoding="utf-8")
        parts.append(text.rpartition(")")[2].split()[19])
    return "-".join("".join(filter(str.isalnum, part)) for part in parts)


def _numbered(runs: Path, launch: str | None, processes: int) -> Path:
    taken = [int(path.name) for path in runs.iterdir() if path.name.isdecimal()]
    number = max(taken, default=0) + 1
    while True:
        try:
            (runs / str(number)).mkdir()
            break
        except FileExistsError:
            number += 1
    folder = runs / str(number)
    if launch is None:
        return folder
    note, draft = runs / f".launch-{launch}", runs / f".{secrets.token_hex(8)}"
    draft.write_text(f"{number} ", encoding="utf-8")
    try:
        note.hardlink_to(draft)
    except FileExistsError:  # another process of this launch was first
        folder.rmdir()
        folder = runs / note.read_text(encoding="utf-8").partition(" ")[0]
    finally:
        draft.unlink()
    with note.open("a+", encoding="utf-8") as names:
        names.write("x")  # one for each process that knows the number
        names.flush()
        names.seek(0)
        is_last = names.read().count("x") == processes
    if is_last:
        note.unlink(missing_ok=True)
    return folder
