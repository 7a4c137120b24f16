"""Losses as a hook: their means go to the log and to Accelerate's trackers."""

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field
from torch import Tensor
from typing_extensions import deprecated

from gradclip.config import ClassType
from gradclip.errors import ArgumentTypeError
from gradclip.hook import HookContext
from gradclip.pipeline.hooks.mixin import (
    ModelOutput,
    ModelOutputHasLossKeys,
    PipelineHookArgs,
    PipelineHooks,
    PipelineHooksConfig,
)
from gradclip.pipeline.processes import gathered

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "LossMovingAverageTracker",
    "LossMovingAverageTrackerConfig",
    "LossTracker",
    "LossTrackerConfig",
]

logger = logging.getLogger(__name__)

_WAITING = 64
"""Batches whose losses stay on the device; more are read, so that memory stays bounded."""


class LossTracker(PipelineHooks):
    """Logs every loss of the model's outputs: its mean since the last log, over all processes.

    Losses are the outputs that ``loss_keys()`` of the outputs names, or whose keys contain "loss".
    They are read from the device when they are logged. ``Loss/<key>`` goes to the trackers of the
    accelerator.

    Args:
        cfg: How often, and what.
    """

    def __init__(self, cfg: "LossTrackerConfig") -> None:
        super().__init__()
        self.cfg = cfg
        self._accelerator: Accelerator | None = None
        self.reset_cached_loss()
        name = "loss tracker"
        self.register_hook("on_step", HookContext.from_callable(name, after=self._on_step_end))

    def reset_cached_loss(self) -> None:
        """Begin new means."""
        self.cached_loss = {}
        self.moving_average_count: dict[str, float] = {}

    @property
    def cached_loss(self) -> dict[str, float]:
        """The means so far of this process, by key; what is written there is logged too."""
        self._read()
        self._window = 0
        return self._means

    @cached_loss.setter
    def cached_loss(self, means: dict[str, float]) -> None:
        self._means = means
        self._batches: list[dict[str, Tensor]] = []
        self._window = 0

    def update(self, accelerator: "Accelerator | None", model_outputs: ModelOutput) -> None:  # noqa: ARG002 - RoboOrchardLab's signature
        """Take in the losses of a batch.

        Raises:
            ArgumentTypeError: GC011, the outputs have no keys, or a loss is no tensor.
        """
        self._batches.append({key: _loss(model_outputs, key) for key in _loss_keys(model_outputs)})
        self._window += 1

    def take_back(self) -> None:
        """Forget the batches of a window that was broken off."""
        del self._batches[len(self._batches) - min(self._window, len(self._batches)) :]
        self._window = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the means so far, of every process; all of them ask at the same time."""
        mine = dict(self.cached_loss), dict(self.moving_average_count)
        every = gathered(self._accelerator, mine)
        return {"means": every} if any(means for means, _ in every) else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the means of this process; with none where it was not there."""
        from accelerate import PartialState  # noqa: PLC0415 - hooks need no Accelerate

        number = PartialState().process_index
        if number < len(state["means"]):
            means, counts = state["means"][number]
            self.cached_loss, self.moving_average_count = dict(means), dict(counts)

    def _on_step_end(self, arg: PipelineHookArgs) -> None:
        if arg.exception is not None:
            return
        self._accelerator = arg.accelerator
        if arg.model_outputs is not None:
            self.update(arg.accelerator, arg.model_outputs)
        if arg.is_optimizer_step_boundary:
            self._window = 0
        if (arg.step_id + 1) % self.cfg.step_log_freq == 0:
            self._log(arg)
            self.reset_cached_loss()
        elif self._window == 0 and len(self._batches) >= _WAITING:
            self._read()

    def _read(self) -> None:
        """Take the losses that wait on the device into the means."""
        for losses in self._batches:
            for key, loss in losses.items():
                count = self.moving_average_count.setdefault(key, 0)
                mean = self._means.get(key, 0.0)
                self._means[key] = mean + (loss.item() - mean) / (count + 1)
                if self.cfg.moving_average:
                    self.moving_average_count[key] = count + 1
        self._batches = []

    def _log(self, arg: PipelineHookArgs) -> None:
        means: dict[str, list[float]] = {}
        for process in gathered(arg.accelerator, self.cached_loss):
            for key, mean in process.items():
                means.setdefault(key, []).append(mean)
        losses = {key: sum(each) / len(each) for key, each in means.items()}
        if not arg.is_main_process:
            return
        scalars = {f"Loss/{key}": loss for key, loss in losses.items()}
        words = "".join(f"{key}[{loss:.4f}]\t" for key, loss in losses.items())
        if self.cfg.log_total_loss:
            total = sum(losses.values())
            scalars["Loss/Total_Loss"] = total
            words += f"total_loss[{total:.4f}]"
        if arg.accelerator is not None:
            arg.accelerator.log(scalars, step=arg.global_step_id)
        logger.info(
            "Epoch[%s/%s] Step[%s] GlobalStep[%s/%s]: %s",
            arg.epoch_id,
            _last(arg.max_epoch),
            arg.step_id,
            arg.global_step_id,
            _last(arg.max_step),
            words,
        )


class LossTrackerConfig(PipelineHooksConfig[LossTracker]):
    """How often losses are logged, and what of them."""

    class_type: ClassType[LossTracker] = LossTracker
    step_log_freq: int = Field(default=5, ge=1)
    """Log after every so many batches of an epoch."""
    log_total_loss: bool = False
    """Log the sum of all losses too."""
    moving_average: bool = True
    """Log the mean since the last log; False for the losses of the last batch."""


@deprecated("LossMovingAverageTracker is deprecated: use LossTracker")
class LossMovingAverageTracker(LossTracker):
    """What ``LossTracker`` was called before."""


@deprecated("LossMovingAverageTrackerConfig is deprecated: use LossTrackerConfig")
class LossMovingAverageTrackerConfig(LossTrackerConfig):
    """What ``LossTrackerConfig`` was called before, with the defaults of then."""

    step_log_freq: int = Field(default=25, ge=1)
    log_total_loss: bool = True


def _loss_keys(outputs: object) -> Iterable[str]:
    if isinstance(outputs, ModelOutputHasLossKeys):
        return outputs.loss_keys()
    if callable(keys := getattr(outputs, "keys", None)):
        return [key for key in keys() if "loss" in key]
    raise ArgumentTypeError(
        f"LossTracker reads losses by their keys, and the model's outputs are of type "
        f'{type(outputs).__qualname__}: return a dictionary, such as {{"loss": loss}}, from forward'
    )


def _loss(outputs: ModelOutput, key: str) -> Tensor:
    loss: Any = outputs[key]
    if not isinstance(loss, Tensor):
        raise ArgumentTypeError(
            f"the loss {key!r} in the model's outputs is of type {type(loss).__qualname__}: "
            "expected a tensor"
        )
    return loss.detach().float().mean()


def _last(limit: int | None) -> "int | str":
    return "NA" if limit is None else limit - 1
