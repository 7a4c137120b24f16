"""Order, exceptions, nesting and removal of hooks."""

import functools
import gc
import operator
import weakref
from dataclasses import dataclass
from typing import Any

import pytest

from gradclip import hook as hook_module
from gradclip.errors import ArgumentTypeError, ArgumentValueError
from gradclip.hook import (
    FunctionInfo,
    HookContext,
    HookContextChannel,
    HookContextFromCallable,
    HookHandler,
    RemovableHandle,
    RemoveableHandle,
)


@dataclass
class Args:
    """What a pipeline passes: equal to every other one, so that identity is what counts."""

    exception: BaseException | None = None


class Plain:
    pass


class Tracer(HookContext[Any]):
    def __init__(self, name, log, *, fail_before=None, fail_after=None):
        super().__init__(name)
        self.log = log
        self.fail_before = fail_before
        self.fail_after = fail_after

    def before(self, arg):
        self.log.append(f"{self.name}+")
        if self.fail_before is not None:
            raise self.fail_before

    def after(self, arg):
        seen = getattr(arg, "exception", None)
        self.log.append(f"{self.name}-" if seen is None else f"{self.name}-({seen})")
        if self.fail_after is not None:
            raise self.fail_after


@pytest.fixture
def log():
    return []


@pytest.fixture(autouse=True)
def nothing_stays_in_flight():
    yield
    assert not hook_module._in_flight


def channel_of(*hooks):
    channel = HookContextChannel("on_step")
    for hook in hooks:
        channel.register(hook)
    return channel


# Order


@pytest.mark.smoke
def test_begin_runs_befores_body_and_afters_in_the_order_of_registration(log):
    channel = channel_of(*(Tracer(name, log) for name in "abc"))
    arg = Args()
    with channel.begin(arg) as given:
        assert given is arg
        log.append("body")
    assert log == ["a+", "b+", "c+", "body", "a-", "b-", "c-"]


def test_an_empty_channel_yields_its_arg_of_any_kind():
    for arg in (None, 3, "text", [], Plain(), Args()):
        with HookContextChannel("x").begin(arg) as given:
            assert given is arg


def test_a_context_made_of_callables_may_have_only_one_of_them(log):
    channel = channel_of(
        HookContext.from_callable("first", before=log.append),
        HookContext.from_callable(after=log.append),
        HookContext.from_callable(),
    )
    with channel.begin("arg"):
        log.append("body")
    assert log == ["arg", "body", "arg"]
    assert [hook.name for hook in channel] == ["first", None, None]
    assert all(isinstance(hook, HookContextFromCallable) for hook in channel)


def test_a_context_can_run_alone_under_the_same_rules(log):
    with Tracer("a", log).begin(Args()) as arg:
        log.append("body")
    error = ValueError("before")
    with pytest.raises(ValueError, match="before"), Tracer("b", log, fail_before=error).begin(arg):
        log.append("not reached")
    assert log == ["a+", "body", "a-", "b+"]
    assert arg.exception is error


def test_before_and_after_are_abstract():
    class Half(HookContext[Any]):
        def before(self, arg):
            pass

    with pytest.raises(TypeError, match="after"):
        Half()


# Exceptions


def test_a_failed_before_unwinds_only_what_was_entered(log):
    """The original runs every ``after`` then, also of contexts that never began."""
    error = ValueError("B")
    arg = Args()
    channel = channel_of(Tracer("a", log), Tracer("b", log, fail_before=error), Tracer("c", log))
    with pytest.raises(ValueError, match="B") as caught, channel.begin(arg):
        log.append("body")
    assert log == ["a+", "b+", "a-(B)"]
    assert caught.value is error
    assert arg.exception is error


def test_every_after_runs_though_one_fails_and_the_bodys_error_stays(log):
    """The original stops at the first ``after`` that fails, and its error replaces the body's."""
    arg = Args()
    channel = channel_of(
        Tracer("a", log, fail_after=KeyError("A")), Tracer("b", log), Tracer("c", log)
    )
    body = ValueError("body")
    with pytest.raises(ValueError, match="body") as caught, channel.begin(arg):
        raise body
    assert caught.value is body
    assert log[3:] == ["a-(body)", "b-(body)", "c-(body)"]
    assert arg.exception is body
    assert len(body.__notes__) == 1
    assert "Tracer.after" in body.__notes__[0]
    assert "KeyError: 'A'" in body.__notes__[0]
    assert f"{__file__}:" in body.__notes__[0]


