"""What a pipeline's hooks are given, the channels they stand in, and how sets of them combine."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from textwrap import indent
from types import TracebackType
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    Protocol,
    Self,
    TypeAlias,
    TypeVar,
    get_args,
    runtime_checkable,
)

from gradclip.config import ClassConfig, ClassInitFromConfigMixin, ClassType, ConfigOf
from gradclip.errors import ArgumentTypeError, ArgumentValueError
from gradclip.hook import HookContext, HookContextChannel, RemoveableHandle
from gradclip.pipeline.stopping import StopRequest

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from gradclip.clipping import ClipResult
    from gradclip.pipeline.checkpoint.data_position import DataPosition

__all__ = [
    "ClassType",
    "HookContext",
    "HookContextChannel",
    "HookListConfig",
    "ModelOutput",
    "ModelOutputHasLossKeys",
    "PipelineHookArgs",
    "PipelineHookChanelType",
    "PipelineHookChannelType",
    "PipelineHooks",
    "PipelineHooksConfig",
    "RemoveableHandle",
]


@runtime_checkable
class ModelOutput(Protocol):
    """What a model returns by name, as a dictionary does."""

    def __getitem__(self, key: str) -> Any: ...

    def keys(self) -> Iterable[Any]:
        """Return the names."""

    def items(self) -> Iterable[tuple[Any, Any]]:
        """Return pairs of a name and a value."""

    def values(self) -> Iterable[Any]:
        """Return the values."""


@runtime_checkable
class ModelOutputHasLossKeys(ModelOutput, Protocol):
    """What a model returns, if it says which of it are losses."""

    def loss_keys(self) -> Iterable[str]:
        """Return the names of the losses."""


@dataclass(eq=False)
class PipelineHookArgs:
    """What every hook is given: the objects of the run, where it is, and what happened so far.

    Counts are of what was finished before: in the first step they are all 0.
    """

    accelerator: "Accelerator | None" = None
    epoch_id: int = 0
    step_id: int = 0
    """Batches of this epoch."""
    global_step_id: int = 0
    """Batches of all epochs."""
    max_epoch: int | None = None
    max_step: int | None = None
    start_epoch: int = 0
    """The epoch that a resumed run began in."""
    start_step: int = 0
    """The batch of that epoch that a resumed run began at."""
    dataloader: Iterable[Any] | None = None
    model: "torch.nn.Module | None" = None
    optimizer: "torch.optim.Optimizer | None" = None
    lr_scheduler: Any = None
    batch: Any = None
    model_outputs: Any = None
    reduce_loss: "torch.Tensor | None" = None
    """The loss of the batch, detached, and averaged over all processes."""
    exception: BaseException | None = None
    """The first error inside the outermost ``begin`` on this object."""
    clip_result: "ClipResult | None" = None
    """What clipping did to the gradients of this step."""
    hooks: "PipelineHooks | None" = None
    """The hooks whose ``begin`` is under way."""
    is_optimizer_step_committed: bool = False
    """Whether this step changed the weights: it was neither skipped nor before a boundary."""
    micro_step_id: int = 0
    """Batches of this accumulation window."""
    optimizer_step_id: int = 0
    """Optimizer steps that changed the weights."""
    data_position: "DataPosition | None" = None
    """Where the trainer is in the data; a checkpoint keeps it."""
    is_optimizer_step_settled: bool = False
    """Whether the step of this batch was made, or withheld: the batch is done, whatever fails after
    that."""
    resume_from: str | None = None
    """What the run was told to resume from; None for nothing."""
    stop: StopRequest = field(default_factory=StopRequest)
    """Whether the run should end before its limits; ``request_stop`` asks for it."""

    def request_stop(self) -> None:
        """End the training, without an error, where the accumulation window under way ends.

        On several processes it is enough that one asks; they end together, at the latest with the
        optimizer step after that.
        """
        self.stop.request()

    @property
    def is_main_process(self) -> bool:
        """Whether this process is the one that logs and shows."""
        return self.accelerator is None or bool(self.accelerator.is_main_process)

    @property
    def is_optimizer_step_boundary(self) -> bool:
        """Whether the gradients of the accumulation window are complete."""
        return self.accelerator is None or bool(self.accelerator.sync_gradients)

    def copy_with_updates(self, **updates: Any) -> Self:
        """Return a copy in which the named fields have other values.

        Raises:
            AttributeError: A name is not a field.
        """
        unknown = updates.keys() - self.__dict__.keys()
        if unknown:
            raise AttributeError(f"{type(self).__name__} has no field {', '.join(sorted(unknown))}")
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy.__dict__.update(updates)
        return copy


PipelineHookChanelType: TypeAlias = Literal[
    "on_loop",
    "on_epoch",
    "on_step",
    "on_batch",
    "on_model_forward",
    "on_model_backward",
    "on_optimizer_step",
]
"""What a hook can stand around, from the whole training loop down to ``optimizer.step()``."""

PipelineHookChannelType = PipelineHookChanelType

_CHANNELS: tuple[PipelineHookChanelType, ...] = get_args(PipelineHookChanelType)


class PipelineHooks(ClassInitFromConfigMixin):
    """A set of hooks, by channel; subclass it for hooks that share state.

    ``with hooks.begin("on_step", arg):`` runs the channel's hooks around the block. Sets of hooks
    combine with ``+=`` and ``from_hooks``, in the order in which they are given. A set stays alive
    inside another one: what is registered on it, or removed from it, later counts there from the
    next ``begin`` on.

    Args:
        cfg: Hooks to begin with, from a configuration.
    """

    def __init__(self, cfg: "HookListConfig | None" = None) -> None:
        self.hooks: dict[PipelineHookChanelType, HookContextChannel[PipelineHookArgs]] = {
            name: HookContextChannel(name) for name in _CHANNELS
        }
        # Mangled: a hook may have attributes of any name.
        self.__registered: tuple[PipelineHooks, ...] = ()
        for hook_config in () if cfg is None else cfg.hooks:
            self.register_pipeline_hooks(hook_config())

    @property
    def registered_sets(self) -> "tuple[PipelineHooks, ...]":
        """The sets of hooks that were registered here, in order."""
        return self.__registered

    def begin(self, channel: PipelineHookChanelType, arg: PipelineHookArgs) -> "_Begin":
        """Run the hooks of a channel around a ``with`` block, which is given ``arg``.

        While the block lasts, ``arg.hooks`` is this object, if ``arg`` has such an attribute. What
        happens when a hook fails is written at ``HookContextChannel.begin``.
        """
        return _Begin(self, _channel(self, channel), arg)

    def register_hook(
        self, channel: PipelineHookChanelType, hook: HookContext[PipelineHookArgs]
    ) -> RemoveableHandle[Callable[[], None]]:
        """Add one hook to a channel.

        Returns:
            A handle that removes it.
        """
        return _channel(self, channel).register(hook)

    def register_pipeline_hooks(
        self, hooks: "PipelineHooks"
    ) -> RemoveableHandle[Callable[[], None]]:
        """Add the hooks of another set, those of now and of later.

        Returns:
            A handle that removes them.

        Raises:
            ArgumentTypeError: ``hooks`` is not a ``PipelineHooks``.
            ArgumentValueError: ``hooks`` is this very object.
        """
        if not isinstance(hooks, PipelineHooks):
            raise _not_hooks(hooks)
        if hooks is self:
            raise ArgumentValueError(f"{type(self).__name__} cannot be registered in itself")
        handles = [
            self.hooks[name].register_hook_channel(channel) for name, channel in hooks.hooks.items()
        ]
        if not any(each is hooks for each in self.__registered):
            self.__registered += (hooks,)

        def remove() -> None:
            for handle in handles:
                handle.remove()
            self.__registered = tuple(each for each in self.__registered if each is not hooks)

        return RemoveableHandle(remove)

    def __iadd__(self, other: "PipelineHooks") -> Self:
        self.register_pipeline_hooks(other)
        return self

    def unregister_all(self) -> None:
        """Remove every hook from every channel."""
        for channel in self.hooks.values():
            channel.unregister_all()
        self.__registered = ()

    def move_to_end(self, registered: "PipelineHooks") -> None:
        """Let the hooks of a set that is registered here run after all others."""
        for name, channel in registered.hooks.items():
            self.hooks[name].move_to_end(channel)

    def walk(self) -> "Iterator[PipelineHooks]":
        """Yield this set and every one below it, each once, in order of registration."""
        waiting: list[PipelineHooks] = [self]
        seen: set[int] = set()
        while waiting:
            hooks = waiting.pop()
            if id(hooks) not in seen:
                seen.add(id(hooks))
                yield hooks
                waiting.extend(reversed(hooks.__registered))  # noqa: SLF001 - its own

    @classmethod
    def from_hooks(cls, hooks: "PipelineHooksLike") -> Self:
        """Make one set of hooks out of hooks, configurations, and (nested) iterables of them.

        Raises:
            ArgumentTypeError: Something else is among them.
        """
        joined = cls()
        for each in _flat(hooks):
            joined.register_pipeline_hooks(
                each() if isinstance(each, PipelineHooksConfig) else each
            )
        return joined

    def take_back(self) -> None:
        """Forget what was noted of batches that no step was made of: they come again.

        The trainer calls it when an error ended an accumulation window.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint should keep of this set alone: numbers, strings and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned; called before the run begins."""

    def __repr__(self) -> str:
        channels = "".join(
            f"\n{indent(repr(channel), '  ')}" for channel in self.hooks.values() if len(channel)
        )
        return f"{type(self).__name__}({channels})"


def _channel(
    hooks: PipelineHooks, name: PipelineHookChanelType
) -> HookContextChannel[PipelineHookArgs]:
    try:
        return hooks.hooks[name]
    except (KeyError, TypeError):
        raise ArgumentValueError(
            f"there is no channel {name!r}; the channels are {', '.join(_CHANNELS)}"
        ) from None


def falls_on(frequency: int | None, number: int) -> bool:
    """Whether something is due after a step or epoch of this number; None and 0 are for never."""
    return bool(frequency and frequency > 0 and (number + 1) % frequency == 0)


class _Begin:
    """A channel's ``begin`` that also puts the hooks on ``arg.hooks``, and takes them off."""

    __slots__ = ("_arg", "_begin", "_hooks", "_previous")

    def __init__(
        self,
        hooks: PipelineHooks,
        channel: HookContextChannel[PipelineHookArgs],
        arg: PipelineHookArgs,
    ) -> None:
        self._hooks = hooks
        self._begin = channel.begin(arg)
        self._arg = arg

    def __enter__(self) -> PipelineHookArgs:
        self._previous = getattr(self._arg, "hooks", _NONE)
        if self._previous is not _NONE:
            self._arg.hooks = self._hooks
        try:
            return self._begin.__enter__()
        except BaseException:
            self._give_back()
            raise

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        try:
            self._begin.__exit__(exc_type, exc, exc_tb)
        finally:
            self._give_back()

    def _give_back(self) -> None:
        if self._previous is not _NONE:
            self._arg.hooks = self._previous


