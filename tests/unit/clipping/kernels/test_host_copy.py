"""Copies to the host: their memory is taken again, by one copy at a time."""

from collections import defaultdict
from threading import Thread

import pytest
import torch

from gradclip.clipping.kernels import device


class Event:
    """Stands for an event of a device."""

    synchronized = staticmethod(lambda: None)

    def __init__(self, kind):
        pass

    def record(self, stream):
        pass

    def synchronize(self):
        Event.synchronized()


@pytest.fixture(autouse=True)
def as_on_an_accelerator(monkeypatch):
    """There are events and streams; memory is not pinned."""
    empty = torch.empty

    def unpinned(size, *, pin_memory, **kwargs):
        assert pin_memory
        return empty(size, **kwargs)

    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: None)
    monkeypatch.setattr(device, "_FREE", defaultdict(list))


def test_two_threads_that_read_a_copy_give_its_memory_back_once(monkeypatch):
    read = []
    first = device.HostCopy(torch.tensor([1.0, 2.0]))
    other = Thread(target=lambda: read.append(first.read()))

    def meanwhile():
        monkeypatch.setattr(Event, "synchronized", lambda: None)
        other.start()
        other.join(0.2)

    monkeypatch.setattr(Event, "synchronized", meanwhile)
    read.append(first.read())
    other.join()
    second, third = (device.HostCopy(torch.tensor([value, value])) for value in (3.0, 4.0))
    assert read == [[1.0, 2.0]] * 2
    assert (second.read(), third.read()) == ([3.0, 3.0], [4.0, 4.0])


def test_memory_of_inference_mode_serves_outside_of_it():
    with torch.inference_mode():
        assert device.HostCopy(torch.tensor([1.0])).read() == [1.0]
    assert device.HostCopy(torch.tensor([2.0])).read() == [2.0]
