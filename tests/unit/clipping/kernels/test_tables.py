"""What is copied to a device, and when: a device without memory stands for a GPU."""

import pytest
import torch

from gradclip import GradientClipper
from gradclip.clipping.kernels import tables
from gradclip.clipping.kernels.tables import Addresses, Table
from gradclip.clipping.short import ways
from gradclip.errors import CaptureError

META, CPU = torch.device("meta"), torch.device("cpu")


@pytest.fixture
def capturing(monkeypatch):
    def begin():
        monkeypatch.setattr(tables, "is_capturing", lambda device: True)
        monkeypatch.setattr(ways, "is_capturing", lambda device: True)

    return begin


def test_a_table_is_copied_once_for_each_stream(monkeypatch):
    table = Table(torch.arange(3))
    assert table.on(CPU).tolist() == [0, 1, 2]
    first = table.on(META)
    assert table.on(META) is first
    monkeypatch.setattr(tables, "stream_of", lambda device: 7)
    assert table.on(META) is not first


def test_a_table_has_to_be_there_before_a_capture(capturing):
    table, late = Table(torch.arange(3)), Table(torch.arange(3))
    there = table.on(META)
    capturing()
    assert table.on(META) is there
    with pytest.raises(CaptureError, match="two or three times"):
        late.on(META)


def test_addresses_are_copied_when_they_moved():
    addresses = Addresses(CPU, 3)
    first = addresses.of([1, 2, 3])
    assert addresses.of([1, 2, 3]) is first
    second = addresses.of([1, 2, 4])
    assert second.tolist() == [1, 2, 4]
    assert first.tolist() == [1, 2, 3]  # a launch that is still queued reads these


def test_a_captured_graph_has_addresses_of_its_own(capturing, monkeypatch):
    monkeypatch.setattr(tables, "_CAPTURED", [])
    addresses = Addresses(CPU, 2)
    outside = addresses.of([1, 2])
    capturing()
    captured, again = addresses.of([1, 2]), addresses.of([3, 4])
    assert captured is not outside
    assert (captured.tolist(), again.tolist()) == ([1, 2], [3, 4])
    assert len(tables._CAPTURED) == 2
    asked = [5, 6]
    assert addresses.of(asked) is addresses.of(asked)  # measuring and scaling in one call


def test_a_captured_graph_keeps_the_tables_that_it_reads(capturing, monkeypatch):
    monkeypatch.setattr(tables, "_CAPTURED", [])
    table = Table(torch.arange(3))
    there = table.on(META)
    capturing()
    table.on(META)
    assert any(kept is there for kept in tables._CAPTURED)


def test_what_a_captured_call_reports_is_computed_in_the_capture(capturing):
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = torch.full((3,), 2.0)
    clipper = GradientClipper([weight], 1.0)
    assert "norm_pre" not in vars(clipper.clip())
    capturing()
    computed = vars(clipper.clip())
    names = {"norm_pre", "norm_post", "threshold", "coefficient", "clipped", "skipped", "norms_S"}
    assert names <= computed.keys()