def test_the_first_failed_after_is_raised_and_later_ones_see_it_and_become_notes(log):
    first, second = ValueError("first"), RuntimeError("second")
    arg = Args()
    channel = channel_of(
        Tracer("a", log),
        Tracer("b", log, fail_after=first),
        Tracer("c", log, fail_after=second),
        Tracer("d", log),
    )
    with pytest.raises(ValueError, match="first") as caught, channel.begin(arg):
        pass
    assert caught.value is first
    assert log[4:] == ["a-", "b-", "c-(first)", "d-(first)"]
    assert arg.exception is first
    assert ["second" in note for note in first.__notes__] == [True]


def test_an_after_that_raises_the_same_error_again_adds_no_note():
    def again(arg):
        raise arg.exception

    body = ValueError("body")
    channel = channel_of(HookContext.from_callable(after=again))
    with pytest.raises(ValueError, match="body"), channel.begin(Args()):
        raise body
    assert not hasattr(body, "__notes__")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_what_is_no_exception_unwinds_the_same_way(log, error):
    arg = Args()
    with pytest.raises(type(error)) as caught, channel_of(Tracer("a", log)).begin(arg):
        raise error
    assert caught.value is error
    assert len(log) == 2
    assert arg.exception is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_an_interrupted_hook_unwinds_the_same_way(log, error):
    others = Tracer("a", log), Tracer("c", log)
    for middle in (Tracer("b", log, fail_before=error), Tracer("b", log, fail_after=error)):
        arg = Args()
        with (
            pytest.raises(type(error)),
            channel_of(others[0], middle, others[1]).begin(arg),
        ):
            pass
        assert arg.exception is error
    assert log == ["a+", "b+", f"a-({error})", "a+", "b+", "c+", "a-", "b-", f"c-({error})"]


def test_an_arg_without_the_attribute_never_gets_one(log):
    arg = Plain()
    error = ValueError("body")
    with pytest.raises(ValueError, match="body"), channel_of(Tracer("a", log)).begin(arg):
        raise error
    assert vars(arg) == {}
    assert log == ["a+", "a-"]


def test_the_error_does_not_keep_the_arg_alive_once_it_is_dropped():
    """A cycle of error, traceback, frame and arg would hold a whole batch until a collection."""

    def fail(_):
        raise ValueError("after")

    class Batch:
        pass

    arg = Batch()
    alive = weakref.ref(arg)
    gc.disable()
    try:
        with (
            pytest.raises(ValueError, match="after"),
            channel_of(HookContext.from_callable(after=fail)).begin(arg),
        ):
            pass
        del arg
        assert alive() is None
    finally:
        gc.enable()


# Nesting


def test_the_outermost_begin_clears_the_exception_and_leaves_its_own_readable(log):
    arg = Args(exception=ValueError("of the last step"))
    with channel_of(Tracer("a", log)).begin(arg):
        assert arg.exception is None
        assert id(arg) in hook_module._in_flight
    assert not hook_module._in_flight
    assert log == ["a+", "a-"]


def test_a_nested_begin_neither_clears_nor_replaces_the_exception():
    arg = Args()
    outer, inner = HookContextChannel("on_step"), HookContextChannel("on_batch")
    first, second = ValueError("first"), ValueError("second")
    with outer.begin(arg):
        with pytest.raises(ValueError, match="first"), inner.begin(arg):
            raise first
        assert arg.exception is first
        with inner.begin(arg):
            assert arg.exception is first
        with pytest.raises(ValueError, match="second"), inner.begin(arg):
            raise second
        assert arg.exception is first
    assert arg.exception is first


