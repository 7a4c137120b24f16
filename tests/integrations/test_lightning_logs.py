"""Lightning: what the callback tells loggers and its user."""

import logging
import math
import warnings

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning_runs import BATCHES, LIMIT, QUIET, Keep, Manual, Net, fit, half

from gradclip.diagnostics import read_log, read_record
from gradclip.errors import NonFiniteGradientError
from gradclip.integrations.lightning import GradientClippingCallback

pytestmark = QUIET


def test_the_names_are_those_of_every_framework(tmp_path):
    clipping = GradientClippingCallback({"down.*": 0.3, "*": LIMIT})
    names = set()
    logger = CSVLogger(tmp_path)
    written = []
    logger.log_metrics = lambda metrics, step=None: written.append(dict(metrics))
    keep = Keep(clipping)
    fit(Net(), clipping, keep, logger=logger, log_every_n_steps=4)
    steps = [each for each in written if "gradclip/norm_pre" in each]
    assert len(steps) == BATCHES // 4
    for number, metrics in enumerate(steps):
        results = keep.results[4 * number : 4 * number + 4]
        assert metrics["gradclip/norm_pre"] == pytest.approx(results[-1].norm_pre)
        assert metrics["gradclip/norm_post"] == pytest.approx(results[-1].norm_post)
        largest = max(each.norm_pre for each in results)
        assert metrics["gradclip/norm_max"] == pytest.approx(largest)
        for pattern, stats in results[-1].groups.items():
            assert metrics[f"gradclip/{pattern}/norm_pre"] == pytest.approx(stats.norm_pre)
        names |= metrics.keys()
    (epoch,) = [each for each in written if "gradclip/clip_fraction" in each]
    clipped = sum(each.clipped for each in keep.results)
    assert epoch["gradclip/clip_fraction"] == pytest.approx(clipped / BATCHES)
    assert epoch["gradclip/skipped"] == 0
    assert {name for name in names if name.startswith("gradclip/")} == {
        "gradclip/norm_pre",
        "gradclip/norm_post",
        "gradclip/norm_max",
        "gradclip/down.*/norm_pre",
        "gradclip/*/norm_pre",
    }


def test_tensorboard_has_them(tmp_path):
    clipping = GradientClippingCallback({"down.*": 0.3, "*": LIMIT})
    keep = Keep(clipping)
    fit(Net(), clipping, keep, logger=TensorBoardLogger(tmp_path), log_every_n_steps=1)

    (file,) = tmp_path.rglob("events.out.tfevents*")
    (run,) = read_log(file)
    assert run.norm_key == "gradclip/norm_pre"
    assert list(run.norms) == pytest.approx([each.norm_pre for each in keep.results])
    for name, count in {
        "down.*/norm_pre": BATCHES,
        "norm_max": BATCHES,
        "clip_fraction": 1,
    }.items():
        (run,) = read_log(file, norm_key=f"gradclip/{name}")
        assert len(run.norms) == count


def test_with_several_optimizers_each_has_its_number():
    clipping = GradientClippingCallback(LIMIT)
    made = fit(Manual(), clipping)
    for number in range(2):
        assert made.logged_metrics[f"gradclip/{number}/norm_max"] > 0
    assert clipping.stats.steps == 2 * BATCHES
    each = [clipper.stats for clipper in clipping.clippers]
    assert clipping.stats.clipped == sum(stats.clipped for stats in each)
    assert clipping.stats.max == max(stats.max for stats in each)


@pytest.mark.parametrize("plugins", [False, True], ids=["float32", "scaler"])
def test_a_skip_is_said_at_once_and_at_the_end(caplog, plugins):
    """But where a loss scaler answers for it."""
    clipping = GradientClippingCallback(LIMIT)
    options = {"plugins": [half()]} if plugins else {}
    with warnings.catch_warnings(record=True) as caught, caplog.at_level("WARNING", "gradclip"):
        warnings.simplefilter("always")
        fit(Net(broken={3: torch.nan}), clipping, **options)
    said = [str(each.message) for each in caught if "skipped step" in str(each.message)]
    at_end = [each for each in caplog.records if each.name == "gradclip"]
    stats = clipping.stats
    assert (stats.steps, stats.skipped, stats.nonfinite) == (BATCHES, 1, 1)
    assert math.isfinite(stats.max)
    if plugins:
        assert (said, at_end) == ([], [])
        return
    (warning,) = said
    assert warning.startswith("GradientClippingCallback skipped step 3: the gradient of up.weight")
    (record,) = at_end
    assert record.levelno == logging.WARNING
    assert "GradientClippingCallback: 1 of 8 steps were not made" in record.getMessage()


def test_a_fit_of_nothing_but_nan_ends_with_an_error_line(caplog):
    broken = dict.fromkeys(range(BATCHES), torch.nan)
    with caplog.at_level("WARNING", "gradclip"):
        fit(Net(broken=broken), GradientClippingCallback(LIMIT))
    (record,) = [each for each in caplog.records if each.name == "gradclip"]
    assert record.levelno == logging.ERROR
    assert "8 of 8 steps were not made" in record.getMessage()


def test_before_a_fit_there_are_no_steps():
    assert GradientClippingCallback(LIMIT).stats.steps == 0


def test_an_error_names_the_callback():
    clipping = GradientClippingCallback(LIMIT, nonfinite="raise")
    with pytest.raises(NonFiniteGradientError, match='"skip" to GradientClippingCallback'):
        fit(Net(broken={1: torch.nan}), clipping)


@pytest.mark.parametrize("window", [1, 2])
def test_a_record_has_the_mean_loss_of_each_window(tmp_path, window):
    model = Net()
    fit(model, GradientClippingCallback(LIMIT, record=tmp_path), accumulate_grad_batches=window)
    windows = [model.losses[at : at + window] for at in range(0, BATCHES, window)]
    found = [step.loss for step in read_record(tmp_path)]
    assert found == pytest.approx([sum(losses) / window for losses in windows])
