"""What the callback for Lightning leaves behind, saves and logs."""

import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning_runs import (
    BATCHES,
    LIMIT,
    QUIET,
    Keep,
    Manual,
    Net,
    adamw,
    fit,
    loader,
    momentum,
    trainer,
)

import gradclip
from gradclip.errors import NonFiniteGradientError, StateError, TooManySkipsError
from gradclip.integrations.lightning import GradientClippingCallback

pytestmark = QUIET


# What it leaves behind, and what it saves.


@pytest.mark.parametrize("broken", [None, {1: torch.nan}], ids=["finished", "raised"])
def test_afterwards_the_optimizer_is_free(broken):
    optimizers = []

    def make(parameters):
        optimizers.append(adamw(parameters))
        return optimizers[-1]

    clipping = GradientClippingCallback(LIMIT, nonfinite="raise")
    if broken is None:
        fit(Net(make), clipping)
    else:
        with pytest.raises(NonFiniteGradientError):
            fit(Net(make, broken), clipping)
    assert not optimizers[0]._optimizer_step_pre_hooks
    assert not optimizers[0]._optimizer_step_post_hooks
    gradclip.attach(optimizers[0], 1.0).remove()
    fit(Net(), clipping)  # and the callback can be used again
    assert clipping.clippers[0].step == BATCHES


def test_an_optimizer_that_takes_the_place_of_another_is_clipped_too():
    class Replace(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 4:
                trainer.strategy.optimizers = [momentum(pl_module.named_parameters())]

    clipping = GradientClippingCallback(LIMIT)
    given = []

    def make(parameters):
        given.append(adamw(parameters))
        return given[-1]

    made = fit(Net(make), Replace(), clipping)
    assert [clipper.step for clipper in clipping.clippers] == [4]
    assert "gradclip/norm_pre" in made.callback_metrics
    assert not given[0]._optimizer_step_pre_hooks
    assert float(clipping.last.norm_post) == pytest.approx(LIMIT)


def test_a_checkpoint_has_the_history_and_a_resumed_run_goes_on_with_it(tmp_path):
    path = tmp_path / "last.ckpt"
    broken = {6: torch.nan, 7: torch.nan}
    made = fit(Net(broken=broken), first := GradientClippingCallback(LIMIT))
    made.save_checkpoint(path)
    state = torch.load(path, weights_only=True)["callbacks"]["GradientClippingCallback"]
    assert state["clippers"][0]["step"] == BATCHES
    assert state["clippers"][0]["consecutive_skips"] == 2
    assert first.state_dict() == state

    # Two skips before the break and one after it are three in a row.
    resumed = GradientClippingCallback(LIMIT, max_consecutive_skips=2)
    keep = Keep(resumed)
    going_on = trainer(resumed, keep, max_epochs=2)
    with pytest.raises(TooManySkipsError):
        going_on.fit(Net(broken={0: torch.nan}), loader(), ckpt_path=path)
    assert resumed.clippers[0].step == BATCHES
    assert keep.results == []

    healthy = GradientClippingCallback(LIMIT, max_consecutive_skips=2)
    trainer(healthy, max_epochs=2).fit(Net(), loader(), ckpt_path=path)
    assert healthy.clippers[0].step == 2 * BATCHES


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    fit(Net(), GradientClippingCallback(LIMIT)).save_checkpoint(path)
    other = GradientClippingCallback({"up.*": 1.0, "*": None})
    with pytest.raises(StateError):
        trainer(other, max_epochs=2).fit(Net(), loader(), ckpt_path=path)
    state = torch.load(path, weights_only=True)["callbacks"]["GradientClippingCallback"]
    two = GradientClippingCallback(LIMIT)
    two.load_state_dict(state)
    with pytest.raises(StateError, match="1 optimizers, and there are 2"):
        fit(Manual(), two)


# What it logs.


class Reads(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the numbers that are read on the host."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


class Logged(GradientClippingCallback):
    reads = logs = 0

    def _log(self, *arguments):
        self.logs += 1
        with Reads() as reads:
            super()._log(*arguments)
        self.reads += reads.count

    def on_train_epoch_end(self, trainer, pl_module):
        with Reads() as reads:
            super().on_train_epoch_end(trainer, pl_module)
        self.reads += reads.count


def test_it_logs_norms_at_steps_and_fractions_for_epochs_and_reads_nothing(tmp_path):
    from lightning.pytorch.loggers import CSVLogger  # noqa: PLC0415

    clipping = Logged(15.0)
    keep = Keep(clipping)
    logger = CSVLogger(tmp_path)
    made = fit(
        Net(momentum, broken={5: torch.nan}), clipping, keep, logger=logger, log_every_n_steps=2
    )
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    written = [float(row["gradclip/norm_pre"]) for row in rows if row["gradclip/norm_pre"]]
    wanted = [each.norm_pre for each in keep.results][1::2]
    assert written == pytest.approx(wanted, nan_ok=True)
    posts = [float(row["gradclip/norm_post"]) for row in rows if row["gradclip/norm_post"]]
    assert posts == pytest.approx([each.norm_post for each in keep.results][1::2])
    clipped = [each.clipped for each in keep.results]
    assert 0 < sum(clipped) < BATCHES - 1  # or a share of all or none would pass for right
    last = made.callback_metrics
    assert float(last["gradclip/clip_fraction"]) == pytest.approx(sum(clipped) / BATCHES)
    assert float(last["gradclip/skipped"]) == 1.0
    assert clipping.reads == 0
    assert clipping.logs == BATCHES / 2  # Lightning's log() takes longer than the clip


def test_a_barebones_trainer_is_not_logged_to():
    clipping = GradientClippingCallback(LIMIT)
    options = {
        "log_every_n_steps": None,
        "logger": None,
        "enable_checkpointing": None,
        "enable_progress_bar": None,
    }
    fit(Net(), clipping, barebones=True, enable_model_summary=None, **options)
    assert clipping.clippers[0].step == BATCHES
