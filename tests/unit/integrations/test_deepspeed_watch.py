"""What a watch of DeepSpeed's engine counts and says: on an engine that is made up."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch

from gradclip.diagnostics import read_record
from gradclip.errors import RecordError
from gradclip.integrations.deepspeed import EngineWatch, observe

LIMIT = 2.0


class Engine:
    """Has what the watch asks of an engine."""

    def __init__(self):
        self._config = SimpleNamespace(
            _param_dict={"zero_optimization": {"stage": 2}, "gradient_clipping": LIMIT}
        )
        self.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
        vars(self.optimizer).update(clip_grad=LIMIT, dynamic_loss_scale=False)
        self.global_steps, self.norm = 0, 0.0

    def gradient_clipping(self):
        return LIMIT

    def step(self, norm):
        self.global_steps, self.norm = self.global_steps + 1, norm

    def was_step_applied(self):
        return math.isfinite(self.norm)

    def get_global_grad_norm(self):
        return self.norm


def said(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(each.message) for each in caught]


def test_it_counts_what_it_observed():
    engine = Engine()
    watch = EngineWatch(engine, LIMIT)
    for norm in (1.0, math.inf, 8.0, 3.0):
        engine.step(norm)
        watch.observe()
        watch.observe()  # no step since
    stats = watch.stats
    assert (stats.steps, stats.clipped, stats.skipped, stats.nonfinite) == (4, 2, 1, 1)
    assert (stats.p50, stats.max, stats.since) == (3.0, 8.0, 0)


@pytest.mark.parametrize("way", ["watch", "observe"])
def test_the_first_skip_of_an_engine_is_said_once(way):
    engine = Engine()
    watch = EngineWatch(engine, LIMIT)

    def run():
        for norm in (1.0, math.inf, 8.0, math.inf):
            engine.step(norm)
            _ = watch.observe() if way == "watch" else observe(engine, LIMIT)

    (warning,) = said(run)
    assert warning.startswith("DeepSpeed skipped step 1: its gradients hold a NaN or an infinity.")


def test_an_overflow_of_its_loss_scale_is_not_said():
    engine = Engine()
    engine.optimizer.dynamic_loss_scale = True
    watch = EngineWatch(engine, LIMIT)

    def run():
        for norm in (math.inf, 1.0):
            engine.step(norm)
            watch.observe()

    assert said(run) == []
    assert watch.stats.skipped == 1


def test_a_record_is_refused_before_a_step_and_goes_on_behind_a_checkpoint(tmp_path):
    engine = Engine()
    watch = EngineWatch(engine, LIMIT, record=tmp_path)
    for _ in range(4):
        watch.begin()
        engine.step(1.0)
        watch.observe()
    watch.close()
    with pytest.raises(RecordError, match="another run"):
        EngineWatch(Engine(), LIMIT, record=tmp_path).begin()
    engine = Engine()
    watch = EngineWatch(engine, LIMIT, record=tmp_path)
    engine.global_steps = 3  # a checkpoint is loaded when there is a watch
    engine.step(1.0)
    watch.observe()
    engine.step(1.0)
    watch.observe()
    watch.close()
    assert [each.step for each in read_record(tmp_path)] == [0, 1, 2, 3, 4]
