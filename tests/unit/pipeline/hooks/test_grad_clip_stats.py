"""What the clipping hook tells of a run: counts, and a line at its end."""

import logging
import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from gradclip.pipeline import HookBasedTrainer, SimpleBatchProcessor
from gradclip.pipeline.hooks import (
    GradientClippingHookConfig,
    OptimizerHook,
    PipelineHookArgs,
    PipelineHooks,
)

CLIP = GradientClippingHookConfig(max_norm=0.5)


def train(batches):
    """Train on the gradients of one weight; return the clipping hook."""
    model, clipping = nn.Linear(1, 1, bias=False), CLIP()
    HookBasedTrainer(
        Accelerator(cpu=True),
        model,
        [torch.tensor([[each]]) for each in batches],
        SimpleBatchProcessor.from_callable(lambda model, batch: (None, model(batch).sum())),
        torch.optim.SGD(model.parameters(), lr=0.1),
        max_epoch=1,
        grad_clip=clipping,
    )()
    return clipping


def lines(caplog):
    return [each for each in caplog.records if each.name == "gradclip"]


def test_it_counts_the_steps_of_the_trainer():
    stats = train([0.25, 1.0, math.nan, 4.0]).stats
    assert (stats.steps, stats.clipped, stats.skipped, stats.nonfinite) == (4, 2, 1, 1)
    assert (stats.p50, stats.max, stats.since) == (1.0, 4.0, 0)


def test_before_a_step_there_are_none():
    assert CLIP().stats.steps == 0


@pytest.mark.parametrize(
    ("batches", "levels"),
    [
        ([1.0, 2.0], []),
        ([1.0, math.nan, 2.0], [logging.WARNING]),
        ([math.nan, math.nan, 2.0], [logging.ERROR]),
    ],
)
def test_a_run_with_skipped_steps_says_so_at_its_end(caplog, batches, levels):
    with caplog.at_level(logging.WARNING, "gradclip"):
        train(batches)
    assert [each.levelno for each in lines(caplog)] == levels
    for record in lines(caplog):
        assert "GradientClippingHook: " in record.getMessage()
        assert f"of {len(batches)} steps were not made" in record.getMessage()


def test_also_where_an_error_ends_it(caplog):
    hooks = PipelineHooks.from_hooks([CLIP(), OptimizerHook()])
    layer = nn.Linear(1, 1)
    arg = PipelineHookArgs(optimizer=torch.optim.SGD(layer.parameters(), lr=0.1))

    def loop():
        with hooks.begin("on_loop", PipelineHookArgs()):
            with hooks.begin("on_step", arg):
                for parameter in layer.parameters():
                    parameter.grad = torch.full_like(parameter, math.nan)
            raise KeyboardInterrupt

    with caplog.at_level(logging.WARNING, "gradclip"), pytest.raises(KeyboardInterrupt):
        loop()
    (record,) = lines(caplog)
    assert "1 of 1 steps were not made" in record.getMessage()
