"""The callback for Lightning's ``Trainer``."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack
from weakref import ref

from gradclip.clipping import ClipResult, GradientClipper
from gradclip.clipping.arguments import ClipOptions, HasPolicy
from gradclip.clipping.collect.sources import OptimizerParameters
from gradclip.clipping.policies import as_given, as_policies
from gradclip.errors import MissingDependencyError, StateError
from gradclip.integrations.lightning.refusals import refuse_kind, refuse_other_clipping
from gradclip.integrations.lightning.step import LightningStep
from gradclip.integrations.loss_scaling import begin_anew
from gradclip.integrations.owned_step import OwnedStep, checked_options
from gradclip.integrations.tracked import numbers_of
from gradclip.record.stats import Stats, together

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    try:
        from pytorch_lightning import Callback
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "gradclip.integrations.lightning needs Lightning, which is not installed\n"
            "  pip install 'gradclip[lightning]'"
        ) from error

if TYPE_CHECKING:
    from gradclip.clipping.policies import PoliciesLike

__all__ = ["GradientClippingCallback"]

_OF_EPOCH = ("gradclip/clip_fraction", "gradclip/skipped")
_WAY_OUT = (
    "No history was changed. To go on without it, delete that of the callback: "
    "checkpoint['callbacks'].pop('GradientClippingCallback')."
)


class GradientClippingCallback(HasPolicy, Callback):
    """Clips before each optimizer step of a ``Trainer``, in the place of ``gradient_clip_val``.

    It works for every precision and strategy but DeepSpeed, for automatic and manual optimisation,
    and for fused optimizers under a loss scaler. Each optimizer is clipped by itself, once per
    step, at the end of an accumulation window. A step whose gradients hold a NaN or an infinity is
    not made: weights, moments and step counts stay as they are.

    What happened is logged at the steps that Lightning logs (``log_every_n_steps``):
    ``gradclip/norm_pre`` and ``gradclip/norm_post`` of that step, ``gradclip/norm_max``, the
    largest norm since the last log, and with limits by name pattern
    ``gradclip/<pattern>/norm_pre``. Logged for each epoch are ``gradclip/clip_fraction`` (the
    share of steps that were clipped) and ``gradclip/skipped`` (how many were not made). With
    several optimizers the names are ``gradclip/0/norm_pre`` and so on. The histories of the
    clippers are saved in Lightning's checkpoints.

    Args:
        policy: As ``GradientClipper`` takes it. A list has one entry for each ``param_group`` of
            every optimizer.
        nonfinite: Likewise.
        max_consecutive_skips: Likewise; overflows of an active loss scaler do not count until its
            scale is down to 1.
        partitioned: Likewise.
        duplicated: Likewise.
        record: Likewise.
        backend: Likewise.

    Attributes:
        last: The result of the last step of any optimizer; None before the first.
        clippers: One for each optimizer, in their order; empty before ``Trainer.fit``.

    Raises:
        ArgumentTypeError: GC011, for an argument of the wrong kind; when fitting starts, for an
            optimizer that is not torch's, or LBFGS.
        ArgumentValueError: GC010, for one out of range.
        DoubleClippingError: GC101, when fitting starts: ``gradient_clip_val``,
            ``configure_gradient_clipping``, DeepSpeed or another part of gradclip clips as well.
        StateError: GC030, a checkpoint of other policies, or another number of optimizers.
    """

    def __init__(
        self,
        policy: "PoliciesLike | None" = None,
        **options: Unpack[ClipOptions],
    ) -> None:
        super().__init__()
        self._policy, self._options = checked_options(type(self).__name__, policy, options)
        self.last: ClipResult | None = None
        self._steps: list[LightningStep] = []
        self._bound = False
        self._state: dict[str, Any] | None = None
        self._ran_backward = self._is_of_run = False

    @property
    def stats(self) -> Stats:
        """What the steps of all optimizers came to, of this fit or the last; see ``Stats``."""
        for clipper in self.clippers:
            clipper.step_log.catch_up()
        return together(clipper.step_log.counted for clipper in self.clippers)

    @property
    def policy(self) -> Any:
        """What bounds the gradients of every optimizer, in this fit and the next.

        Another one may be assigned; see ``GradientClipper.policy``. All optimizers get it, or none.
        """
        return as_given(*as_policies(self._policy))

    @policy.setter
    def policy(self, policy: "PoliciesLike") -> None:
        as_policies(policy)
        clippers = self.clippers if self._bound else []
        for clipper in clippers:
            clipper.admit(policy)
        for clipper in clippers:
            clipper.policy = policy
        self._policy = policy

    @property
    def clippers(self) -> list[GradientClipper]:
        """The clippers of the optimizers."""
        return [step.clipper for step in self._steps]

    # Lightning's hooks, in the order in which it calls them.

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse a second owner, and bind a clipper to each optimizer: on all ranks."""
        refuse_other_clipping(trainer, pl_module, self._policy)
        self._release()
        begin_anew(getattr(trainer.precision_plugin, "scaler", None))
        self._steps, self.last = [], None
        self._bound = True
        self._bind(trainer)
        if self._state is not None:
            self._load(self._state)

    def on_train_batch_start(
        self,
        trainer: Any,  # noqa: ARG002 - Lightning's signature, here and below
        pl_module: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Forget the backward pass of the last batch."""
        self._ran_backward = False
        for step in self._steps:
            step.begin_batch()

    def on_train_batch_end(self, *_: Any) -> None:
        """What steps now does not train."""
        for step in self._steps:
            step.end_batch()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Tell the record the loss of a batch, where it is that of the only optimizer."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)  # the loss is multiplied by it
        alone = len(self._steps) == 1 and pl_module.automatic_optimization and scaler is None
        if alone and self._options.get("record") is not None:
            # Lightning has divided it by how many batches there are in a window.
            self.clippers[0].note(loss=loss.detach() * trainer.accumulate_grad_batches)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Note that this batch had a backward pass."""
        self._ran_backward = True

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Clip: after the backward pass and unscaling, before the step."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and pl_module.automatic_optimization and not self._ran_backward:
            return  # training_step returned None: Lightning neither unscales nor steps
        number = self._number_of(trainer, optimizer)
        self.last = self._steps[number].clip(scaler)
        # Lightning takes longer to note a number than gradclip to clip a small model.
        if trainer._logger_connector.should_update_logs and not trainer.barebones:  # noqa: SLF001
            self._log(pl_module, number, self.last, self._steps[number].since_log.take())

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log what the steps of the epoch came to."""
        self.on_train_batch_end()  # which Lightning leaves out where a batch was refused
        for number, step in enumerate(self._steps):
            epoch = step.in_epoch.take()
            if epoch.steps and not trainer.barebones:
                # The size of a batch is of no use: there is one number for the epoch.
                log = partial(
                    pl_module.log, on_step=False, on_epoch=True, sync_dist=True, batch_size=1
                )
                log(f"{self._prefix(number)}/clip_fraction", epoch.clipped / epoch.steps)
                log(f"{self._prefix(number)}/skipped", float(epoch.skipped))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Say whether steps were not made, and take the hooks off the optimizers."""
        for number, step in enumerate(self._steps):
            if trainer.is_global_zero:
                of_several = f", optimizer {number}" * (len(self._steps) > 1)
                step.clipper.step_log.say_at_end(f"{type(self).__name__}{of_several}")
        self._release()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:  # noqa: ARG002
        """Note that what is loaded now comes from the checkpoint of this run."""
        self._is_of_run = True

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        """Forget what a checkpoint brought that was not trained on: of a test, say."""
        if self._is_of_run:
            self._state, self._is_of_run = None, False

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:  # noqa: ARG002
        """Take the hooks off the optimizers, and forget a checkpoint that could not be used."""
        self._release()
        self._state = None

    def state_dict(self) -> dict[str, Any]:
        """Return the histories of the clippers; Lightning puts them into its checkpoints.

        Empty before there are any: Lightning then saves none.
        """
        if self._state is not None:
            return self._state
        histories = [clipper.state_dict() for clipper in self.clippers]
        return {"clippers": histories} if histories else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the histories, when fitting starts if it has not yet.

        Raises:
            StateError: GC030, here or when fitting starts; no history was changed.
        """
        if not state_dict:
            return
        if self._bound:
            self._load(state_dict)
        else:
            self._state = state_dict

    def _bind(self, trainer: Any) -> None:
        """Have a step for each optimizer that there is now, in their order."""
        known = {id(step.optimizer): step for step in self._steps}
        for optimizer in trainer.optimizers:
            if id(optimizer) not in known:
                known[id(optimizer)] = self._made(trainer, optimizer)
                self._steps.append(known[id(optimizer)])  # released too where the next is refused
        self._steps = [known.pop(id(optimizer)) for optimizer in trainer.optimizers]
        for gone in known.values():
            gone.release()

    def _made(self, trainer: Any, optimizer: Any) -> LightningStep:
        refuse_kind(optimizer)
        # FSDP1's parameters do not tell which ranks have the rest, and few optimizers have names.
        source = OptimizerParameters(optimizer, module=trainer.model)
        label = type(self).__name__
        admits = partial(_refuse_other, ref(trainer))
        step = OwnedStep(
            optimizer, source, self._policy, self._options, owner=self, label=label, admits=admits
        )
        return LightningStep(step)

    def _number_of(self, trainer: Any, optimizer: Any) -> int:
        """Return which optimizer it is; one that was put in another's place is bound now."""
        if all(step.optimizer is not optimizer for step in self._steps):
            self._bind(trainer)
        return [step.optimizer for step in self._steps].index(optimizer)

    def _load(self, state: Mapping[str, Any]) -> None:
        states = state.get("clippers")
        if not isinstance(states, list):
            raise StateError(
                f"expected the clipping history of each optimizer, seen {state!r}. {_WAY_OUT}"
            )
        if len(states) != len(self._steps):
            raise StateError(
                f"the checkpoint has the history of {len(states)} optimizers, and there are "
                f"{len(self._steps)}: it belongs to another training. {_WAY_OUT}"
            )
        before = [clipper.state_dict() for clipper in self.clippers]
        try:
            for clipper, each in zip(self.clippers, states, strict=True):
                clipper.load_state_dict(each)
        except StateError as error:
            for clipper, each in zip(self.clippers, before, strict=True):
                clipper.load_state_dict(each)
            raise StateError(f"{error} {_WAY_OUT}") from error
        self._state = None

    def _release(self) -> None:
        for step in self._steps:
            step.release()
        self._bound = False

    def _prefix(self, number: int) -> str:
        return "gradclip" if len(self._steps) == 1 else f"gradclip/{number}"

    def _log(self, pl_module: Any, number: int, result: ClipResult, since: Stats) -> None:
        prefix = self._prefix(number)
        log = partial(pl_module.log, on_step=True, on_epoch=False, batch_size=1)
        for name, value in numbers_of(result, since).items():
            if name not in _OF_EPOCH:
                log(name.replace("gradclip", prefix, 1), value)


def _refuse_other(trainer: "ref[Any]", policy: object) -> None:
    """Refuse a policy that clips, where it is assigned and Lightning clips as well."""
    known = trainer()
    if known is not None:
        refuse_other_clipping(known, known.lightning_module, policy)