_NONE: Any = object()
"""What an arg of another kind has for ``hooks``."""

PipelineHooksT_co = TypeVar("PipelineHooksT_co", bound=PipelineHooks, covariant=True)


class PipelineHooksConfig(ClassConfig[PipelineHooksT_co]):
    """The configuration of a set of hooks; calling it builds the set."""


class HookListConfig(PipelineHooksConfig[PipelineHooks]):
    """Several sets of hooks, in order: a whole pipeline in one file."""

    class_type: ClassType[PipelineHooks] = PipelineHooks
    hooks: tuple[ConfigOf[PipelineHooksConfig[Any]], ...] = ()
    """The configurations of the sets."""


PipelineHooksLike: TypeAlias = (
    "PipelineHooks | PipelineHooksConfig[Any] | Iterable[PipelineHooksLike] | None"
)
"""Whatever ``PipelineHooks.from_hooks`` takes."""


def _flat(hooks: Any) -> "Iterator[PipelineHooks | PipelineHooksConfig[Any]]":
    if isinstance(hooks, PipelineHooks | PipelineHooksConfig):
        yield hooks
    elif isinstance(hooks, str | bytes | Mapping | type) or not isinstance(hooks, Iterable | None):
        raise _not_hooks(hooks)
    else:
        for each in hooks or ():
            yield from _flat(each)


def _not_hooks(value: object) -> ArgumentTypeError:
    if isinstance(value, type):
        found = f"the class {value.__qualname__}: make an object of it, or of its configuration"
    elif isinstance(value, HookContext):
        found = "a HookContext, which stands in no channel: use register_hook(channel, hook)"
    else:
        found = f"an object of type {type(value).__qualname__}"
    return ArgumentTypeError(
        f"hooks are PipelineHooks, their configurations, and iterables of these; seen {found}"
    )
