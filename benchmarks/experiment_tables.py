"""The tables of docs/explanation/experiments.md, from what ``benchmarks/experiments/`` wrote.

A line is a policy. A cell is the median over the seeds, with the least and the largest.
"""

from collections.abc import Callable
from statistics import fmean, median

from tables import Row, table
from timing import RESULTS, read

TRAINS = 0.8
"""The accuracy of a network that has learned the digits."""

Cell = Callable[[list[Row]], str]
"""What is said of the lines of one policy under one condition."""


def experiment(name: str) -> list[Row]:
    """Return the lines of an experiment."""
    return read(RESULTS / f"experiment_{name}.csv")


def by(rows: list[Row], *columns: str) -> dict[tuple[str, ...], list[Row]]:
    """Return the rows for each value of some columns, in the order of the file."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[column] for column in columns), []).append(row)
    return found


def of_policies(rows: list[Row], columns: tuple[str, ...], cells: dict[str, Cell]) -> str:
    """Return a table: for each condition so many cells.

    Args:
        rows: Of an experiment.
        columns: Of the file, whose values are the conditions.
        cells: By what stands in the head, where ``{}`` is for the condition.
    """
    found = {key: by(some, *columns) for key, some in by(rows, "policy").items()}
    heads = by(rows, *columns)
    lines = [
        [name, *(cell(of[each]) if each in of else "" for each in heads for cell in cells.values())]
        for (name,), of in found.items()
    ]
    head = [text.format(*condition) for condition in heads for text in cells]
    return table(["policy", *head], lines)


def accuracy(rows: list[Row]) -> str:
    return span([float(row["accuracy"]) for row in rows], 2)


def loss(rows: list[Row]) -> str:
    """Return the loss, or how many runs were lost."""
    lost = sum(row["lost"] == "True" for row in rows)
    return f"lost {lost} of {len(rows)}" if lost else span([float(row["loss"]) for row in rows], 2)


def span(values: list[float], digits: int) -> str:
    low, middle, high = (f"{v:.{digits}f}" for v in (min(values), median(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def clipped(rows: list[Row]) -> str:
    return percent([float(row["clipped"]) for row in rows])


def percent(shares: list[float]) -> str:
    return f"{100 * fmean(shares):.0f} %"


def recurrent() -> str:
    """E1: the accuracy at each learning rate."""
    return of_policies(experiment("recurrent"), ("lr",), {"lr {}": accuracy})


def wrong_scale() -> str:
    """E2: the loss, with batches of the wrong scale and without."""
    return of_policies(experiment("wrong_scale"), ("optimizer", "wrong"), {"{}, wrong: {}": loss})


def learning_rates() -> str:
    """E3: at which learning rates a policy trains, and how well at the best one."""
    lines = []
    for (name,), rows in by(experiment("learning_rates"), "policy").items():
        found = {
            lr: [float(row["accuracy"]) for row in some] for (lr,), some in by(rows, "lr").items()
        }
        trains = [lr for lr, accuracies in found.items() if min(accuracies) >= TRAINS]
        best = max(found, key=lambda lr: median(found[lr]))
        lines.append(
            [name, str(len(trains)), ", ".join(trains), f"{span(found[best], 2)} at {best}"]
        )
    head = ["policy", "trains at", "which", "best accuracy"]
    return table(head, lines)


def price() -> str:
    """E4: the loss, with noise and without."""
    cells: dict[str, Cell] = {"noise: {}": loss, "clipped": clipped}
    return of_policies(experiment("price"), ("noise",), cells)


def faults() -> str:
    """E5: the loss, with a NaN and an infinity."""
    cells: dict[str, Cell] = {"loss": loss, "steps not made": number("skipped")}
    return of_policies(experiment("faults"), (), cells)


def rescaled() -> str:
    """E6: the loss, and what is clipped in the end."""
    cells: dict[str, Cell] = {
        "{}: loss": loss,
        "clipped at the end": lambda rows: percent([float(row["clipped_at_end"]) for row in rows]),
        "by": number("coefficient_at_end"),
        "steps not made": number("skipped"),
    }
    return of_policies(experiment("rescaled"), ("optimizer",), cells)


def number(column: str) -> Cell:
    """Return the cell of a number's mean."""
    return lambda rows: f"{fmean(float(row[column]) for row in rows):.2g}"


MADE: tuple[Callable[[], str], ...] = (
    *(recurrent, wrong_scale, learning_rates, price, faults, rescaled),
)
