"""Where gradients were not finite: in which parameters, at which steps."""

from collections import Counter
from dataclasses import dataclass

from gradclip.diagnostics.arrays import np
from gradclip.diagnostics.known import Known
from gradclip.diagnostics.layers import layers_of
from gradclip.report.words import joined

__all__ = ["Faults", "faults_of"]

_FEW = 3
_MOST = 1000
"""Steps whose parameters are drawn."""


@dataclass(frozen=True)
class Faults:
    """Parameters whose norm was not finite.

    Attributes:
        names: By step, in the model's order; of a record without norms, the first eight. Steps
            in a row that have the same ones share one list.
        points: Step and parameter of each such norm, of the first steps.
        where: The layers in words, as the end of a sentence; empty where nothing is known, or
            where there are too many steps to say.
    """

    names: dict[int, list[str]]
    points: list[tuple[int, int]]
    where: str


def faults_of(run: Known) -> Faults:
    """Gather what is known of them."""
    names: dict[int, list[str]] = {}
    for event in run.events:
        if event["event"] == "nonfinite" and isinstance(event.get("parameters"), list):
            names.setdefault(event["step"], []).extend(map(str, event["parameters"]))
    if run.parameters is None:
        return Faults(names, [], "")
    steps, norms = run.parameters.steps, run.parameters.norms
    rows = np.flatnonzero(~np.isfinite(norms).all(1))
    points: list[tuple[int, int]] = []
    bad, columns, named = np.zeros(0, np.bool_), list[int](), list[str]()
    for place, (row, step) in enumerate(zip(rows.tolist(), steps[rows].tolist(), strict=True)):
        if not np.array_equal(bad, now := ~np.isfinite(norms[row])):
            bad, columns = now, np.flatnonzero(now).tolist()
            named = [run.parameters.names[column] for column in columns]
        names[step] = named
        if place < _MOST:
            points += [(step, column) for column in columns]
    return Faults(names, points, _where(names, run) if len(rows) <= _MOST else "")


def _where(names: dict[int, list[str]], run: Known) -> str:
    if not names or run.parameters is None:
        return ""
    layers = layers_of(run.parameters.names)
    of = {name: int(layer) for name, layer in zip(run.parameters.names, layers.of, strict=True)}
    steps = [frozenset(of[name] for name in each if name in of) for each in names.values()]
    every = frozenset[int]().union(*steps)
    if len(layers.names) == 1 or not every:
        return ""
    if len(every) == len(layers.names) and len(set(steps)) == 1:
        return ", in every layer"
    if len(every) <= _FEW:
        always = "each time " if len(set(steps)) == 1 and len(steps) > 1 else ""
        return f", {always}in {_named([layers.names[at] for at in sorted(every)])}"
    (layer, count), *_ = Counter(at for each in steps for at in each).most_common(1)
    often = f"{count:,} of {len(steps):,} times" if len(steps) > 1 else "among others"
    return f", in {layers.names[layer]} {often}"


def _named(names: list[str]) -> str:
    """Write ``layers 16 and 17``, or the names one after the other."""
    if len(names) > 1 and all(name.startswith("layer ") for name in names):
        names = [name.removeprefix("layer ") for name in names]
        return f"layers {joined(names)}"
    return joined(names)