def test_a_nested_error_is_raised_by_the_nested_begin_as_its_own(log):
    """The error of an inner body is what its ``with`` raises, though an earlier one is kept."""
    arg = Args()
    with HookContextChannel("outer").begin(arg):
        arg.exception = ValueError("kept")
        with pytest.raises(RuntimeError, match="own"), channel_of(Tracer("a", log)).begin(arg):
            raise RuntimeError("own")
        assert str(arg.exception) == "kept"
    assert log == ["a+", "a-(kept)"]


def test_the_outermost_begin_records_its_own_error_over_one_that_was_caught():
    arg = Args()
    last = KeyError("uncaught")
    with pytest.raises(KeyError), HookContextChannel("outer").begin(arg):  # noqa: PT012
        with pytest.raises(ValueError, match="caught"), HookContextChannel("inner").begin(arg):
            raise ValueError("caught")
        raise last
    assert arg.exception is last


def test_one_error_through_several_begins_stays_one(log):
    arg = Args()
    error = ValueError("deep")
    with (
        pytest.raises(ValueError, match="deep") as caught,
        channel_of(Tracer("outer", log)).begin(arg),
        channel_of(Tracer("inner", log)).begin(arg),
    ):
        raise error
    assert caught.value is error
    assert arg.exception is error
    assert log[2:] == ["inner-(deep)", "outer-(deep)"]
    assert not hasattr(error, "__notes__")


def test_outermost_is_counted_per_object_and_not_by_equality():
    first, second = Args(), Args(exception=ValueError("old"))
    channel = HookContextChannel("x")
    with channel.begin(first), channel.begin(second):
        assert second.exception is None
        assert first == second


def test_a_failing_before_leaves_the_arg_ready_for_the_next_begin(log):
    arg = Args()
    channel = channel_of(Tracer("a", log, fail_before=ValueError("once")))
    with pytest.raises(ValueError, match="once"), channel.begin(arg):
        pass
    channel.unregister_all()
    with channel.begin(arg):
        assert arg.exception is None


def test_an_abandoned_generator_leaves_its_begin():
    arg = Args()

    def steps():
        with HookContextChannel("x").begin(arg):
            yield 1

    generator = steps()
    next(generator)
    assert id(arg) in hook_module._in_flight
    generator.close()
    assert not hook_module._in_flight
    assert isinstance(arg.exception, GeneratorExit)


# Registration


def test_registration_is_an_ordered_set_by_identity(log):
    class Equal(Tracer):
        def __eq__(self, other):
            return True

        def __hash__(self):
            return 1

    first, second = Equal("first", log), Equal("second", log)
    channel = channel_of(first, second, first)
    assert len(channel) == 2
    assert channel[0] is first
    assert channel[-1] is second
    assert [hook.name for hook in channel] == ["first", "second"]
    channel.register(second).remove()
    assert list(channel) == [first]


@pytest.mark.parametrize("undo", [RemoveableHandle.remove, operator.call])
def test_both_ways_to_undo_a_registration_unregister_once(log, undo):
    """The original's ``remove()`` only disarms the handle: the hook stays registered."""
    channel = HookContextChannel("x")
    hook = Tracer("a", log)
    handle = channel.register(hook)
    undo(handle)
    assert len(channel) == 0
    channel.register(hook)
    undo(handle)
    handle.remove()
    handle()
    assert len(channel) == 1


def test_a_handle_unregisters_at_the_end_of_a_with_block(log):
    channel = HookContextChannel("x")
    with channel.register(Tracer("a", log)) as handle:
        assert isinstance(handle, RemovableHandle)
        assert len(channel) == 1
    assert len(channel) == 0


def test_a_handle_calls_its_hook_once_and_drops_it():
    calls = []
    handle = RemoveableHandle(lambda: calls.append(1))
    handle()
    handle.remove()
    assert calls == [1]
    assert handle.hook is None


def test_changing_the_registrations_inside_a_hook_takes_effect_at_the_next_begin(log):
    channel = HookContextChannel("x")
    late = Tracer("late", log)

    def swap(_):
        channel.unregister_all()
        channel.register(late)

    channel.register(HookContext.from_callable("swap", before=swap))
    channel.register(Tracer("old", log))
    with channel.begin(Args()):
        pass
    assert log == ["old+", "old-"]
    with channel.begin(Args()):
        pass
    assert log[2:] == ["late+", "late-"]


