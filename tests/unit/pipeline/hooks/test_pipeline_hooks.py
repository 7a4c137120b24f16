import functools
from types import SimpleNamespace

import pytest
from accelerate import Accelerator

from gradclip.config import ClassType, dump, load
from gradclip.errors import ArgumentTypeError, ArgumentValueError
from gradclip.pipeline.hooks import (
    HookContext,
    HookContextChannel,
    HookListConfig,
    OptimizerHook,
    OptimizerHookConfig,
    PipelineHookArgs,
    PipelineHookChanelType,
    PipelineHookChannelType,
    PipelineHooks,
    PipelineHooksConfig,
)


class Logging(PipelineHooks):
    """Notes when its hook runs, under its name."""

    def __init__(self, cfg=None, name="hook", log=None):
        super().__init__()
        self.name = name
        self.log = [] if log is None else log
        self.register_hook(
            "on_step",
            HookContext.from_callable(
                name,
                before=lambda arg: self.log.append(f"{self.name} before"),
                after=lambda arg: self.log.append(f"{self.name} after"),
            ),
        )


class LoggingConfig(PipelineHooksConfig[Logging]):
    class_type: ClassType[Logging] = Logging


def run(hooks, channel="on_step"):
    with hooks.begin(channel, PipelineHookArgs()):
        pass


def test_the_channels_are_those_of_the_original_and_the_optimizer_step():
    channels = ["on_loop", "on_epoch", "on_step", "on_batch"]
    channels += ["on_model_forward", "on_model_backward", "on_optimizer_step"]
    assert list(PipelineHooks().hooks) == channels
    assert PipelineHookChanelType.__args__ == tuple(channels)
    assert PipelineHookChannelType is PipelineHookChanelType
    assert all(isinstance(c, HookContextChannel) for c in PipelineHooks().hooks.values())


@pytest.mark.smoke
def test_hooks_run_in_the_order_of_registration_before_and_after():
    log = []
    hooks = PipelineHooks()
    hooks += Logging(name="a", log=log)
    hooks += Logging(name="b", log=log)
    with hooks.begin("on_step", PipelineHookArgs()):
        log.append("body")
    assert log == ["a before", "b before", "body", "a after", "b after"]


def test_begin_yields_the_argument_and_puts_the_hooks_on_it():
    hooks, arg = PipelineHooks(), PipelineHookArgs()
    with hooks.begin("on_step", arg) as given:
        assert given is arg
        assert arg.hooks is hooks
    assert arg.hooks is None


def test_a_nested_begin_of_other_hooks_gives_the_argument_back_to_the_first():
    outer, inner, arg = PipelineHooks(), PipelineHooks(), PipelineHookArgs()
    with outer.begin("on_step", arg):
        with inner.begin("on_batch", arg):
            assert arg.hooks is inner
        assert arg.hooks is outer
    assert arg.hooks is None


def test_hooks_are_taken_off_the_argument_when_a_before_fails():
    hooks, arg = PipelineHooks(), PipelineHookArgs()
    error = KeyError("no")

    def fail(arg):
        raise error

    hooks.register_hook("on_step", HookContext.from_callable(before=fail))
    with pytest.raises(KeyError), hooks.begin("on_step", arg):
        pytest.fail("the body must not run")
    assert arg.hooks is None
    assert arg.exception is error


def test_an_unknown_channel_is_named_with_those_that_exist():
    hook = HookContext.from_callable()
    for call in (
        lambda: PipelineHooks().begin("on_stpe", PipelineHookArgs()),
        lambda: PipelineHooks().register_hook("on_stpe", hook),
        lambda: PipelineHooks().begin(["on_step"], PipelineHookArgs()),
    ):
        with pytest.raises(ArgumentValueError, match="on_optimizer_step"):
            call()


def test_from_hooks_takes_none_hooks_configurations_and_nested_iterables():
    log = []
    assert PipelineHooks.from_hooks(None).registered_sets == ()
    assert len(PipelineHooks.from_hooks(Logging()).hooks["on_step"]) == 1
    assert isinstance(
        PipelineHooks.from_hooks(OptimizerHookConfig()).registered_sets[0], OptimizerHook
    )
    nested = [Logging(name="a", log=log), (each for each in [Logging(name="b", log=log), None]), []]
    run(PipelineHooks.from_hooks(nested))
    assert log == ["a before", "b before", "a after", "b after"]


