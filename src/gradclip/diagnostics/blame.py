"""Which layer makes the steps that stand out: those that were clipped, or else the spikes."""

from dataclasses import dataclass

from gradclip.diagnostics.arrays import Flags, Numbers, np
from gradclip.diagnostics.known import Known
from gradclip.diagnostics.layers import Layers, layers_of, mean_shares
from gradclip.diagnostics.norm_statistics import level

__all__ = ["Blame", "blame", "outstanding"]

_SPIKE = 3
"""Norms this many times the 90th percentile are spikes, as for ``gradclip suggest``."""
_FEWEST = 30
_ENOUGH = 100
"""Norms that tell what one in ten exceeds."""
_EXCEPTIONS = 0.1
_OFTEN = 0.1
"""Where more steps than this were clipped, one does not call them spikes."""
_LARGE = 0.2
_LIFT = 1.5
_MOST = 0.5


@dataclass(frozen=True, eq=False)
class Outstanding:
    """The steps of which one asks which layer made them.

    Attributes:
        which: Which steps.
        are_clipped: Whether they are the clipped ones; else they are spikes.
        settled: The usual norm after a beginning of higher ones, which are no spikes; else None.
    """

    which: Flags
    are_clipped: bool
    settled: float | None

    @property
    def count(self) -> int:
        """How many they are."""
        return int(self.which.sum())

    @property
    def made(self) -> str:
        """What the layer that makes them does, in words."""
        is_frequent = self.are_clipped and self.count > _OFTEN * len(self.which)
        return "drives the clipping" if is_frequent else "makes the spikes"


@dataclass(frozen=True, eq=False, kw_only=True)
class Blame:
    """What layers and parameters have of the squared norm.

    Attributes:
        layers: The layers.
        share: The mean share of each layer in the steps that stand out; in all, where none does.
        usual: The mean share of each layer in the other steps.
        of_parameters: As ``share``, of each parameter.
        usual_of_parameters: As ``usual``, of each parameter.
        steps: How many steps that stand out have norms of parameters.
        others: How many of the others have.
        layer: The layer that is named, or None.
        verdict: "makes" the steps that stand out, has "most" of the norm there, or "none" does.
    """

    layers: Layers
    share: Numbers
    usual: Numbers
    of_parameters: Numbers
    usual_of_parameters: Numbers
    steps: int
    others: int
    layer: int
    verdict: str


def outstanding(run: Known) -> Outstanding:
    """Return the steps to ask about: clipped ones where these are few, else spikes.

    Which steps a limit clips says as much of the limit as of the layers, so clipped steps count
    where they are exceptions, and where there are no spikes.
    """
    count = int(run.clipped.sum())
    clipped = Outstanding(run.clipped, are_clipped=True, settled=None)
    if 0 < count <= _EXCEPTIONS * len(run):
        return clipped
    spikes = _spikes(run)
    return clipped if 0 < count <= len(run) / 2 and not spikes.count else spikes


def _spikes(run: Known) -> Outstanding:
    which = np.zeros(len(run), np.bool_)
    if len(run.usable) < _FEWEST:
        return Outstanding(which, are_clipped=False, settled=None)
    found = level(run.usable, np.full(len(run.usable), np.nan))
    settled = run.usable[found.cut :]
    largest = settled > _SPIKE * _surrounding_p90(settled)
    places = np.flatnonzero(np.isfinite(run.norm) & (run.norm > 0))
    which[places[found.cut :][largest]] = True
    fell = bool((run.usable[: found.cut] > _SPIKE * found.p90).any())
    return Outstanding(which, are_clipped=False, settled=found.median if fell else None)


def _surrounding_p90(norms: Numbers) -> Numbers:
    """Return what one norm in ten exceeds, in each tenth of the norms: their level may move."""
    parts = np.array_split(norms, min(max(len(norms) // _ENOUGH, 1), 10))
    return np.concatenate([np.full(len(part), np.quantile(part, 0.9)) for part in parts])


def blame(run: Known, steps: Outstanding) -> Blame | None:
    """Say which layer it is; None where the norms of parameters do not tell."""
    if run.parameters is None or not run.is_euclidean:
        return None
    layers, norms = layers_of(run.parameters.names), run.parameters.norms
    stands_out = np.isin(run.parameters.steps, run.step[steps.which])
    of_parameters, count = mean_shares(norms, stands_out)
    usual, others = mean_shares(norms, ~stands_out)
    if not count:
        of_parameters = usual
    if not (count or others):
        return None
    of_layers, usual_of_layers = layers.added(of_parameters), layers.added(usual)
    layer = int(np.argmax(of_layers))
    if count and others and of_layers[layer] >= max(_LARGE, _LIFT * usual_of_layers[layer]):
        verdict = "makes"
    else:
        verdict = "most" if of_layers[layer] >= _MOST else "none"
    return Blame(
        layers=layers,
        share=of_layers,
        usual=usual_of_layers,
        of_parameters=of_parameters,
        usual_of_parameters=usual,
        steps=count,
        others=others,
        layer=layer,
        verdict=verdict if len(layers.names) > 1 else "none",
    )
