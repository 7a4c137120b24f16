"""The numbers that bound gradients: one check for configurations and for arguments."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from gradclip.config import Ceiling, Config, NormOrder, as_ceiling, as_norm_order
from gradclip.errors import ArgumentTypeError, ArgumentValueError


class Limits(Config):
    max_norm: Ceiling = 1.0
    norm_type: NormOrder = 2.0


GOOD = [
    (1, 1.0),
    (0.5, 0.5),
    (math.inf, math.inf),
    ("inf", math.inf),
    (5e-324, 5e-324),
    (np.float32(0.5), 0.5),
    (np.int64(3), 3.0),
    (Fraction(1, 2), 0.5),
]
ELEMENTS = [
    (torch.tensor(2.5), 2.5),
    (torch.tensor([[3]]), 3.0),
    (torch.tensor(math.inf), math.inf),
]
OUT_OF_RANGE = [-1, -5e-324, -math.inf, math.nan, np.float64("nan"), 10**400, -(10**400)]
WRONG_KIND = [
    True,
    np.bool_(1),
    None,
    "1",
    "nan",
    "Inf",
    "-inf",
    "",
    b"inf",
    1j,
    [1.0],
    (1.0,),
    {},
    Decimal(1),
    np.array([1.0]),
    object(),
    float,
]


@pytest.mark.parametrize(("value", "expected"), [*GOOD, *ELEMENTS])
@pytest.mark.parametrize("check", [as_ceiling, as_norm_order])
def test_a_number_becomes_a_float(check, value, expected):
    number = check(value, "max_norm")
    assert number == expected
    assert type(number) is float


def test_zero_is_a_ceiling_and_no_order():
    for zero in (0, 0.0, -0.0, torch.tensor(-0.0)):
        assert math.copysign(1, as_ceiling(zero, "max_norm")) == 1.0
        with pytest.raises(ArgumentValueError, match="expected a number > 0"):
            as_norm_order(zero)


@pytest.mark.parametrize("check", [as_ceiling, as_norm_order])
@pytest.mark.parametrize(
    "value", [*OUT_OF_RANGE, torch.tensor(-1.0), torch.tensor([]), torch.ones(2), torch.ones(2, 1)]
)
def test_out_of_range_is_a_value_error_that_names_the_argument(check, value):
    with pytest.raises(ArgumentValueError, match=r"^limit "):
        check(value, "limit")


@pytest.mark.parametrize("check", [as_ceiling, as_norm_order])
@pytest.mark.parametrize("value", [*WRONG_KIND, torch.tensor(True), torch.tensor(1j)])
def test_the_wrong_kind_is_a_type_error_that_names_the_argument(check, value):
    with pytest.raises(ArgumentTypeError, match=r"^limit is .*expected a number"):
        check(value, "limit")


@pytest.mark.parametrize(("value", "expected"), GOOD)
@pytest.mark.parametrize("field", ["max_norm", "norm_type"])
def test_a_configuration_takes_the_same_numbers(field, value, expected):
    assert getattr(Limits(**{field: value}), field) == expected


@pytest.mark.parametrize("value", [*OUT_OF_RANGE, *WRONG_KIND, *(each for each, _ in ELEMENTS)])
@pytest.mark.parametrize("field", ["max_norm", "norm_type"])
def test_a_configuration_refuses_the_same_and_tensors(field, value):
    with pytest.raises(ValidationError, match=f"{field} is "):
        Limits(**{field: value})


def test_infinity_is_written_as_text():
    limits = Limits(max_norm=math.inf, norm_type="inf")
    assert limits.to_dict() == {"max_norm": math.inf, "norm_type": math.inf}
    assert limits.to_dict(mode="json") == {"max_norm": "inf", "norm_type": "inf"}
    assert Limits.from_dict(limits.to_dict(mode="json")) == limits


def test_a_json_schema_can_be_made():
    assert Limits.model_json_schema()["properties"]["max_norm"]["type"] == "number"
