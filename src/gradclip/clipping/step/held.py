"""The ``step`` of an optimizer, held: it is asked before each call whether to make it.

What is withheld is not called. To drop the gradients, or to zero them, is not enough: optimizers
make zeros of None, count their steps, average their weights, or step another optimizer. So the
instance gets a bound method in the place of ``step``, which LR schedulers, ``GradScaler`` and
profilers take for the one that they know.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from itertools import chain
from operator import attrgetter
from threading import local
from types import MethodType
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from gradclip.clipping.flags import Flag, any_of
from gradclip.clipping.step.wrappers import arguments_of, is_replaceable, unwrapped, wrapped
from gradclip.errors import ArgumentTypeError, ArgumentValueError, warn

_UNSET = object()
_HELD = "_gradclip_held"
"""An attribute of the function that holds a step; ``functools.wraps`` hands it on to others."""


_lasts = attrgetter("lasts")


class Gate(Protocol):
    """Is asked before each step of an optimizer."""

    label: str
    """What an error calls it."""
    lasts: bool
    """Whether it stays for more than one step."""

    def before(self, optimizer: Any, kwargs: dict[str, Any]) -> Flag:
        """Return whether this step should not be made.

        Args:
            optimizer: The one that is about to step.
            kwargs: What its ``step`` was given by keyword.
        """
        ...

    def after(self, error: BaseException | None) -> None:
        """Hear that the step is over: made, withheld, or ended by an error."""
        ...


class HeldStep:
    """What stands in the place of the ``step`` of one optimizer, with all its gates.

    Args:
        optimizer: Anything with ``param_groups`` and ``step``.
    """

    def __init__(self, optimizer: Any) -> None:
        self.gates: list[Gate] = []
        self._running = local()
        """Of each thread, whether it is ``inside`` a step."""
        self._warned = False
        self._optimizer = ref(optimizer)
        attributes = vars(optimizer)
        self._had = {name: attributes.get(name, _UNSET) for name in ("step", "__getstate__")}
        before = optimizer.step
        plain = self._had["step"] is _UNSET and hasattr(type(optimizer), "step")
        self._before = None if plain else before
        names = list(arguments_of(before))
        self._closure_at = names.index("closure") if "closure" in names else None
        self._is_torchs = _is_torchs(optimizer, before)
        self._is_whole = False
        self._hook: Any = None
        self._stored = ExitStack()
        self.bound = _asking(self, optimizer, before)
        # Past a __setattr__ of its own, which may hand attributes on.
        attributes["step"] = self.bound

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as one that asks nobody: it is among the hooks of an optimizer."""
        return HeldStep.of_a_copy, ()

    @classmethod
    def of_a_copy(cls) -> "HeldStep":
        """Return one without gates."""
        step = cls.__new__(cls)
        step.gates, step._running = [], local()  # noqa: SLF001 - its own class
        return step

    def is_of(self, optimizer: Any) -> bool:
        """Return whether it is the step of this very optimizer."""
        return self._optimizer() is optimizer

    def run(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Ask the gates in their order; step, or do not."""
        gates = list(self.gates)
        if not gates or getattr(self._running, "inside", False):
            return self._call(optimizer, args, kwargs)
        loss = None
        if (args or kwargs) and any(map(_lasts, gates)):  # it clips what the closure computes
            loss, args, kwargs = self._evaluated(optimizer, args, kwargs)
        entered: list[Gate] = []
        error: BaseException | None = None
        try:  # a Ctrl-C may come behind any call, and no later step may pass for an inner one
            self._running.inside = True
            withheld: Flag = False
            for gate in gates:
                entered.append(gate)
                found = gate.before(optimizer, kwargs)
                withheld = found if withheld is False else any_of([withheld, found])
            if withheld is False:
                result = self._call(optimizer, args, kwargs)
            else:
                result = self._step(withheld, optimizer, args, kwargs)
        except BaseException as raised:
            error = raised
            raise
        else:
            return loss if result is None else result
        finally:
            self._running.inside = False
            for gate in reversed(entered):
                gate.after(error)
            error = None  # or this frame, and all that the error has, would wait for the collector

    def _step(
        self, withheld: Flag, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Step under a flag: on the device where the optimizer takes one, else read by the host."""
        if isinstance(withheld, Tensor) and self._takes_found_inf(optimizer):
            with _found_inf(optimizer, withheld):
                return self._call(optimizer, args, kwargs)
        if not withheld:
            return self._call(optimizer, args, kwargs)
        if hasattr(self.bound, "_wrapped_by_lr_sched"):
            optimizer._opt_called = True  # noqa: SLF001 - or schedulers warn
        loss, _, _ = self._evaluated(optimizer, args, kwargs)
        return loss

    def _call(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._before is not None:
            return self._before(*args, **kwargs)
        return type(optimizer).step(optimizer, *args, **kwargs)

    def _takes_found_inf(self, optimizer: Any) -> bool:
        """Return whether a step can be called, and told on the device to change nothing.

        So it is if it is torch's own, and nobody has a hook on it: others do not look at the flag.
        """
        others = hooks_before(optimizer) or _hooks_after(optimizer)
        return self._is_torchs and not others and takes_found_inf(optimizer)

    def _evaluated(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Run the closure, if a step was given one; return its loss, and arguments that have that.

        The gradients are clipped between the closure and the step, so the step may ask for the
        loss once, where its weights still are, and not for new gradients.
        """
        if not any(map(callable, chain(args, kwargs.values()))):  # Accelerate gives None
            return None, args, kwargs
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        at = self._closure_at
        # Where a step has another name for it, it is the first that can be called, and no model.
        keys = given if at is None else (at, "closure")
        found = ((key, given[key]) for key in keys if callable(given.get(key)))
        key, closure = next((p for p in found if not isinstance(p[1], nn.Module)), (None, None))
        if closure is None:
            return None, args, kwargs
        known = _Known(optimizer, closure)
        args = tuple(known if n == key else each for n, each in enumerate(args))
        return known.loss, args, {k: known if k == key else each for k, each in kwargs.items()}

    def _see(self, optimizer: Any, args: Any, kwargs: Any) -> None:  # noqa: ARG002
        """Refuse a step that comes past ``run``."""
        if self.gates and not getattr(self._running, "inside", False):
            label = self.gates[0].label
            raise ArgumentValueError(
                f"{type(optimizer).__name__}.step was called past {label}, so its gradients are "
                f"not clipped: somebody took optimizer.step before {label} replaced it, as "
                "torch.compile(optimizer.step), accelerator.prepare(optimizer) with a loss scaler "
                "and type(optimizer).step do, or called super().step() from a method of another "
                f"name. Let {label} begin before optimizer.step is taken, or give it "
                "the prepared optimizer. No step was made."
            )

    def enter(self, gate: Gate, wrappers: Iterable[Any]) -> None:
        """Ask a gate from now on, also where the step comes through a wrapper."""
        optimizer: Any = self._optimizer()
        self.gates.append(gate)
        if not self._is_whole:  # made now, or somebody put it back after all gates had left
            self._is_whole = True
            vars(optimizer)["__getstate__"] = _warning_copy(self, optimizer)
            # An optimizer that does not call Optimizer.__init__ has no hooks.
            if hasattr(optimizer, "_optimizer_step_pre_hooks"):
                self._hook = optimizer.register_step_pre_hook(self._see)
        for each in wrappers:
            _hold_stored(each, self, self._stored)

    def see_copy(self) -> None:
        """Warn, once, that a copy is not clipped."""
        lasting = [gate.label for gate in self.gates if gate.lasts]
        if lasting and not self._warned:
            self._warned = True
            warn(
                f"an optimizer whose gradients {lasting[0]} clips was copied or pickled. The copy "
                f"is not clipped: use {lasting[0]} on it too."
            )

    def leave(self, gate: Gate) -> None:
        """Let a gate go; without any, the optimizer is as it was before."""
        if gate in self.gates:
            self.gates.remove(gate)
        optimizer = self._optimizer()
        if self.gates or optimizer is None:
            return
        self._stored.close()
        attributes = vars(optimizer)
        # Under what somebody put over it since, it stays, and asks nobody.
        if attributes.get("step") is self.bound:
            for name, had in self._had.items():
                if had is _UNSET:
                    attributes.pop(name, None)
                else:
                    attributes[name] = had
            self._is_whole = False
            if self._hook is not None:
                self._hook.remove()


@contextmanager
def held(optimizer: Any, gate: Gate) -> Iterator[None]:
    """Hold the step of an optimizer: while the context lasts, a gate is asked before each.

    Args:
        optimizer: Anything with ``param_groups`` and ``step``; wrappers are looked through.
        gate: What is asked, after those that came before it.

    Raises:
        ArgumentTypeError: GC011, its ``step`` cannot be replaced.
    """
    inner = unwrapped(optimizer)
    step = _step_of(inner)
    if step is None:
        if not is_replaceable(inner):
            raise ArgumentTypeError(
                f"the step of {type(inner).__qualname__} cannot be replaced, so it cannot be kept "
                "from stepping on a NaN: give the optimizer that it wraps. Nothing was changed."
            )
        step = HeldStep(inner)
    try:
        step.enter(gate, _chain(optimizer))
        yield
    finally:
        step.leave(gate)


def gates_of(optimizer: Any) -> list[Gate]:
    """Return what is asked before each step of an optimizer, in that order."""
    step = _step_of(unwrapped(optimizer))
    return [] if step is None else list(step.gates)


def _step_of(optimizer: Any) -> HeldStep | None:
    found = getattr(optimizer, "step", None)
    step = getattr(found, _HELD, None)
    if not isinstance(step, HeldStep):
        return None
    # A copy that has it among its attributes is not held: it asks nobody.
    return step if not isinstance(found, MethodType) or step.is_of(found.__self__) else None


def _is_torchs(optimizer: Any, step: Any) -> bool:
    """Return whether a step is that of a class of torch's, perhaps in a scheduler's wrapper.

    ``__module__`` does not tell: ``functools.wraps`` hands it on.
    """
    if not type(optimizer).__module__.startswith("torch.optim."):
        return False
    function = getattr(step, "__func__", step)
    while function is not None:
        if not getattr(function, "__globals__", {}).get("__name__", "").startswith("torch."):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def hooks_before(optimizer: Any) -> list[Any]:
    """Return the hooks of others that run before a step: its own, and those of all optimizers."""
    own = getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()
    return _of_others([*_global_optimizer_pre_hooks.values(), *own])


def _hooks_after(optimizer: Any) -> list[Any]:
    own = getattr(optimizer, "_optimizer_step_post_hooks", {}).values()
    return _of_others([*_global_optimizer_post_hooks.values(), *own])


def _of_others(hooks: list[Any]) -> list[Any]:
    """Return hooks without ours, and those of ``gradclip run``, which only look."""
    return [
        each
        for each in hooks
        if not isinstance(getattr(each, "__self__", None), HeldStep)
        and not getattr(each, "only_looks", False)
    ]


def takes_found_inf(optimizer: Any) -> bool:
    """Return whether an optimizer can be told on the device not to step.

    A fused one can once its state exists: torch's fused SGD would leave its first momentum
    uninitialised.
    """
    fused = all(group.get("fused") for group in optimizer.param_groups)
    if not (fused and getattr(optimizer, "_step_supports_amp_scaling", False)):
        return False
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    with_gradients = [p for p in parameters if p.grad is not None]
    return bool(with_gradients) and all(optimizer.state.get(p) for p in with_gradients)


@contextmanager
def lend(optimizer: Any, name: str, value: object) -> Iterator[None]:
    """Give an optimizer an attribute, and put back what was there, unless it was set since."""
    before = getattr(optimizer, "__dict__", {}).get(name, _UNSET)
    setattr(optimizer, name, value)
    try:
        yield
    finally:
        if getattr(optimizer, name, None) is value:
            if before is _UNSET:
                delattr(optimizer, name)
            else:
                setattr(optimizer, name, before)


def _asking(step: HeldStep, optimizer: Any, before: Callable[..., Any]) -> MethodType:
    """Return a bound method that looks like the one before it, and asks."""
    original, owner = getattr(before, "__func__", None), ref(optimizer)

    @wraps(before if original is None else original)
    def asking(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is owner():
            return step.run(self, args, kwargs)
        # A copy: it has this function among its attributes.
        plain = type(self).step if original is None else original
        return plain(self, *args, **kwargs)

    asking.__name__ = "step"  # it is pickled by its name
    setattr(asking, _HELD, step)
    return MethodType(asking, optimizer)


def _warning_copy(step: HeldStep, optimizer: Any) -> MethodType:
    """Let ``copy`` and ``pickle`` warn of a copy, which steps plainly."""
    original: Any = type(optimizer).__getstate__

    def warning(self: Any) -> Any:
        step.see_copy()
        return original(self)

    warning.__name__ = "__getstate__"
    return MethodType(warning, optimizer)


class _Known:
    """Stands for a closure that was run: returns its loss.

    Args:
        optimizer: Is asked for its weights.
        closure: Computes gradients, and returns the loss.
    """

    def __init__(self, optimizer: Any, closure: Callable[[], Any]) -> None:
        with torch.enable_grad():
            self.loss = closure()
        self._optimizer = optimizer
        self._weights = self._versions()
        self._asked = False

    def __call__(self) -> Any:
        if self._asked or self._weights != self._versions():
            raise ArgumentTypeError(
                f"{type(self._optimizer).__name__} evaluates its closure more than once in a step, "
                "or after it has moved its weights, so that gradients come which are not clipped: "
                "call GradientClipper.clip() at the end of the closure instead"
            )
        self._asked = True
        return self.loss

    def _versions(self) -> list[int]:
        groups = self._optimizer.param_groups
        return [p._version for group in groups for p in group["params"]]  # noqa: SLF001 - as autograd


def _chain(optimizer: Any) -> Iterator[Any]:
    """Yield the wrappers around an optimizer, outermost first."""
    while (inner := wrapped(optimizer)) is not None:
        yield optimizer
        optimizer = inner


def _hold_stored(wrapper: Any, step: HeldStep, stack: ExitStack) -> None:
    """Let Accelerate's wrapper find the held step where it keeps those that it took.

    Under a loss scaler it does not ask the optimizer for its ``step``: it puts one of two there.
    It finds it as long as there are gates, in whatever order they leave.
    """
    attributes = getattr(wrapper, "__dict__", {})
    if attributes.get("_optimizer_original_step_method", step.bound) is step.bound:
        return  # it keeps none, or this one

    def patched(*args: Any, **kwargs: Any) -> Any:
        wrapper._accelerate_step_called = True  # noqa: SLF001 - how it learns that the scaler stepped
        return step.bound(*args, **kwargs)

    stack.enter_context(lend(wrapper, "_optimizer_original_step_method", step.bound))
    stack.enter_context(lend(wrapper, "_optimizer_patched_step_method", patched))


@contextmanager
def _found_inf(optimizer: Any, skipped: Tensor) -> Iterator[None]:
    """Set ``found_inf`` to exactly 0 or 1, and put back what was there."""
    before = getattr(optimizer, "found_inf", None)
    flag = skipped.to(torch.float32).reshape(())
    if isinstance(before, Tensor):
        flag = torch.maximum(flag, before.to(flag.device).clamp(max=1.0).reshape(()))
    with lend(optimizer, "found_inf", flag):
        yield
