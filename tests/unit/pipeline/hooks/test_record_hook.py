import math
import warnings

import pytest
import torch
from accelerate import Accelerator, PartialState

from gradclip.diagnostics.record import read_record
from gradclip.errors import ArgumentValueError, RecordError
from gradclip.pipeline.hooks import (
    GradientClippingHookConfig,
    HookContext,
    OptimizerHook,
    PipelineHookArgs,
    PipelineHooks,
    RecordHook,
    RecordHookConfig,
)


@pytest.fixture(name="path")
def _path(tmp_path):
    return tmp_path / "run.jsonl"


class Loop:
    """A loop whose losses and gradients are given."""

    def __init__(self, path, linear, accelerator=None, clip=True):
        layer = linear([0.0, 0.0])
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        self.record = RecordHookConfig(path=str(path))()
        self.clipping = GradientClippingHookConfig(clip_mode="norm", max_norm=1.0)()
        clipping = [self.clipping] if clip else []
        self.hooks = PipelineHooks.from_hooks([self.record, OptimizerHook(), *clipping])
        self.arg = PipelineHookArgs(
            accelerator=accelerator,
            model=layer,
            optimizer=optimizer,
            lr_scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        )

    def step(self, loss, *gradient):
        with (
            self.hooks.begin("on_step", self.arg) as arg,
            self.hooks.begin("on_batch", arg.copy_with_updates()) as batch_arg,
        ):
            batch_arg.reduce_loss = arg.reduce_loss = torch.tensor(loss, dtype=torch.float64)
            arg.model.weight.grad = torch.tensor([gradient])


@pytest.mark.smoke
def test_every_optimizer_step_is_a_line(path, linear):
    loop = Loop(path, linear)
    with loop.hooks.begin("on_loop", loop.arg.copy_with_updates()):
        loop.step(2.0, 3.0, 4.0)
        loop.step(1.0, math.nan, 4.0)
        loop.step(0.5, 0.0, 0.5)
        loop.clipping.max_norm = 0.25
        loop.step(0.5, 0.0, 0.5)
        loop.step(0.5, 0.0, 0.5)
    first, skipped, last, changed, after = read_record(path)
    assert "max_norm=0.25" in changed.new_policy
    assert (last.new_policy, after.new_policy, after.threshold) == (None, None, 0.25)
    assert (first.step, skipped.step, last.step) == (0, 1, 2)
    assert (first.loss, skipped.loss, last.loss) == (2.0, 1.0, 0.5)
    assert (first.norm_pre, last.norm_pre) == (5.0, 0.5)
    assert first.norm_post == pytest.approx(1.0)
    assert (first.clipped, first.skipped) == (True, False)
    assert (skipped.skipped, skipped.nonfinite) == (True, 1)
    assert (last.clipped, last.skipped, last.threshold) == (False, False, 1.0)
    # The rate that the step was made with, not the scheduler's next; a skip does not move it.
    assert (first.lr, skipped.lr, last.lr) == (1.0, 0.5, 0.5)
    assert all(record.elapsed_ms >= 0 for record in (first, skipped, last))


