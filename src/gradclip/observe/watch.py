"""Watches the steps of this process; what goes wrong here stops the watching, and no training."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from threading import RLock
from time import perf_counter
from traceback import format_exc
from typing import Any, Concatenate, ParamSpec, cast
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn
from torch.optim import Optimizer

from gradclip.observe.clips import Clip, Clips, Seen
from gradclip.observe.governor import Governor
from gradclip.observe.names import Names
from gradclip.observe.norms import norms_of
from gradclip.observe.step import ObservedStep
from gradclip.observe.track import Track

__all__ = ["Watch"]

_MOST_OPTIMIZERS = 64

_Arguments = ParamSpec("_Arguments")


def _guarded(
    method: "Callable[Concatenate[Watch, _Arguments], None]",
) -> "Callable[Concatenate[Watch, _Arguments], None]":
    """Have a method raise nothing, and count its time."""

    @wraps(method)
    def call(self: "Watch", *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        if self.error is not None:
            return
        began = perf_counter()
        try:
            with self._lock:
                method(self, *args, **kwargs)
        except Exception:  # noqa: BLE001 - whatever it is, the script goes on
            self.error = format_exc()
        finally:
            took = perf_counter() - began
            self.spent += took
            self.seconds += took

    return cast("Callable[Concatenate[Watch, _Arguments], None]", call)


class Watch:
    """Sees losses, clips and steps, and records them.

    Args:
        folder: Where to.
        about: What ``run.json`` says of the run.
        every: Which steps to measure; None to choose it.

    Attributes:
        folder: Where to.
        error: What went wrong here; nothing is watched any more then.
        spent: Seconds that watching took since the last step.
        seconds: Seconds that watching took altogether.
        steps_seen: How many steps began, of all optimizers.
        unrecorded: How many optimizers are not recorded, since there are too many.
    """

    def __init__(self, folder: Path, about: dict[str, Any], every: int | None) -> None:
        self.folder, self._about = folder, about
        self.governor = Governor(every)
        self.tracks: list[Track] = []
        self.error: str | None = None
        self.spent, self.seconds, self.steps_seen, self.unrecorded = 0.0, 0.0, 0, 0
        self._names, self._clips, self._lock = Names(), Clips(), RLock()
        self._by_optimizer: WeakKeyDictionary[Any, Track | None] = WeakKeyDictionary()
        self._track_of: dict[int, Track] = {}
        """By the id of a parameter: which optimizer had it last."""
        self._depth = 0
        self._found: tuple[Tensor, Tensor | None, float] | None = None
        self._scaled: tuple[ref[Tensor], Tensor] | None = None
        self._loss: Tensor | None = None
        self._is_old = False
        self._underway: ObservedStep | None = None
        """The step that is being made: those that clip in a hook of the optimizer come now."""
        self._was_due = False
        self._engine: Any = None

    # the loss

    @_guarded
    def backward_begins(self, root: Tensor) -> None:
        """Take what a backward pass begins at; what came since the last step is added up."""
        if root.numel() != 1 or type(root) is not Tensor:
            return
        if not self._wants_loss():
            self._loss = None
            return
        if self._scaled is not None and self._scaled[0]() is root:
            root = self._scaled[1]
        loss = root.detach()
        before = self._loss
        if self._is_old or before is None or before.shape != loss.shape:
            self._loss, self._is_old = loss.clone(), False
        else:
            self._loss = before.to(loss.device) + loss

    def _wants_loss(self) -> bool:
        """Return whether there may be something to say of the next step."""
        if not self.tracks or len(self._clips) or self._scaled is not None:
            return True
        return any(self.governor.is_due(track.count) for track in self.tracks)

    @_guarded
    def loss_scaled(self, loss: Any, scaled: Any) -> None:
        """Remember which loss a scaled one is."""
        if isinstance(loss, Tensor) and isinstance(scaled, Tensor) and loss.numel() == 1:
            self._scaled = ref(scaled), loss.detach()

    @_guarded
    def closure_begins(self, call: int) -> None:
        """Begin a new loss, where a closure is evaluated."""
        if call == 1:
            self._is_old = True

    # clips

    @_guarded
    def total_found(
        self, total: Tensor, gradients: Any, norms_T: Tensor | None, order: float
    ) -> None:
        """Take the norm that torch found of some gradients, and those that it found on the way."""
        count = 1 if isinstance(gradients, Tensor) else len(gradients)
        known = type(norms_T) is Tensor and norms_T.numel() == count
        norms_T = norms_T if known else None
        self._found = total, norms_T, float(order)

    @contextmanager
    def clipping(
        self,
        parameters: Any,
        limit: Any = None,
        total: Any = None,
        *,
        order: float = 2.0,
        scale: Any = None,
        clamps: bool = False,
    ) -> Iterator[Seen]:
        """Be around a function that clips; only the outermost one counts.

        Args:
            parameters: What it clips; a tensor, or a list.
            limit: The norm that they may have.
            total: The norm that they have, if it was found before.
            order: p of that norm, if it was not.
            scale: What gradients are still multiplied by.
            clamps: Whether elements are clamped, so that the norms afterwards have to be measured.
        """
        seen = Seen()
        if self._depth:
            yield seen
            return
        made: list[Clip] = []
        self._clip_begins(made, parameters, (limit, total, order, scale))
        self._depth += 1
        try:
            yield seen
        finally:
            self._depth -= 1
        if made:
            self._clip_ends(made[0], parameters, seen, clamps)

    @_guarded
    def _clip_begins(self, made: list[Clip], parameters: Any, known: tuple[Any, ...]) -> None:
        limit, total, order, scale = known
        given = [parameters] if isinstance(parameters, Tensor) else parameters
        live = [each for each in given if each.grad is not None]
        clip = Clip(tuple(map(id, live)), limit, total, float(order), scale)
        found, self._found = self._found, None
        if self._is_underway(clip.ids):
            pass  # its gradients were measured as the step began
        elif found is not None and total is found[0]:
            clip.order = found[2]
            if found[1] is not None and len(live) == found[1].numel():
                clip.norms_T = clip.ids, found[1]
        if clip.norms_T is None and self._wants_norms(clip.ids):
            clip.norms_T = norms_of(live, clip.order)
        made.append(clip)

    @_guarded
    def _clip_ends(self, clip: Clip, parameters: Any, seen: Seen, clamps: bool) -> None:
        if seen.total is not None:
            clip.total = seen.total
        clip.result = seen.result
        if clamps and clip.norms_T is not None:
            given = [parameters] if isinstance(parameters, Tensor) else parameters
            clip.left_T = norms_of([each for each in given if each.grad is not None], 2.0)
        if self._underway is not None and self._is_underway(clip.ids):
            self._underway.clips.append(clip)
        else:
            self._clips.add(clip)

    def _is_underway(self, ids: tuple[int, ...]) -> bool:
        """Return whether a step has begun that is made with these gradients: a hook clips them."""
        return self._underway is not None and bool(ids) and ids[0] in self._underway.track.places

    def _wants_norms(self, ids: tuple[int, ...]) -> bool:
        if not ids or self._is_underway(ids):
            return False
        track = self._track_of.get(ids[0])
        return track is None or self.governor.is_due(track.count)

    # steps

    def step(self, optimizer: Any, left_out: str | None = None) -> None:
        """Take a step, before it is made.

        Args:
            optimizer: Of which.
            left_out: Why it is not made; None where it is.
        """
        self.steps_seen += 1
        self._step(optimizer, left_out)

    def step_left_out(self, optimizer: Any, why: str) -> None:
        """Take a step that is not made."""
        self.step(optimizer, why)
        self.step_ends()

    @_guarded
    def step_ends(self) -> None:
        """Take the end of a step."""
        self._settle()

    @contextmanager
    def engine_steps(self, engine: Any) -> Iterator[None]:
        """Be around a step of DeepSpeed, which has its own optimizers inside."""
        made, skipped = _counts_of(engine)
        self._engine = engine
        try:
            yield
        finally:
            self._engine = None
        now = _counts_of(engine)
        if now[0] != made:
            self._engine_stepped(engine, now[1] != skipped)

    def finish(self) -> None:
        """Write what there is."""
        self._finish()

    @_guarded
    def _finish(self) -> None:
        self._settle()
        for track in self.tracks:
            track.close()

    @_guarded
    def _step(self, optimizer: Any, left_out: str | None) -> None:
        if self._engine is not None:
            return
        if self._underway is not None:
            if _depth_of_steps() > (left_out is None) and self._is_of(self._underway, optimizer):
                return  # inside the step of an optimizer that has the same parameters
            self._settle()  # one that raised
        track = self._track(optimizer)
        if track is None:
            return
        is_due = self.governor.is_due(track.count)  # as it was when the loss and clips were seen
        self._govern()
        step = ObservedStep(track, track.count, perf_counter(), self._loss, left_out)
        if is_due or left_out is not None or len(self._clips):
            self._look(step, optimizer, is_due=is_due)
        track.count += 1
        track.unmeasured += not is_due
        self._underway, self._is_old, self._was_due = step, True, is_due

    def _look(self, step: ObservedStep, optimizer: Any, *, is_due: bool) -> None:
        """Take what a step is made with."""
        track, groups = step.track, optimizer.param_groups
        rate = groups[0].get("lr") if groups else None
        step.lr = rate.detach().clone() if isinstance(rate, Tensor) else rate
        scale, found_inf = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
        step.scale = scale if isinstance(scale, Tensor) else None
        step.found_inf = found_inf if isinstance(found_inf, Tensor) else None
        if not is_due and len(self._clips) and track.last_ids:
            step.clips = self._clips.again(track.last_ids, track.number)
            if step.clips:
                return
        live = [each for group in groups for each in group["params"] if each.grad is not None]
        ids = tuple(map(id, live))
        if ids and self._track_of.get(ids[0]) is not track:
            self._track_of.update(dict.fromkeys(ids, track))
        step.clips = clips = self._clips.of(ids, track.number) if len(self._clips) else []
        track.last_ids = ids
        if is_due:
            track.know(groups, ids, self._names)
            step.parts = [clip.norms_T for clip in clips if clip.norms_T is not None]
            if len(clips) != 1 or clips[0].ids != ids:
                clipped: set[int] = set().union(*(clip.members for clip in clips))
                rest = [each for each in live if id(each) not in clipped]
                if rest:
                    step.parts.append(norms_of(rest, clips[0].order if clips else 2.0))

    @_guarded
    def _engine_stepped(self, engine: Any, is_skipped: bool) -> None:
        track = self._track(engine)
        if track is None:
            return
        step = ObservedStep(track, track.count, perf_counter(), self._loss, None)
        track.count += 1
        limit = engine.gradient_clipping() or None
        total = engine.get_global_grad_norm()
        step.clips = [Clip((), limit, None if total is None else float(total))]
        step.left_out = "overflow" if is_skipped else None
        self._is_old = True
        track.add(step)

    def _settle(self) -> None:
        """Record the step that is over, if there is something to say of it."""
        step, self._underway = self._underway, None
        if step is not None and step.tells:
            step.track.add(step)

    def _govern(self) -> None:
        """Choose anew how often to measure."""
        spent, self.spent = self.spent, 0.0
        if self.governor.add(perf_counter(), spent, measured=self._was_due):
            for track in self.tracks:
                track.thinned(self.governor.every)

    def _is_of(self, step: ObservedStep, optimizer: Any) -> bool:
        """Return whether an optimizer has parameters of a step that is being made."""
        groups = optimizer.param_groups
        return any(id(each) in step.track.places for group in groups for each in group["params"])

    def _track(self, optimizer: Any) -> Track | None:
        """Return where the steps of an optimizer go; None where it only calls another one."""
        if optimizer in self._by_optimizer:
            return self._by_optimizer[optimizer]
        track = None
        if isinstance(optimizer, nn.Module) or not _is_wrapper(optimizer):
            if len(self.tracks) < _MOST_OPTIMIZERS:
                track = Track(self.folder, type(optimizer).__name__, self._about)
                self.tracks.append(track)
                if self.governor.every > 1:
                    track.thinned(self.governor.every)
            else:
                self.unrecorded += 1
        self._by_optimizer[optimizer] = track
        return track


def _counts_of(engine: Any) -> tuple[Any, Any]:
    """Return how many steps an engine of DeepSpeed made, and how many it left out."""
    return getattr(engine, "global_steps", None), getattr(engine, "skipped_steps", None)


def _is_wrapper(optimizer: Any) -> bool:
    """Return whether it hands its steps to another optimizer, whose steps are seen."""
    return isinstance(vars(optimizer).get("optimizer"), Optimizer)


def _depth_of_steps() -> int:
    """Return inside how many steps of optimizers this is called."""
    depth, frame = 0, sys._getframe()  # noqa: SLF001 - there is no other way to ask
    while frame.f_back is not None:
        frame = frame.f_back
        depth += frame.f_code.co_qualname == "Optimizer.profile_hook_step.<locals>.wrapper"
    return depth