def test_a_hook_removed_in_the_body_still_runs_its_after(log):
    channel = HookContextChannel("x")
    handle = channel.register(Tracer("a", log))
    with channel.begin(Args()):
        handle()
    assert log == ["a+", "a-"]


def names(channel):
    return [hook.name for hook in channel]


def test_a_registered_channel_stays_alive_until_it_is_removed_at_once(log):
    channel, other = channel_of(Tracer("a", log)), channel_of(Tracer("b", log))
    handle = channel.register_hook_channel(other)
    channel.register(Tracer("c", log))
    later = other.register(Tracer("later", log))
    assert names(channel) == ["a", "b", "later", "c"]
    later()
    assert names(channel) == ["a", "b", "c"]
    handle()
    other.register(Tracer("too late", log))
    assert names(channel) == ["a", "c"]


def test_what_a_registered_channel_gains_or_loses_counts_from_the_next_begin(log):
    channel, other = channel_of(), channel_of()
    channel += other
    gone = other.register(Tracer("gone", log))
    with channel.begin(Args()):
        gone()
        other.register(Tracer("new", log))
    assert log == ["gone+", "gone-"]
    with channel.begin(Args()):
        pass
    assert log[2:] == ["new+", "new-"]


def test_a_context_in_two_registered_channels_runs_once_at_its_first_place(log):
    both = Tracer("both", log)
    channel = channel_of(Tracer("a", log))
    handle = channel.register_hook_channel(channel_of(both))
    channel += channel_of(Tracer("b", log), both)
    assert names(channel) == ["a", "both", "b"]
    handle()
    assert names(channel) == ["a", "b", "both"]


def test_a_channel_that_was_moved_to_the_end_is_still_alive_and_removable(log):
    channel, other = channel_of(), channel_of(Tracer("last", log))
    handle = channel.register_hook_channel(channel_of(other[0]))
    channel.move_to_end(other)
    assert names(channel) == ["last"]
    channel.register(Tracer("a", log))
    assert names(channel) == ["a", "last"]
    handle()
    assert names(channel) == ["a"]


def test_channels_that_hold_each_other_end(log):
    channel, other = channel_of(Tracer("a", log)), channel_of(Tracer("b", log))
    channel += other
    other += channel
    assert names(channel) == ["a", "b"]
    assert names(other) == ["b", "a"]


def test_plus_equals_takes_a_channel_or_a_hook_and_nothing_else(log):
    channel = HookContextChannel("on_step")
    same = channel
    channel += Tracer("a", log)
    channel += channel_of(Tracer("b", log))
    assert channel is same
    assert [hook.name for hook in channel] == ["a", "b"]
    with pytest.raises(ArgumentTypeError, match="from_callable"):
        channel += print
    with pytest.raises(TypeError, match="type function"):
        channel.register(lambda _: None)


def test_a_channel_of_another_name_is_refused(log):
    with pytest.raises(ArgumentValueError, match=r"'on_epoch' cannot be registered in .*'on_step'"):
        HookContextChannel("on_step").register_hook_channel(HookContextChannel("on_epoch"))


# repr


def plain_function(arg):
    pass


def wrapped_function(arg):
    @functools.wraps(plain_function)
    def inner(arg):
        pass

    return inner


class CallableObject:
    def __call__(self, arg):
        pass

    def method(self, arg):
        pass

    @classmethod
    def of_class(cls, arg):
        pass


class Hostile:
    def __call__(self, arg):
        pass

    def __getattr__(self, name):
        raise RuntimeError(name)

    def __repr__(self):
        raise RuntimeError("repr")


def line_of(function):
    return f"{__file__}:{function.__code__.co_firstlineno}"


