"""Of a table's columns, those that hold norm, step, loss and rate; or an error that lists them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradclip.diagnostics.arrays import np
from gradclip.diagnostics.readers import keys
from gradclip.diagnostics.readers.table import Table
from gradclip.errors import LogError

__all__ = ["Columns", "choose"]

_LISTED = 40
_ENOUGH = 0.5
_NEARLY_ALL = 0.9
_FEW = 10
_RUN = " - "
"""What W&B puts between the name of a run and that of a column."""


@dataclass(frozen=True)
class Columns:
    """The names of the columns of a table; None for what it does not have.

    ``step_is_above`` says that the step of a norm stands in a row above, as in a text that has a
    heading for each step.
    """

    norm: str
    step: str | None
    step_is_above: bool
    epoch: str | None
    loss: str | None
    rate: str | None
    limit: str | None


def choose(
    table: Table,
    path: Path,
    norm_key: str | None = None,
    step_key: str | None = None,
    loss_key: str | None = None,
) -> Columns:
    """Choose the columns by their names, but for those that are named.

    Raises:
        LogError: No column is a norm of gradients, or several are the norm of a part and none of
            all; or a column that is named is not there.
    """
    given = {"norm_key": norm_key, "step_key": step_key, "loss_key": loss_key}
    named = {option: _named(table, path, option, key) for option, key in given.items() if key}
    norm = named.get("norm_key") or _norm(table, path)
    step = named.get("step_key") or _step(table, norm, keys.STEPS)
    step_is_above = step is None and (step := _step_above(table, norm)) is not None
    return Columns(
        norm,
        step,
        step_is_above,
        _step(table, norm, ["epoch"]),
        named.get("loss_key") or _best(table, keys.LOSSES),
        _best(table, keys.RATES),
        _best(table, keys.LIMITS),
    )


def _norm(table: Table, path: Path) -> str:
    found = []
    for name in table.names:
        place = keys.rank(name, keys.NORMS)
        if place is not None:
            has_any = bool((table.column(name) > 0).any())
            found.append((not has_any, place, -table.count(name), name))
    if found:
        best = min(found)
        alike = [each[-1] for each in found if each[:2] == best[:2] and _RUN in each[-1]]
        if len(alike) > 1:
            raise LogError(
                f"{path} has the norms of {len(alike)} runs beside each other. Name the one to use "
                f"with norm_key (--norm-key):{_listed(alike)}"
            )
        _refuse_two_in_turn(table, path, best[-1], [name for *_, name in found])
        return best[-1]
    parts = [name for name in table.names if keys.is_part(name)]
    whole = [name for name in parts if keys.canonical(name).endswith("norm")]
    if len(whole) == 1:
        return whole[0]
    if parts:
        raise LogError(
            f"{path} has the norms of {len(parts)} parts and none of all gradients together. Name "
            f"the one to use with norm_key (--norm-key):{_listed(parts)}"
        )
    raise LogError(
        f"{path} has no column that is known as the norm of the gradients. Name it with norm_key "
        f"(--norm-key); the columns are:{_listed(table.names)}{_near('grad_norm', table.names)}"
    )


def _refuse_two_in_turn(table: Table, path: Path, norm: str, names: list[str]) -> None:
    """Refuse a log whose norms have one name at first, and another one later."""
    rows = table.rows_of(norm)
    for name in names:
        others = table.rows_of(name)
        if len(others) >= _FEW and (others[0] > rows[-1] or others[-1] < rows[0]):
            raise LogError(
                f"{path} has {len(rows)} norms named {norm!r} and, in other rows, {len(others)} "
                f"named {name!r}. Name the ones to use with norm_key (--norm-key)."
            )


def _named(table: Table, path: Path, option: str, key: str) -> str:
    if key in table.names:
        return key
    alike = [name for name in table.names if keys.canonical(name) == keys.canonical(key)]
    if len(alike) == 1:
        return alike[0]
    raise LogError(
        f"{path} has no column {key!r} ({option}); the columns are:"
        f"{_listed(table.names)}{_near(key, table.names)}"
    )


def _best(table: Table, known: Sequence[str]) -> str | None:
    ranked = ((keys.rank(name, known, last_part=True), name) for name in table.names)
    found = [(place, -table.count(name), name) for place, name in ranked if place is not None]
    return min(found)[-1] if found else None


def _step(table: Table, norm: str, known: Sequence[str]) -> str | None:
    """Return the best column that most rows with a norm have."""
    rows = table.rows_of(norm)
    found = []
    for name in table.names:
        place = keys.rank(name, known)
        if place is not None and np.isin(rows, table.rows_of(name)).mean() >= _ENOUGH:
            found.append((place, -table.count(name), name))
    return min(found)[-1] if found else None


def _step_above(table: Table, norm: str) -> str | None:
    """Return the best column that has one number between nearly any two norms."""
    rows = table.rows_of(norm)
    found = []
    for name in table.names:
        place = keys.rank(name, keys.STEPS)
        if place is None or keys.canonical(name) == "epoch":
            continue
        before = np.searchsorted(table.rows_of(name), rows)
        if (np.diff(before, prepend=0) == 1).mean() >= _NEARLY_ALL:
            found.append((place, name))
    return min(found)[-1] if found else None


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return "\n  " + (", ".join(names[:_LISTED]) or "none") + more


def _near(key: str, names: Iterable[str]) -> str:
    found = keys.nearest(key, names)
    return f"\n  nearest: {', '.join(found)}" if found else ""
