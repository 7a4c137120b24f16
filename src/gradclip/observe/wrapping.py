"""What is put around torch's functions for the run: results, errors and gradients stay as they are.

Each function is replaced in its own module right after that was executed, so every name that
anybody imports later is the replaced one. ``tests/contract/test_observed_names.py`` holds the names
that torch must have.
"""

import sys
import threading
from collections.abc import Callable, Iterable
from inspect import signature
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gradclip.observe.imports import when_imported
from gradclip.observe.tracebacks import unseen

if TYPE_CHECKING:
    from gradclip.observe.watch import Watch

__all__ = ["wrap_all"]

Ask = Callable[[], "Watch | None"]
"""Returns who watches; None where nobody should, as in a forked process or while compiling."""


def wrap_all(ask: Ask) -> None:
    """Wrap each module's functions as soon as the script imports it."""

    def once(name: str, wrap: Callable[[ModuleType, Ask], None]) -> None:
        when_imported(name, lambda module: wrap(module, ask))

    once("torch.optim.optimizer", _hook_steps)
    once("torch.nn.utils.clip_grad", _wrap_clipping)
    once("torch._tensor", _wrap_backward)
    once("torch.amp.grad_scaler", _wrap_scaler)
    once("torch.distributed.fsdp.fully_sharded_data_parallel", _wrap_fsdp)
    once("deepspeed.runtime.engine", _wrap_deepspeed)
    once("gradclip.clipping.functional", _wrap_our_functions)
    once("gradclip.clipping.engine", _wrap_our_engine)
    once("gradclip.clipping.step.held", _wrap_our_steps)


