"""Where gradients were not finite: in which parameters, at which steps."""

from collections import Counter
from dataclasses import dataclass

from gradclip.diagnostics.arrays import np
from gradclip.report.known import Known
from gradclip.report.layers import layers_of

__all__ = ["Faults", "faults_of"]

_FEW = 3


@dataclass(frozen=True)
class Faults:
    """Parameters whose norm was not finite.

    Attributes:
        names: By step, in the model's order; of a record without norms, the first eight.
        points: Step and row of each such norm.
        where: The layers in words, as the end of a sentence; empty where nothing is known.
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
    points = []
    if run.parameters is not None:
        at, columns = np.nonzero(~np.isfinite(run.parameters.norms))
        points = list(zip(run.parameters.steps[at].tolist(), columns.tolist(), strict=True))
        found: dict[int, list[str]] = {}
        for step, column in points:
            found.setdefault(step, []).append(run.parameters.names[column])
        names |= found
    return Faults(names, points, _where(names, run))


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
        return f"layers {', '.join(names[:-1])} and {names[-1]}"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
