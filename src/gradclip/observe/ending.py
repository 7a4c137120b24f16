"""What is said at the end of a run: five lines for each optimizer, after what the script said."""

import math
import os
import sys
from typing import TYPE_CHECKING

from gradclip.diagnostics.summary import compact, percent
from gradclip.errors import GradClipError
from gradclip.observe.folder import rank_and_processes

if TYPE_CHECKING:
    from gradclip.observe.tally import Tally
    from gradclip.observe.track import Track
    from gradclip.observe.watch import Watch

__all__ = ["lines"]

_MOST = 4
"""Optimizers that are told of."""

_EUCLIDEAN = 2.0
"""Order of the norm that shares and suggestions are usually of."""

_HALF = 0.5

_NOTHING = (
    "gradclip run: no step of a torch optimizer was seen. Steps inside torch.compile, in other "
    "programs, and of optimizers that are not torch's cannot be seen."
)


def lines(watch: "Watch | None", problem: str | None) -> list[str]:
    """Return what was found; nothing on ranks other than the first.

    Args:
        watch: Who watched; None where nothing happened that is watched.
        problem: Why nobody watched, if that was so.
    """
    is_first = rank_and_processes()[0] == 0
    if watch is None:
        stopped = problem is not None
        nothing = [f"gradclip run: the script could not be watched: {problem}"]
        return nothing if stopped else [_nothing()] if is_first else []
    said = []
    tracks = [track for track in watch.tracks if track.tally.recorded]
    if is_first and all(track.place.rank == 0 for track in tracks):
        for track in tracks[:_MOST]:
            said += _of_optimizer(track, watch, len(tracks) > 1)
        if len(tracks) > _MOST:
            rest = len(tracks) - _MOST + watch.unrecorded
            said.append(f"  more    {rest} other optimizers; the record has {len(tracks)}")
        if tracks:
            said.append(f"  record  {_shown(watch)}")
        elif watch.error is None:
            said.append(_nothing())
    if watch.error is not None:
        last = watch.error.strip().splitlines()[-1]
        said.append(
            f"gradclip run: watching stopped early, the script went on without it. Please report "
            f"this, with the version of torch: {last}"
        )
    return said


def _nothing() -> str:
    error = getattr(sys, "last_type", None)  # what the interpreter showed as the script's end
    if error is None:
        return _NOTHING
    return (
        f"gradclip run: the script ended with {error.__name__} before a step of a torch optimizer "
        "was seen."
    )


def _shown(watch: "Watch") -> str:
    try:
        return os.path.relpath(watch.folder)
    except (OSError, ValueError):  # the script's folder is gone, or on another drive
        return str(watch.folder)


def _of_optimizer(track: "Track", watch: "Watch", is_one_of_several: bool) -> list[str]:
    tally = track.tally
    which = f" {track.number}" if is_one_of_several else ""
    model = f" ({track.model})" if track.model is not None else ""
    return [
        f"gradclip run: {track.count} steps of {track.kind}{which}{model}",
        *_left_out(track),
        f"  layer   {_layer(track, watch)}",
        f"  share   {_share(track)}",
        f"  limit   {_limit(tally)}",
        f"  events  {_events(track)}",
    ]


def _left_out(track: "Track") -> list[str]:
    """Say that steps were left out, where that is so."""
    if not track.unmeasured:
        return []
    measured = f"{track.count - track.unmeasured} of {_steps(track.count)}"
    if len(track.tally.norms) == track.count:  # the script clips, and so tells the norm of each
        said = f"the norms of layers were measured at {measured}"
    else:
        said = f"{measured} were measured, so the largest spikes may be missing"
    return [f"  steps   {said}: gradclip run --every 1 measures all"]


def _layer(track: "Track", watch: "Watch") -> str:
    tally = track.tally
    where = "of the part on this process, " if track.is_sharded else ""
    if tally.heaviest is None or tally.largest is None:
        return "the norms of layers are not known"
    name, share = tally.heaviest
    most = "most" if share >= _HALF else "the largest part"
    culprit = None if track.is_sharded else _culprit(track, watch)
    if culprit is not None:
        return f"{culprit}; on average {name} has {most} of it, {percent(share)}"
    norm, step, at_largest, share_there = tally.largest
    then = "it has" if at_largest == name else f"{at_largest} has"
    of_it = " of its square" if tally.order == _EUCLIDEAN else ""
    measured = "measured " if track.unmeasured else ""
    return (
        f"{where}{name} has {most} of the norm, {percent(share)}{of_it} on average; at the "
        f"largest {measured}norm, {compact(norm)} at step {step}, {then} {percent(share_there)}"
    )