def test_limits_by_group_are_recorded_by_group(path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(1, 1))
    policy = {"0.*": 0.5, "1.weight": 2.0, "*": None}
    clipping = GradientClippingHookConfig(policy=policy)
    arg = PipelineHookArgs(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
    hooks = PipelineHooks.from_hooks([RecordHookConfig(path=str(path)), OptimizerHook(), clipping])
    with hooks.begin("on_loop", arg.copy_with_updates()), hooks.begin("on_step", arg):
        model[0].weight.grad = torch.tensor([[3.0, 4.0]])
        model[1].weight.grad = torch.tensor([[1.0]])
        model[1].bias.grad = torch.tensor([7.0])
    (record,) = read_record(path)
    norms = {name: (group.norm_pre, group.threshold) for name, group in record.groups.items()}
    assert norms["0.*"] == (5.0, 0.5)
    assert norms["1.weight"] == (1.0, 2.0)
    assert [group.clipped for group in record.groups.values()][:2] == [True, False]
    assert (record.threshold, record.coefficient) == (0.5, pytest.approx(0.1))


def test_the_mean_of_huge_losses_does_not_overflow(path, linear):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loop = Loop(path, linear, accelerator)
    with loop.hooks.begin("on_loop", loop.arg.copy_with_updates()):
        for loss in (1e308, 1.5e308, math.inf, 1.0, math.nan, 1.0):
            with accelerator.accumulate(loop.arg.model):
                loop.step(loss, 1.0, 1.0)
    first, second, third = (record.loss for record in read_record(path))
    assert (first, second) == (1.25e308, math.inf)
    assert math.isnan(third)


def test_without_clipping_there_is_no_norm(path, linear):
    loop = Loop(path, linear, clip=False)
    with loop.hooks.begin("on_loop", loop.arg.copy_with_updates()):
        loop.step(2.0, 3.0, 4.0)
    (record,) = read_record(path)
    assert (record.loss, record.norm_pre, record.skipped) == (2.0, None, False)


def test_the_loss_of_an_accumulated_step_is_the_mean(path, linear):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loop = Loop(path, linear, accelerator)
    with loop.hooks.begin("on_loop", loop.arg.copy_with_updates()):
        for loss in (1.0, 2.0, 5.0, 7.0):
            with accelerator.accumulate(loop.arg.model):
                loop.step(loss, 1.0, 1.0)
    assert [record.loss for record in read_record(path)] == [1.5, 6.0]


def test_lines_wait_and_none_is_lost_when_something_fails(path, linear):
    loop = Loop(path, linear)
    failing = PipelineHooks()
    failing.register_hook("on_step", HookContext.from_callable(after=lambda arg: {}["no"]))

    def train():
        with loop.hooks.begin("on_loop", loop.arg.copy_with_updates()):
            for number in range(70):
                loop.step(float(number), 1.0, 1.0)
            assert len(read_record(path)) == 64
            loop.hooks += failing
            loop.step(70.0, 1.0, 1.0)

    with pytest.raises(KeyError):
        train()
    assert [record.loss for record in read_record(path)] == [float(n) for n in range(71)]


def test_a_failed_step_alone_writes_what_waits_in_a_loop_without_on_loop(path, linear):
    loop = Loop(path, linear)
    loop.step(1.0, 1.0, 1.0)
    assert read_record(path) == []
    with pytest.raises(KeyError), loop.hooks.begin("on_step", loop.arg):
        raise KeyError
    assert len(read_record(path)) == 1
    loop.record.close()


def test_a_step_that_failed_is_not_recorded(path, linear):
    loop = Loop(path, linear, clip=False)
    arg = loop.arg
    with (
        pytest.raises(KeyError),
        loop.hooks.begin("on_loop", arg.copy_with_updates()),
        loop.hooks.begin("on_optimizer_step", arg),
    ):
        raise KeyError
    assert read_record(path) == []


def test_its_state_puts_everything_on_disk_first(path, linear):
    loop = Loop(path, linear)
    assert loop.record.state_dict() == {}
    with loop.hooks.begin("on_loop", loop.arg.copy_with_updates()):
        loop.step(1.0, 1.0, 1.0)
        assert loop.record.state_dict() == {"step": 1}
        assert len(read_record(path)) == 1


def test_a_resumed_run_goes_on_without_double_lines(path, linear):
    loop = Loop(path, linear)
    with loop.hooks.begin("on_loop", loop.arg.copy_with_updates()):
        for number in range(5):
            loop.step(float(number), 1.0, 1.0)
            if number == 2:
                state = loop.record.state_dict()
    again = Loop(path, linear)
    again.record.load_state_dict(state)
    with again.hooks.begin("on_loop", again.arg.copy_with_updates()):
        again.step(30.0, 1.0, 1.0)
    records = read_record(path)
    assert [(record.step, record.loss) for record in records] == [
        (0, 0.0),
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]


def test_a_second_loop_in_the_same_process_goes_on_too(path, linear):
    loop = Loop(path, linear)
    for number in range(2):
        with loop.hooks.begin("on_loop", loop.arg.copy_with_updates()):
            loop.step(float(number), 1.0, 1.0)
    assert [record.step for record in read_record(path)] == [0, 1]


def test_a_run_from_scratch_does_not_write_over_another_one(path, linear):
    loop = Loop(path, linear)
    with loop.hooks.begin("on_loop", loop.arg.copy_with_updates()):
        loop.step(1.0, 1.0, 1.0)
    before = path.read_bytes()
    for field in ({}, {"accelerator": Accelerator(cpu=True)}):
        again = Loop(path, linear, **field)
        with (
            pytest.raises(ArgumentValueError, match=r"1 steps of an earlier run.*Three ways out"),
            again.hooks.begin("on_loop", again.arg.copy_with_updates()),
        ):
            pytest.fail("it ran")
        with pytest.raises(ArgumentValueError, match="earlier run"):
            again.step(1.0, 1.0, 1.0)
    assert path.read_bytes() == before


def test_a_file_that_is_no_record_is_left_alone(path, linear):
    path.write_text("my notes\n")
    loop = Loop(path, linear)
    with (
        pytest.raises(ArgumentValueError, match="not part of a gradclip record"),
        loop.hooks.begin("on_loop", loop.arg.copy_with_updates()),
    ):
        pytest.fail("it ran")
    assert path.read_text() == "my notes\n"


def test_a_step_that_was_made_is_recorded_though_a_hook_failed_after_it(path, linear):
    loop = Loop(path, linear)
    failing = PipelineHooks()
    failing.register_hook(
        "on_optimizer_step", HookContext.from_callable(after=lambda arg: {}["no"])
    )
    loop.hooks = PipelineHooks.from_hooks([failing, loop.hooks])
    with pytest.raises(KeyError), loop.hooks.begin("on_loop", loop.arg.copy_with_updates()):
        loop.step(1.0, 3.0, 4.0)
    (record,) = read_record(path)
    assert (record.norm_pre, record.lr) == (5.0, 1.0)
    # The scheduler followed the step.
    assert loop.arg.optimizer.param_groups[0]["lr"] == 0.5


def test_only_the_main_process_writes(path, linear):
    accelerator = Accelerator(cpu=True)
    PartialState().process_index = 1
    assert not accelerator.is_main_process
    loop = Loop(path, linear, accelerator)
    with loop.hooks.begin("on_loop", loop.arg.copy_with_updates()):
        loop.step(1.0, 1.0, 1.0)
    assert not path.exists()
    assert isinstance(loop.record, RecordHook)


def test_a_disk_that_is_full_stops_no_training(path, linear):
    """It was a raw OSError, and the steps that waited were lost with the run."""
    resource = pytest.importorskip("resource", reason="limits of a process are a thing of Unix")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    loop = Loop(path, linear)
    try:
        with loop.hooks.begin("on_loop", loop.arg.copy_with_updates()):
            for number in range(70):
                loop.step(float(number), 1.0, 1.0)
            room = path.stat().st_size + 10
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
            with pytest.warns(UserWarning, match=r"run\.jsonl cannot .*from step 64 on"):
                loop.record.flush()
            with warnings.catch_warnings(action="error"):
                loop.step(70.0, 1.0, 1.0)
                state = loop.record.state_dict()
        before = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        with (  # where a loop begins it is an error, and the old file stays
            pytest.raises(RecordError, match=r"run\.jsonl cannot be written: .*Make room there"),
            loop.hooks.begin("on_loop", loop.arg.copy_with_updates()),
        ):
            pytest.fail("it ran")
        assert path.read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [record.step for record in read_record(path)] == list(range(64))
    assert state == {"step": 71}
    # The next loop writes again.
    with loop.hooks.begin("on_loop", loop.arg.copy_with_updates()):
        loop.step(71.0, 1.0, 1.0)
    assert [record.step for record in read_record(path)] == [*range(64), 71]


def test_a_folder_is_written_by_the_hook_that_clips(tmp_path, linear):
    loop = Loop(tmp_path / "run", linear)
    with loop.hooks.begin("on_loop", loop.arg):
        loop.step(2.0, 3.0, 4.0)
        loop.step(1.0, math.nan, 4.0)
    first, skipped = read_record(tmp_path / "run")
    assert (first.loss, first.norm_pre, first.lr) == (2.0, 5.0, 1.0)
    assert (skipped.loss, skipped.reason) == (1.0, "nonfinite")
    with loop.hooks.begin("on_loop", loop.arg):  # goes on
        loop.step(0.5, 0.0, 0.5)
    assert [record.step for record in read_record(tmp_path / "run")] == [0, 1, 2]
    again = Loop(tmp_path / "run", linear)
    with (
        pytest.raises(RecordError, match="Three ways out"),
        again.hooks.begin("on_loop", again.arg),
    ):
        again.step(0.5, 0.0, 0.5)
    nobody = Loop(tmp_path / "other", linear, clip=False)
    with (
        pytest.raises(ArgumentValueError, match="which the hook that clips writes"),
        nobody.hooks.begin("on_loop", nobody.arg),
    ):
        pass