@pytest.mark.parametrize(
    ("func", "name", "place"),
    [
        (plain_function, "plain_function", line_of(plain_function)),
        (wrapped_function(None), "plain_function", line_of(plain_function)),
        (CallableObject().method, "CallableObject.method", line_of(CallableObject.method)),
        (CallableObject.of_class, "CallableObject.of_class", line_of(CallableObject.of_class)),
        (CallableObject(), "CallableObject", line_of(CallableObject.__call__)),
        (
            functools.partial(functools.partial(plain_function, 1), 2),
            "partial(plain_function)",
            line_of(plain_function),
        ),
        (
            functools.partial(CallableObject().method),
            "partial(CallableObject.method)",
            line_of(CallableObject.method),
        ),
        (Tracer, "Tracer", line_of(Tracer.__init__)),
        (print, "print", "<no Python source>"),
        ([].append, "list.append", "<no Python source>"),
        (operator.itemgetter(1), "itemgetter", "<no Python source>"),
        (functools.partial(print, end=""), "partial(print)", "<no Python source>"),
        (dict, "dict", "<no Python source>"),
    ],
)
def test_repr_shows_every_kind_of_callable_with_its_source(func, name, place):
    """The original raises for everything but functions and methods."""
    hook = HookContext.from_callable("mine", before=func)
    shown = f"HookContextFromCallable(name='mine', before=<{name} at {place}>, after=None)"
    assert repr(hook) == shown
    assert repr(channel_of(hook)) == f"HookContextChannel('on_step', hooks: 1)\n  0: {shown}"


def test_repr_survives_a_ring_of_wrappers_and_an_object_that_always_raises():
    ring = wrapped_function(None)
    ring.__wrapped__ = ring
    for func, name in ((ring, "plain_function"), (Hostile(), "Hostile")):
        shown = repr(HookContext.from_callable(after=func))
        assert f"after=<{name} at <no Python source>>" in shown


def test_repr_of_a_lambda_and_of_a_subclass_shows_the_line(log):
    function = lambda _: None  # noqa: E731
    assert line_of(function) in repr(HookContext.from_callable(after=function))
    assert f"<Tracer.after at {line_of(Tracer.after)}>" in repr(Tracer("a", log))


def test_repr_of_a_subclass_that_never_called_super_init():
    class Bare(HookContext[Any]):
        def __init__(self):
            pass

        def before(self, arg):
            pass

        def after(self, arg):
            pass

    assert repr(Bare()).startswith("Bare(name=None, before=<")


def test_function_info_tells_owner_signature_and_source():
    owner = CallableObject()
    info = FunctionInfo.from_callable(owner.method)
    assert info.owner is owner
    assert str(info.signature) == "(arg)"
    assert info.source_code.strip() == "def method(self, arg):\n        pass"
    nothing = FunctionInfo.from_callable(Hostile())
    assert (nothing.owner, nothing.source_file, nothing.source_code) == (None, None, None)
    assert FunctionInfo.from_callable(3).signature is None


# HookHandler


def test_a_handler_list_calls_all_in_order_with_the_same_arguments():
    calls = []
    handlers = HookHandler("events")
    handlers.register(lambda *args, **kwargs: calls.append((1, args, kwargs)))
    second = handlers.register(lambda *args, **kwargs: calls.append((2, args, kwargs)))
    handlers("x", key=3)
    assert calls == [(1, ("x",), {"key": 3}), (2, ("x",), {"key": 3})]
    second.remove()
    assert len(handlers) == 1
    handlers.unregister_all()
    handlers("x")
    assert len(calls) == 2


def test_a_handler_for_one_call_runs_once_even_when_it_fails_and_can_be_taken_back():
    calls = []

    def fail(value):
        calls.append(value)
        raise ValueError("once")

    handlers = HookHandler("events")
    handlers.register_once(fail)
    assert "fail" in repr(handlers)
    with pytest.raises(ValueError, match="once"):
        handlers(1)
    handlers(2)
    assert calls == [1]
    handlers.register_once(calls.append).remove()
    handlers(3)
    assert calls == [1]


def test_a_bound_method_is_the_same_handler_each_time_it_is_named():
    owner = CallableObject()
    handlers = HookHandler("events")
    handlers.register(owner.method)
    handlers.register(owner.method)
    assert len(handlers) == 1
