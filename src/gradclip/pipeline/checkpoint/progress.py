"""How far a run is: what was finished, in batches, epochs and optimizer steps."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Self

from gradclip.errors import CheckpointError

if TYPE_CHECKING:
    from gradclip.pipeline.hooks.mixin import PipelineHookArgs

__all__ = ["TrainerProgressState"]

_TOO_LARGE = 2**63
"""No run counts so far, and what works on the counts may hold them in 64 bits."""
_SHOWN = 200


@dataclass
class TrainerProgressState:
    """Counts of what was finished; a run that resumes goes on with the next.

    Attributes:
        epoch_id: Epochs.
        step_id: Batches of this epoch.
        global_step_id: Batches of all epochs.
        micro_step_id: Batches of this accumulation window.
        optimizer_step_id: Optimizer steps that changed the weights.
    """

    epoch_id: int = 0
    step_id: int = 0
    global_step_id: int = 0
    micro_step_id: int = 0
    optimizer_step_id: int = 0

    @classmethod
    def of(cls, arg: "PipelineHookArgs") -> Self:
        """Return the counts that ``arg`` has."""
        return cls(**{field.name: getattr(arg, field.name) for field in fields(cls)})

    @classmethod
    def after_step(cls, arg: "PipelineHookArgs") -> Self:
        """Return the progress when the step that ``arg`` stands in is finished."""
        return cls(
            epoch_id=arg.epoch_id,
            step_id=arg.step_id + 1,
            global_step_id=arg.global_step_id + 1,
            micro_step_id=0 if arg.is_optimizer_step_boundary else arg.micro_step_id + 1,
            optimizer_step_id=arg.optimizer_step_id + int(arg.is_optimizer_step_committed),
        )

    def update_step(self, *, boundary: bool = True, committed: bool = True) -> None:
        """Count a batch, and the optimizer step that it may have ended in."""
        self.step_id += 1
        self.global_step_id += 1
        self.micro_step_id = 0 if boundary else self.micro_step_id + 1
        self.optimizer_step_id += int(committed)

    def drop_window(self) -> int:
        """Take back the batches of this epoch that no optimizer step was made of yet.

        Returns:
            How many they were.
        """
        dropped = min(self.micro_step_id, self.step_id)
        self.step_id -= dropped
        self.global_step_id -= dropped
        self.micro_step_id = 0
        return dropped

    def update_epoch(self) -> None:
        """Count an epoch."""
        self.epoch_id += 1
        self.step_id = 0

    def is_training_end(self, max_step: int | None, max_epoch: int | None) -> bool:
        """Whether one of the limits is reached; None is no limit."""
        return (max_step is not None and self.global_step_id >= max_step) or (
            max_epoch is not None and self.epoch_id >= max_epoch
        )

    def sync_pipeline_hook_arg(self, arg: "PipelineHookArgs") -> None:
        """Copy the counts to a hook's argument."""
        vars(arg).update(vars(self))

    def state_dict(self) -> dict[str, int]:
        """Return the counts."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, object]) -> Self:
        """Make the progress that ``state_dict`` returned.

        Raises:
            CheckpointError: Counts are missing, or are not whole numbers from 0 to 2**63 - 1.
        """
        counts = {field.name: state.get(field.name) for field in fields(cls)}
        wrong = {
            name: count
            for name, count in counts.items()
            if type(count) is not int or not 0 <= count < _TOO_LARGE
        }
        if wrong:
            raise CheckpointError(f"the progress of the run has no valid {repr(wrong)[:_SHOWN]}")
        return cls(**counts)  # type: ignore[arg-type]
