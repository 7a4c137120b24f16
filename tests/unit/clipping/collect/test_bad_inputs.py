"""What cannot be meant is refused, in words that name it, before any gradient is touched."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import oracle
from gradclip import (
    GradientClipper,
    NormClip,
    ObserveClip,
    ValueClip,
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)
from gradclip.clipping.collect import overlap as overlap_check
from gradclip.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    GradClipError,
    OverlappingGradientsError,
    UnsupportedGradientError,
)

VALUE, KIND, EITHER = ArgumentValueError, ArgumentTypeError, (ArgumentValueError, ArgumentTypeError)
TOTAL = torch.tensor(5.0)


def case(value, error, shown, name=None):
    return pytest.param(value, error, shown, id=name or repr(value).replace("\n", "")[:30])


NOT_A_NUMBER = [
    case(True, KIND, "True"),
    case(False, KIND, "False"),
    case("big", EITHER, "big"),
    case("1.0", EITHER, "1.0"),
    case("", EITHER, "''"),
    case("nan", EITHER, "nan"),
    case("-inf", EITHER, "-inf"),
    case(b"1", KIND, "b'1'"),
    case(1j, KIND, "1j"),
    case((1.0, 2.0), KIND, "(1.0, 2.0)"),
    case([1.5], KIND, "[1.5]"),
    case({1.5}, KIND, "{1.5}"),
    case(object(), KIND, "object", "object"),
    case(float, KIND, "float", "the type float"),
    case(np.bool_(True), KIND, "True"),
    case(torch.tensor(True), KIND, "True"),
    case(torch.tensor(1j), KIND, "1.j|1j"),
]
NOT_ONE_NUMBER = [
    case(torch.tensor([1.0, 2.0]), VALUE, "2"),
    case(torch.ones(2, 3), VALUE, "6|(2, 3)", "tensor of 2 x 3"),
    case(torch.tensor([]), VALUE, "0"),
    case(np.array([1.0, 2.0]), EITHER, "2"),
]
OUT_OF_RANGE = [
    case(-1, VALUE, "-1"),
    case(-1.0, VALUE, "-1.0"),
    case(-1e-30, VALUE, "-1e-30"),
    case(-math.inf, VALUE, "-inf"),
    case(math.nan, VALUE, "nan"),
    case(10**400, VALUE, "", "10**400"),
    case(-(10**400), VALUE, "", "-10**400"),
    case(np.float64("nan"), VALUE, "nan"),
    case(np.float32(-2), VALUE, "-2.0"),
    case(torch.tensor(-1.5), VALUE, "-1.5"),
    case(torch.tensor(math.nan), VALUE, "nan"),
    case(torch.tensor([-3]), VALUE, "-3"),
]
NONE = [case(None, KIND, "None")]
CEILINGS = NOT_A_NUMBER + NOT_ONE_NUMBER + OUT_OF_RANGE
ORDERS = CEILINGS + NONE + [case(0, VALUE, "0"), case(0.0, VALUE, "0.0"), case(-0.0, VALUE, "0.0")]


def three():
    return oracle.parameters(oracle.randn(4), oracle.randn(2, 3), None)


def refused(call, params, error, *shown):
    """``call(params)`` raises ``error``, shows each of ``shown``, and changes nothing."""
    before = oracle.look(params)
    with pytest.raises(GradClipError) as caught:
        call(params)
    assert isinstance(caught.value, error), f"{type(caught.value).__name__}: {caught.value}"
    assert isinstance(caught.value, (ValueError, TypeError))
    message = str(caught.value)
    for words in shown:
        assert any(w in message for w in words.split("|")), f"{words!r} is not in: {message}"
    oracle.assert_untouched(params, before)


LIMITED = {
    "clip_grad_norm_": ("max_norm", clip_grad_norm_),
    "clip_grads_with_norm_": ("max_norm", lambda ps, v: clip_grads_with_norm_(ps, v, TOTAL)),
    "clip_grad_value_": ("clip_value", clip_grad_value_),
}


@pytest.mark.parametrize("entry", LIMITED)
@pytest.mark.parametrize(("value", "error", "shown"), CEILINGS + NONE)
def test_limits_of_the_functions(value, error, shown, entry):
    name, function = LIMITED[entry]
    refused(lambda ps: function(ps, value), three(), error, name, shown)


@pytest.mark.parametrize(("value", "error", "shown"), CEILINGS + NONE)
def test_numbers_as_policies(value, error, shown):
    # a list or an object is no number at all: then the argument to name is the policy
    refused(lambda ps: GradientClipper(ps, value).clip(), three(), error, "max_norm|policy", shown)


@pytest.mark.parametrize(("value", "error", "shown"), CEILINGS)
def test_numbers_in_a_mapping(value, error, shown):
    def call(ps):
        GradientClipper([(f"w{i}", p) for i, p in enumerate(ps)], {"w*": value}).clip()

    refused(call, three(), error, "max_norm|policy", shown)


@pytest.mark.parametrize(("value", "error", "shown"), CEILINGS + NONE)
def test_limits_of_the_policies(value, error, shown):
    for build, name in ((NormClip, "max_norm"), (ValueClip, "clip_value")):
        with pytest.raises(ValidationError) as caught:
            build(**{name: value})
        assert isinstance(caught.value, ValueError)
        assert name in str(caught.value)


@pytest.mark.parametrize(("value", "error", "shown"), ORDERS)
def test_orders(value, error, shown):
    refused(lambda ps: clip_grad_norm_(ps, 1.0, value), three(), error, "norm_type", shown)
    refused(
        lambda ps: get_total_norm(oracle.gradients(ps), value), three(), error, "norm_type", shown
    )
    for build in (ObserveClip, lambda norm_type: NormClip(max_norm=1.0, norm_type=norm_type)):
        with pytest.raises(ValidationError, match="norm_type"):
            build(norm_type=value)


@pytest.mark.parametrize(
    ("keywords", "shown"),
    [
        ({"max_nrom": 1.0}, "max_nrom"),
        ({"max_norm": 1.0, "norm": 2}, "norm"),
        ({"max_norm": 1.0, "clip_mode": "value"}, "clip_mode"),
    ],
)
def test_fields_that_a_policy_does_not_have(keywords, shown):
    with pytest.raises(ValueError, match=shown):
        NormClip(**keywords)


@pytest.mark.parametrize(
    ("keywords", "error", "shown"),
    [
        case({"nonfinite": "ignore"}, EITHER, "ignore"),
        case({"nonfinite": "SKIP"}, EITHER, "SKIP"),
        case({"nonfinite": ""}, EITHER, "''"),
        case({"nonfinite": None}, EITHER, "None"),
        case({"nonfinite": True}, EITHER, "True"),
        case({"nonfinite": ["skip"]}, EITHER, "['skip']"),
        case({"max_consecutive_skips": -1}, VALUE, "-1"),
        case({"max_consecutive_skips": 2.5}, EITHER, "2.5"),
        case({"max_consecutive_skips": True}, KIND, "True"),
        case({"max_consecutive_skips": "25"}, KIND, "25"),
        case({"max_consecutive_skips": math.nan}, EITHER, "nan"),
        case({"backend": "fast"}, EITHER, "fast"),
        case({"backend": ""}, EITHER, "''"),
        case({"backend": None}, EITHER, "None"),
        case({"backend": 3}, EITHER, "3"),
        case({"backend": ["foreach"]}, EITHER, "['foreach']"),
    ],
)
def test_options_of_the_clipper(keywords, error, shown):
    (name,) = keywords
    refused(lambda ps: GradientClipper(ps, 1.0, **keywords).clip(), three(), error, name, shown)


@pytest.mark.parametrize(
    ("policy", "error", "shown"),
    [
        case(NormClip, KIND, "NormClip", "the class itself"),
        case(lambda n: n, KIND, "lambda", "a function"),
        case("norm", EITHER, "norm"),
        case([NormClip(max_norm=1.0)], KIND, "NormClip", "a list"),
        case({"max_norm": 1.0}, EITHER, "max_norm", "fields without a policy"),
        case({}, EITHER, "{}|empty"),
        case({1: 1.0}, KIND, "1"),
        case({None: 1.0}, KIND, "None"),
        case({"w*": "x"}, EITHER, "x"),
        case({"w*": NormClip}, KIND, "NormClip", "a class in a mapping"),
        case({"w*": [1.0]}, KIND, "[1.0]"),
        case({"w*": {"w0": 1.0}}, KIND, "w0"),
        case({"w*": 1.0, "v*": 2.0}, VALUE, "v*", "a pattern that matches nothing"),
        case({"W*": 1.0}, VALUE, "W*", "the wrong case"),
        case({"": 1.0, "*": 1.0}, VALUE, "''", "the empty pattern"),
        case({"v": None, "*": 1.0}, VALUE, "v", "leaving nothing alone"),
    ],
)
def test_policies(policy, error, shown):
    def call(ps):
        GradientClipper([(f"w{i}", p) for i, p in enumerate(ps)], policy).clip()

    refused(call, three(), error, shown)


@pytest.mark.parametrize(
    ("scale", "error", "shown"),
    [
        case(0, VALUE, "0"),
        case(-2.0, VALUE, "-2.0"),
        case(math.nan, VALUE, "nan"),
        case(math.inf, VALUE, "inf"),
        case("2", EITHER, "2"),
        case(True, KIND, "True"),
        case(torch.tensor([1.0, 2.0]), EITHER, "2"),
        case(torch.tensor(0.0), VALUE, "0.0"),
        case(torch.tensor([math.nan]), VALUE, "nan"),
    ],
)
def test_scales_that_cannot_be_divided_by(scale, error, shown):
    refused(lambda ps: GradientClipper(ps, 1.0).clip(scale), three(), error, "grad_scale", shown)


def test_a_parameter_that_no_pattern_matches_would_silently_go_unclipped():
    params = three()
    pairs = list(zip(("w0", "w1", "head"), params, strict=True))
    refused(lambda _: GradientClipper(pairs, {"w*": 1.0}).clip(), params, VALUE, "head")


def test_patterns_need_names():
    def nameless(ps):
        optimizer = torch.optim.SGD([p for p in ps if p.is_leaf], lr=0.1)
        GradientClipper(optimizer, {"*": 1.0}).clip()

    refused(lambda ps: GradientClipper(ps, {"*": 1.0}).clip(), three(), GradClipError, "name")
    refused(nameless, three(), GradClipError, "name")


PARAMETERS = [
    case(None, KIND, "None"),
    case(3, KIND, "3|int"),
    case("weights", KIND, "str"),
    case(["w"], KIND, "str"),
    case([1.0], KIND, "float"),
    case([None], KIND, "None"),
    case([[torch.ones(2)]], KIND, "list", "a list of lists"),
    case([np.ones(2)], KIND, "ndarray", "arrays"),
    case(object(), KIND, "object", "object"),
    case({"w": torch.ones(2)}, KIND, "dict|str", "a state dict"),
    case(torch.nn.Linear(2, 2).parameters, KIND, "method", "the method, not called"),
    case(torch.nn.Linear, KIND, "Linear", "the class of a module"),
    case([torch.nn.Linear(2, 2)], KIND, "Linear", "a list of modules"),
]
TAKERS = {
    "clip_grad_norm_": lambda ps: clip_grad_norm_(ps, 0.1),
    "clip_grad_value_": lambda ps: clip_grad_value_(ps, 0.1),
    "clip_grads_with_norm_": lambda ps: clip_grads_with_norm_(ps, 0.1, TOTAL),
    "GradientClipper": lambda ps: GradientClipper(ps, 0.1).clip(),
}
takers = pytest.mark.parametrize("taker", TAKERS)


@takers
@pytest.mark.parametrize(("params", "error", "shown"), PARAMETERS)
def test_parameters_of_the_wrong_kind(params, error, shown, taker):
    refused(lambda _: TAKERS[taker](params), [], error, "param", shown)


@takers
def test_one_wrong_parameter_among_good_ones(taker):
    refused(lambda ps: TAKERS[taker]([*ps, 3.5]), three(), KIND, "param", "3.5|float")


@pytest.mark.parametrize(
    "pairs", [lambda p: [("w", 3)], lambda p: [(3, p)], lambda p: [("w", p, p)], lambda p: [("w",)]]
)
def test_pairs_that_are_not_name_and_tensor(pairs):
    refused(lambda ps: GradientClipper(pairs(ps[0]), 0.1).clip(), three(), KIND, "param")


@pytest.mark.parametrize("tensors", [None, 3, "weights", [1.0], [[torch.ones(2)]], object()])
def test_tensors_of_the_wrong_kind(tensors):
    refused(lambda _: get_total_norm(tensors), [], KIND, "tensors|gradient")


@takers
def test_a_finished_generator(taker):
    def call(ps):
        generator = (p for p in ps)
        assert len(list(generator)) == 3
        TAKERS[taker](generator)

    written = "params" if taker == "GradientClipper" else "parameters"
    refused(call, three(), VALUE, f"{written} is a generator")


def test_a_finished_generator_of_gradients():
    generator = (g for g in [torch.ones(2)])
    list(generator)
    refused(lambda _: get_total_norm(generator), [], VALUE, "tensors is a generator")


UNSUPPORTED = [
    torch.int64, torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2
]  # fmt: skip


@takers
@pytest.mark.parametrize("dtype", UNSUPPORTED, ids=str)
def test_gradients_that_have_no_norm(dtype, taker):
    params = [*three(), oracle.parameter(torch.ones(3).to(dtype)), *three()]
    refused(TAKERS[taker], params, UnsupportedGradientError, "3", str(dtype).removeprefix("torch."))


@takers
def test_gradients_on_the_meta_device(taker):
    params = [*three(), oracle.parameter(torch.ones(3, device="meta"))]
    refused(TAKERS[taker], params, UnsupportedGradientError, "3", "meta")


@pytest.mark.parametrize("dtype", UNSUPPORTED, ids=str)
def test_unsupported_tensors_have_no_total_norm(dtype):
    tensors = [torch.ones(2), torch.ones(3).to(dtype)]
    words = str(dtype).removeprefix("torch.")
    refused(lambda _: get_total_norm(tensors), [], UnsupportedGradientError, "1", words)


@pytest.mark.parametrize("grad", [torch.ones(2, dtype=torch.int64), torch.ones(2, device="meta")])
def test_the_parameter_is_named(grad):
    params = [oracle.parameter(oracle.randn(4)), oracle.parameter(grad)]

    def call(ps):
        named = zip(("module.head.weight", "blocks.7.bias"), ps, strict=True)
        GradientClipper(named, 0.1).clip()

    refused(call, params, UnsupportedGradientError, "blocks.7.bias")


def test_complex_gradients_have_no_value_to_clip():
    params = [*three(), oracle.parameter(torch.ones(3, dtype=torch.complex64))]
    refused(lambda ps: clip_grad_value_(ps, 0.1), params, UnsupportedGradientError, "complex")
    clipper = GradientClipper(params, ValueClip(clip_value=0.1))
    refused(lambda ps: clipper.clip(), params, UnsupportedGradientError, "complex")


BASE = oracle.randn(24)
OVERLAPPING = {
    "two windows": lambda: [BASE[:9], BASE[8:]],
    "one inside the other": lambda: [BASE, BASE[3:5]],
    "a row and a column": lambda: [BASE.view(4, 6)[1], BASE.view(4, 6)[:, 2]],
    "strides that meet": lambda: [BASE[::2], BASE[::3]],
    "the same tensor": lambda: [BASE, BASE],
    "expanded": lambda: [torch.ones(1).expand(4)],
    "expanded rows": lambda: [torch.ones(3, 1).expand(3, 5)],
    "windows into itself": lambda: [BASE.as_strided((5, 4), (2, 1))],
    "other dtype": lambda: [BASE, BASE.view(torch.int32).view(torch.float16)[7:9]],
}


@pytest.mark.smoke
@takers
@pytest.mark.parametrize("overlap", OVERLAPPING)
def test_gradients_that_share_bytes(overlap, taker):
    params = [*three(), *oracle.parameters(*OVERLAPPING[overlap]())]
    refused(TAKERS[taker], params, OverlappingGradientsError, "3")


@pytest.mark.parametrize("overlap", ["two windows", "a row and a column", "the same tensor"])
@pytest.mark.parametrize("first", [True, False])
def test_gradients_that_are_left_alone_may_not_be_shared_either(overlap, first):
    """With {"a": None, "b": 0.1} the gradient of a was scaled too, where it was that of b."""
    params = oracle.parameters(*OVERLAPPING[overlap]())
    policy = {"a": None, "b": 0.1} if first else {"b": 0.1, "a": None}
    clipper = GradientClipper(zip("ab", params, strict=True), policy)
    refused(
        lambda ps: clipper.clip(), params, OverlappingGradientsError, "of a|with a", "of b|with b"
    )


def test_what_is_left_alone_may_share_its_own_bytes_and_be_of_any_kind():
    params = oracle.parameters(
        BASE[:4], BASE[:4], torch.ones(1).expand(3), torch.ones(2, dtype=torch.int64),
        torch.ones(2, device="meta"), torch.eye(3).to_sparse(), BASE[4:8].clone(),
    )  # fmt: skip
    pairs = [(f"w{i}", p) for i, p in enumerate(params)]
    clipper = GradientClipper(pairs, {"w6": 0.1, "*": None})
    before = oracle.look(params[:6])
    for _ in range(2):
        clipper.clip()
    oracle.assert_untouched(params[:6], before)
    assert oracle.norm([params[6].grad]) <= 0.1


@pytest.mark.parametrize("columns", [3, 500])
def test_long_gradients_that_interleave(columns, monkeypatch):
    """They are looked at window by window, and no byte is missed between two."""
    monkeypatch.setattr(overlap_check, "_WINDOW", 1 << 8)
    whole = oracle.randn(100, columns + 2)
    apart = [whole[::2, :columns], whole[1::2, :-1], whole[::2, columns:], whole[1::2, -1]]
    params = oracle.parameters(*apart)
    clip_grad_norm_(params, 0.1)
    assert oracle.norm([whole]) <= 0.1
    for shared in (whole[99:, columns + 1 :], whole[50:52, 0], whole[:, 1]):
        params = oracle.parameters(*apart, shared)
        refused(TAKERS["clip_grad_norm_"], params, OverlappingGradientsError, "[4]")


def test_overlap_that_comes_later_is_seen():
    params = three()
    clipper = GradientClipper([(f"w{i}", p) for i, p in enumerate(params)], 0.1)
    clipper.clip()
    params[2].grad = params[0].grad[1:3]
    refused(lambda ps: clipper.clip(), params, OverlappingGradientsError, "w0", "w2")


def test_total_norms_that_are_not_one_number():
    for total in (torch.tensor([1.0, 2.0]), torch.tensor([])):
        refused(
            lambda ps, t=total: clip_grads_with_norm_(ps, 1.0, t), three(), EITHER, "total_norm"
        )