@pytest.mark.parametrize(
    "wrong", ["on_step", 3, {"a": 1}, [OptimizerHook], OptimizerHook, [[object()]], b"x"]
)
def test_from_hooks_refuses_everything_else(wrong):
    with pytest.raises(ArgumentTypeError, match="PipelineHooks"):
        PipelineHooks.from_hooks(wrong)


def test_a_bare_hook_context_is_told_where_it_belongs():
    with pytest.raises(ArgumentTypeError, match="register_hook"):
        PipelineHooks.from_hooks(HookContext.from_callable())


def test_adding_something_else_is_a_type_error():
    hooks = PipelineHooks()
    with pytest.raises(TypeError):
        hooks += OptimizerHookConfig()
    with pytest.raises(ArgumentValueError):
        hooks += hooks


def test_a_handle_removes_the_hooks_and_the_child_once():
    hooks, child = PipelineHooks(), Logging()
    handle = hooks.register_pipeline_hooks(child)
    assert hooks.registered_sets == (child,)
    handle.remove()
    handle()
    assert hooks.registered_sets == ()
    run(hooks)
    assert child.log == []


def test_a_set_stays_alive_inside_others():
    """Removing through a handle of its own, and registering later, count from the next begin."""
    log = []
    mine = PipelineHooks()
    first = mine.register_hook(
        "on_step", HookContext.from_callable(before=lambda arg: log.append("first"))
    )
    root = PipelineHooks.from_hooks([PipelineHooks.from_hooks(mine), Logging(name="last", log=log)])
    with root.begin("on_step", PipelineHookArgs()):
        first.remove()
        late = HookContext.from_callable(before=lambda arg: log.append("late"))
        mine.register_hook("on_step", late)
        mine += Logging(name="set", log=log)
    assert log == ["first", "last before", "last after"]
    log.clear()
    run(root)
    assert log == ["late", "set before", "last before", "set after", "last after"]
    mine.unregister_all()
    log.clear()
    run(root)
    assert log == ["last before", "last after"]


def test_a_set_that_was_moved_to_the_end_keeps_its_place_as_it_grows():
    log = []
    last, other = Logging(name="last", log=log), PipelineHooks()
    root = PipelineHooks.from_hooks([PipelineHooks.from_hooks([last]), other])
    root.move_to_end(last)
    other += Logging(name="other", log=log)
    run(root)
    assert log == ["other before", "last before", "other after", "last after"]


def test_unregister_all_leaves_nothing():
    hooks = PipelineHooks.from_hooks([Logging(), OptimizerHook()])
    hooks.unregister_all()
    assert hooks.registered_sets == ()
    assert not any(len(channel) for channel in hooks.hooks.values())


def test_the_same_hooks_twice_run_once():
    child = Logging()
    hooks = PipelineHooks.from_hooks([child, child])
    run(hooks)
    assert child.log == ["hook before", "hook after"]
    assert hooks.registered_sets == (child,)


def test_move_to_end_lets_a_child_run_last():
    log = []
    first, second = Logging(name="a", log=log), Logging(name="b", log=log)
    hooks = PipelineHooks.from_hooks([PipelineHooks.from_hooks([first]), second])
    hooks.move_to_end(first)
    run(hooks)
    assert log == ["b before", "a before", "b after", "a after"]


def test_walk_yields_every_set_once_in_order_even_in_a_ring():
    a, b, c = Logging(name="a"), Logging(name="b"), PipelineHooks()
    c += a
    root = PipelineHooks.from_hooks([c, b, a])
    assert list(root.walk()) == [root, c, a, b]
    a += c
    assert list(a.walk()) == [a, c]


def test_repr_shows_each_hook_with_its_source():
    text = repr(PipelineHooks.from_hooks([Logging(), OptimizerHook()]))
    assert "on_step" in text
    assert "test_pipeline_hooks.py" in text
    assert "optimizer.py" in text
    assert "on_batch" not in text