def _hook_steps(module: ModuleType, ask: Ask) -> None:
    """See each step of each optimizer, with the gradients that it is made with."""

    def before(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        watch = ask()
        if watch is None:
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):
            watch.step(optimizer)
            return None
        calls = 0

        @unseen(closure)
        def observed(*given: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            watch.closure_begins(calls)
            found = closure(*given, **named)
            if calls == 1:  # the first gradients are those at which the step begins
                watch.step(optimizer)
            return found

        if len(args) > 1:
            return (args[0], observed, *args[2:]), kwargs
        return args, {**kwargs, "closure": observed}

    def after(_optimizer: Any, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        watch = ask()
        if watch is not None:
            watch.step_ends()

    vars(before)["only_looks"] = vars(after)["only_looks"] = True
    module.register_optimizer_step_pre_hook(before)
    module.register_optimizer_step_post_hook(after)


def _wrap_clipping(module: ModuleType, ask: Ask) -> None:
    """See the parameters, limit and total norm of ``torch.nn.utils.clip_grad_norm_``."""
    total_of, scale, clamp = (
        getattr(module, name)
        for name in ("_get_total_norm", "_clip_grads_with_norm_", "clip_grad_value_")
    )
    stacks = _Stacks(module.torch)

    @unseen(total_of)
    def get_total_norm(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        watch = ask()
        if watch is None:
            return total_of(tensors, *args, **kwargs)
        if not isinstance(tensors, stacks.torch.Tensor):
            tensors = list(tensors)
        stacks.take()
        vars(module)["torch"] = stacks
        try:
            total = total_of(tensors, *args, **kwargs)
        finally:
            vars(module)["torch"] = stacks.torch
        order = args[0] if args else kwargs.get("norm_type", 2.0)
        watch.total_found(total, tensors, stacks.take(), order)
        return total

    @unseen(scale)
    def clip_grads_with_norm(
        parameters: Any, max_norm: Any, total_norm: Any, *args: Any, **kwargs: Any
    ) -> Any:
        watch = ask()
        if watch is None or not isinstance(parameters, Iterable):
            return scale(parameters, max_norm, total_norm, *args, **kwargs)
        parameters = _listed(parameters, stacks.torch)
        with watch.clipping(parameters, max_norm, total_norm):
            return scale(parameters, max_norm, total_norm, *args, **kwargs)

    @unseen(clamp)
    def clip_grad_value(parameters: Any, clip_value: Any, *args: Any, **kwargs: Any) -> Any:
        watch = ask()
        if watch is None or not isinstance(parameters, Iterable):
            return clamp(parameters, clip_value, *args, **kwargs)
        parameters = _listed(parameters, stacks.torch)
        with watch.clipping(parameters, clamps=True):
            return clamp(parameters, clip_value, *args, **kwargs)

    vars(module).update(
        _get_total_norm=get_total_norm,
        _clip_grads_with_norm_=clip_grads_with_norm,
        clip_grad_value_=clip_grad_value,
    )


class _Stacks(threading.local):
    """Stands for ``torch`` in torch's own module, and keeps the norms that it stacks there.

    So nobody has to read the gradients another time.

    Args:
        torch: The module.
    """

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        self._kept: Any = None
        self._kinds = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.torch, name)

    def _foreach_norm(self, *args: Any, **kwargs: Any) -> Any:
        self._kinds += 1
        return self.torch._foreach_norm(*args, **kwargs)  # noqa: SLF001 - as torch's own module does

    def stack(self, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        """Stack tensors, and keep what comes out."""
        self._kept = self.torch.stack(tensors, *args, **kwargs)
        return self._kept

    def take(self) -> Any:
        """Return the norms; None unless they are of one kind, and so in the order of gradients."""
        kept, kinds = self._kept, self._kinds
        self._kept, self._kinds = None, 0
        return kept if kinds == 1 else None


def _listed(parameters: Any, torch: Any) -> Any:
    """Return parameters that can be read twice."""
    return parameters if isinstance(parameters, torch.Tensor) else list(parameters)


def _wrap_backward(module: ModuleType, ask: Ask) -> None:
    """See the loss: the number that ``backward`` begins at."""
    backward = module.Tensor.backward

    @unseen(backward)
    def observed(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch = ask()
        if watch is not None:
            watch.backward_begins(self)
        return backward(self, *args, **kwargs)

    module.Tensor.backward = observed


def _wrap_scaler(module: ModuleType, ask: Ask) -> None:
    """See the scaled loss, and the steps that a loss scaler leaves out."""
    scaler = module.GradScaler
    scale, maybe_step = scaler.scale, scaler._maybe_opt_step  # noqa: SLF001 - the one place that decides

    @unseen(scale)
    def observed_scale(self: Any, outputs: Any) -> Any:
        scaled, watch = scale(self, outputs), ask()
        if watch is not None:
            watch.loss_scaled(outputs, scaled)
        return scaled

    @unseen(maybe_step)
    def observed_step(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        watch = ask()
        if watch is None:
            return maybe_step(self, optimizer, *args, **kwargs)
        before = watch.steps_seen
        made = maybe_step(self, optimizer, *args, **kwargs)
        if watch.steps_seen == before:
            watch.step_left_out(optimizer, "overflow")
        return made

    scaler.scale, scaler._maybe_opt_step = observed_scale, observed_step  # noqa: SLF001


def _wrap_fsdp(module: ModuleType, ask: Ask) -> None:
    """See what FSDP clips by itself: its ranks hold parts."""
    fsdp = module.FullyShardedDataParallel
    clip = fsdp.clip_grad_norm_

    @unseen(clip)
    def observed(self: Any, max_norm: Any, norm_type: Any = 2.0) -> Any:
        watch = ask()
        if watch is None:
            return clip(self, max_norm, norm_type)
        with watch.clipping(list(self.parameters()), max_norm, order=norm_type) as seen:
            seen.total = clip(self, max_norm, norm_type)
        return seen.total

    fsdp.clip_grad_norm_ = observed


def _wrap_deepspeed(module: ModuleType, ask: Ask) -> None:
    """See the norm that DeepSpeed found: its optimizer has flat parts, clipped already."""
    engine = module.DeepSpeedEngine
    step = engine.step

    @unseen(step)
    def observed(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch = ask()
        if watch is None:
            return step(self, *args, **kwargs)
        with watch.engine_steps(self):
            return step(self, *args, **kwargs)

    engine.step = observed


def _wrap_our_functions(module: ModuleType, ask: Ask) -> None:
    """See what gradclip's own functions clip."""

    def wrap(name: str, *, clamps: bool = False) -> None:
        clip = getattr(module, name)
        bind = signature(clip).bind

        @unseen(clip)
        def observed(*args: Any, **kwargs: Any) -> Any:
            watch = ask()
            try:
                given = bind(*args, **kwargs).arguments
            except TypeError:  # it says better what is wrong
                watch = None
            if watch is None:
                return clip(*args, **kwargs)
            given["parameters"] = _listed(given["parameters"], sys.modules["torch"])
            limit, order = given.get("max_norm"), given.get("norm_type", 2.0)
            known = given["parameters"], limit, given.get("total_norm")
            with watch.clipping(*known, order=order, clamps=clamps) as seen:
                found = clip(**given)
                if name == "clip_grad_norm_":
                    seen.total = found
            return found

        vars(module)[name] = observed

    wrap("clip_grad_norm_")
    wrap("clip_grads_with_norm_")
    wrap("clip_grad_value_", clamps=True)


def _wrap_our_engine(module: ModuleType, ask: Ask) -> None:
    """See what gradclip itself does, whatever way in the script takes."""
    clip = module.Engine.clip

    @unseen(clip)
    def observed(self: Any, grad_scale: Any = None, **kwargs: Any) -> Any:
        watch = ask()
        if watch is None:
            return clip(self, grad_scale, **kwargs)
        with watch.clipping(self.source.tensors(), scale=grad_scale) as seen:
            seen.result = clip(self, grad_scale, **kwargs)
        return seen.result

    module.Engine.clip = observed


def _wrap_our_steps(module: ModuleType, ask: Ask) -> None:
    """See the steps that gradclip does not make."""
    run = module.HeldStep.run

    @unseen(run)
    def observed(self: Any, optimizer: Any, args: Any, kwargs: Any) -> Any:
        watch = ask()
        if watch is None:
            return run(self, optimizer, args, kwargs)
        before = watch.steps_seen
        made = run(self, optimizer, args, kwargs)
        if watch.steps_seen == before:
            watch.step_left_out(optimizer, "nonfinite")
        return made

    module.HeldStep.run = observed