def _culprit(track: "Track", watch: "Watch") -> str | None:
    """Name the layer that makes the spikes, as ``gradclip report`` does; None where none does."""
    try:
        from gradclip.diagnostics import blame as rule  # noqa: PLC0415 - it needs numpy
        from gradclip.diagnostics.known import known  # noqa: PLC0415
        from gradclip.diagnostics.runs import read_runs  # noqa: PLC0415

        runs = read_runs(watch.folder)
        run = next(known(each, rank=0) for each in runs if each.optimizer == track.number)
    except (ImportError, GradClipError, StopIteration):
        return None
    steps = rule.outstanding(run)
    found = rule.blame(run, steps)
    if found is None or found.verdict != "makes":
        return None
    at = found.layer
    within = [
        part if layer == at else -1
        for part, layer in zip(found.of_parameters, found.layers.of, strict=True)
    ]
    assert run.parameters is not None
    heaviest = run.parameters.names[within.index(max(within))]
    of_them = f"{found.steps} of " if found.steps < steps.count else ""
    kind = "clipped step" if steps.are_clipped else "spike"
    count = f"one {kind}" if steps.count == 1 else f"{steps.count} {kind}s"
    return (
        f"{found.layers.names[at]} {steps.made}, most by {heaviest}: "
        f"{percent(float(found.share[at]))} of the squared norm in {of_them}the {count}"
    )


def _share(track: "Track") -> str:
    tally = track.tally
    if not tally.limited:
        if tally.limits:
            return "how many steps were clipped is not known: no norm of all gradients was seen"
        if tally.clipped:
            return f"elements were clamped at {_of(tally.clipped, tally.recorded)}"
        return f"no clipping was seen ({_steps(tally.recorded)} recorded)"
    if tally.limited < tally.recorded:
        share = percent(tally.clipped / tally.limited)
        why = "a limit and a finite norm" if tally.nonfinite else "a limit"
        steps = f"{tally.clipped} of the {_steps(tally.limited)} that had {why}"
        return f"{steps} ({share}) were clipped"
    return f"{_of(tally.clipped, tally.limited)} were clipped"


def _of(part: int, whole: int) -> str:
    return f"{part} of {_steps(whole)} ({percent(part / whole)})"


def _limit(tally: "Tally") -> str:
    limit = None
    if not tally.limits:
        said = "none was seen"
    else:
        (limit, _), *_ = tally.limits.most_common(1)
        others = len(tally.limits) - 1
        said = f"{compact(limit)} is in force"
        said += f", at other steps {others} other ones" if others else ""
    return f"{said}; {_advice(tally, limit)}"


def _advice(tally: "Tally", limit: float | None) -> str:
    if not tally.norms:
        return "none can be suggested: no norm of all gradients was seen"
    if tally.order != _EUCLIDEAN:
        return f"none is suggested: the script limits the norm of order {tally.order:g}, not of 2"
    try:
        from gradclip.diagnostics.advice import suggest  # noqa: PLC0415 - it needs numpy
    except ImportError as error:
        return f"none can be suggested without {error.name}"
    steps, norms, losses, rates = zip(*tally.norms, strict=True)
    advice = suggest(norms, steps=steps, losses=losses, rates=rates, limit=limit)
    if advice.policy is None:
        return f"none is suggested: {advice.reason}"
    share = percent(advice.clip_fraction or 0.0)
    finite = sum(0 < norm < math.inf for norm in norms)
    return f"suggested is {advice.line}, which would have clipped {share} of {finite} steps"


def _events(track: "Track") -> str:
    tally, said = track.tally, []
    if tally.first_nonfinite is not None:
        said.append(_nonfinite(track, *tally.first_nonfinite))
    if tally.skips:
        reasons = ", ".join(f"{count} for {reason}" for reason, count in tally.skips.items())
        said.append(f"{_steps(sum(tally.skips.values()))} not made ({reasons})")
    if tally.first_spike is not None:
        count = _steps(tally.spikes)
        said.append(f"{count} cut to less than a tenth, first step {tally.first_spike}")
    return "; ".join(said) + _lost(track) if said else "none"


def _nonfinite(track: "Track", step: int, names: list[str]) -> str:
    """Say how many steps had a NaN or an infinity, and where."""
    tally = track.tally
    count, others = _steps(tally.nonfinite), len(names) - 1
    if tally.recorded < track.count:
        count = f"{tally.nonfinite} of the {tally.recorded} measured steps"
    where = f", in {names[0]}" if names else ""
    where += f" and {others} other{'s' * (others > 1)}" if others > 0 else ""
    if 1 < len(names) == tally.parameters:
        where = f", in all {len(names)} parameters"
    return f"{count} with a NaN or an infinity, first step {step}{where}"


def _lost(track: "Track") -> str:
    """Say what a NaN or an infinity did to the weights, and what would have kept them."""
    tally = track.tally
    if tally.lost_at in (None, tally.last):  # an error may have kept the last from being made
        return ""
    # Of a step that was left out nobody knows whether it was the first.
    before = " or one before it" if track.unmeasured else ""
    return (
        f". Step {tally.lost_at}{before} was made, so the weights have a NaN or an infinity since "
        "then. gradclip.attach(optimizer, gradclip.GuardClip()) would have left it out. Look at "
        "the batch and the loss of that step; docs/how-to/loss-is-nan.md says more"
    )


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"