def test_repr_never_fails_on_what_inspect_cannot_read():
    """The original's repr raises for functools.partial."""

    class Callable:
        def __call__(self, arg):
            pass

        def __repr__(self):
            raise RuntimeError

    hooks = PipelineHooks()
    for each in (functools.partial(print), print, Callable(), len, dict, Callable().__call__):
        hooks.register_hook("on_step", HookContext.from_callable(before=each, after=each))
    assert "partial(print)" in repr(hooks)


def test_hooks_can_be_subclassed_contexts():
    class Counting(HookContext):
        count = 0

        def before(self, arg):
            self.count += 1

        def after(self, arg):
            self.count += 10

    hooks, context = PipelineHooks(), Counting()
    hooks.register_hook("on_loop", context)
    run(hooks, "on_loop")
    assert context.count == 11


def test_state_is_nothing_by_default():
    hooks = PipelineHooks()
    assert hooks.state_dict() == {}
    hooks.load_state_dict({})


@pytest.mark.parametrize("format_", ["yaml", "toml", "json"])
def test_a_pipeline_fits_in_one_file(tmp_path, format_):
    path = tmp_path / f"pipeline.{format_}"
    config = HookListConfig(hooks=(OptimizerHookConfig(), LoggingConfig()))
    dump(config, path)
    again = load(path)
    assert again == config
    built = again()
    assert [type(child) for child in built.registered_sets] == [OptimizerHook, Logging]
    assert len(built.hooks["on_step"]) == 2


def test_arguments_default_to_the_beginning_of_a_run():
    arg = PipelineHookArgs()
    assert arg.accelerator is None
    assert (arg.epoch_id, arg.step_id, arg.global_step_id) == (0, 0, 0)
    assert (arg.exception, arg.clip_result, arg.hooks) == (None, None, None)
    assert arg.is_optimizer_step_boundary
    assert not arg.is_optimizer_step_committed


def test_arguments_take_the_accelerator_first_as_in_the_original():
    accelerator = Accelerator(cpu=True)
    arg = PipelineHookArgs(accelerator, 1, 2, 3)
    assert (arg.accelerator, arg.epoch_id, arg.step_id, arg.global_step_id) == (
        accelerator,
        1,
        2,
        3,
    )
    accelerator.gradient_state._set_sync_gradients(False)
    assert not arg.is_optimizer_step_boundary


def test_a_copy_has_the_updates_and_leaves_the_original_alone():
    class Mine(PipelineHookArgs):
        pass

    arg = Mine(epoch_id=1)
    copy = arg.copy_with_updates(batch=3, step_id=7)
    assert isinstance(copy, Mine)
    assert (copy.epoch_id, copy.batch, copy.step_id) == (1, 3, 7)
    assert (arg.batch, arg.step_id) == (None, 0)


def test_a_copy_refuses_names_that_are_no_fields():
    with pytest.raises(AttributeError, match="bacth"):
        PipelineHookArgs().copy_with_updates(bacth=3)


# What RoboOrchardLab's users write.


class Every(PipelineHooks):
    def __init__(self, cfg):
        super().__init__()


class EveryConfig(PipelineHooksConfig[Every]):
    class_type: ClassType[Every] = Every
    every: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.every < 1:
            raise ValueError(f"every is {self.every}: expected at least 1")


def test_the_last_check_of_a_configuration_of_ones_own_is_called():
    assert EveryConfig(every=2).every == 2
    with pytest.raises(ValueError, match="every is -1: expected at least 1"):
        EveryConfig(every=-1)


@pytest.mark.parametrize("arg", [SimpleNamespace(x=1), {"x": 1}, None])
def test_begin_takes_any_arg(arg):
    seen = []
    hooks = PipelineHooks()
    hooks.register_hook("on_step", HookContext.from_callable(before=seen.append))
    with hooks.begin("on_step", arg) as given:
        assert given is arg
    assert seen == [arg]
    assert not hasattr(arg, "hooks")


def test_a_hook_may_have_attributes_of_any_name():
    seen = []
    hooks = PipelineHooks()
    for name in ("_registered", "_channel", "walk", "move_to_end", "children"):
        setattr(hooks, name, 0)
    hooks.register_hook("on_step", HookContext.from_callable(before=seen.append))
    joined = PipelineHooks.from_hooks(hooks)
    with joined.begin("on_step", None):
        pass
    assert seen == [None]
    assert list(joined.walk()) == [joined, hooks]
