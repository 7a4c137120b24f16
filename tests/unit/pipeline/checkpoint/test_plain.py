"""States of hooks as files can hold them."""

import datetime as dt
import io
from collections import OrderedDict, defaultdict, deque
from pathlib import Path

import numpy as np
import pytest
import torch

from gradclip.errors import ArgumentTypeError
from gradclip.pipeline.checkpoint.plain import from_plain, to_plain


class Thing:
    """Of no plain kind."""


class Marked(torch.Tensor):
    """A tensor of a class of its own."""


TAGGED = torch.ones(1)
TAGGED.tag = Thing()


def through_a_file(state):
    file = io.BytesIO()
    torch.save(to_plain(state, "state"), file)
    file.seek(0)
    return from_plain(torch.load(file, weights_only=True))


@pytest.mark.parametrize(
    "value",
    [
        *(np.float64(1.5), np.float32(0.1), np.int8(-3), np.bool_(True), np.str_("word")),
        *(np.datetime64("2020-01-01"), np.arange(6, dtype=np.uint16).reshape(2, 3)),
        *(np.zeros((0, 3)), np.array(3.0), np.ones(4, np.complex64)[::2]),
        *(deque([1, Path("x")], maxlen=3), defaultdict(list, a=[np.int64(2)]), {1, Path("q")}),
        *(frozenset([2]), Path("/a/b"), dt.timedelta(days=-1, seconds=3.5)),
        *(dt.datetime(2020, 2, 3, tzinfo=dt.UTC), OrderedDict(x=1), (1, (2, np.int8(3)))),
        *(None, 1 + 2j, b"\x00\xff", 10**40, torch.Size([2]), {(1, "k"): {2.5: [True]}}),
    ],
    ids=lambda value: type(value).__name__,  # how a set is written differs by process
)
def test_each_comes_back_as_it_was(value):
    again = through_a_file({"a": [value]})["a"][0]
    assert type(again) is type(value)
    assert str(again) == str(value)
    assert np.array_equal(again, value) if isinstance(value, np.ndarray) else again == value
    if isinstance(value, np.ndarray):
        assert again.dtype == value.dtype


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (Thing(), r"state\['a'\]\[1\] is of type .*Thing"),
        (max, r"state\['a'\]\[1\] is of type builtins"),
        (np.array([Thing()]), r"state\['a'\]\[1\] is an array of object"),
        ({"z": defaultdict(lambda: 1)}, r"state\['a'\]\[1\]\['z'\] is a defaultdict"),
        (np.ma.masked_array([1.0], [True]), "is of type numpy.*MaskedArray"),
        (torch.ones(1).as_subclass(Marked), "is a tensor of type .*Marked"),
        (TAGGED, r"with the attributes \['tag'\]"),
        ({Thing(): 1}, r"state\['a'\]\[1\] has the key"),
    ],
)
def test_what_is_of_no_plain_kind_is_named(value, said):
    with pytest.raises(ArgumentTypeError, match=said):
        to_plain({"a": [0, value]}, "state")


def test_what_holds_itself_is_refused():
    value = []
    value.append(value)
    with pytest.raises(ArgumentTypeError, match=r"state\[0\] holds itself"):
        to_plain(value, "state")
