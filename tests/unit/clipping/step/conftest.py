"""Fixtures for tests of steps: as on the CPU, and as on an accelerator."""

import pytest

from gradclip.clipping import flags
from gradclip.clipping.kernels import device, foreach


class OnCpu:
    """Numbers that are on the host, and wait all the same; it counts how often they are read."""

    reads = 0

    def __init__(self, values):
        self._values = values.clone()

    def read(self):
        OnCpu.reads += 1
        return self._values.reshape(-1).tolist()


@pytest.fixture
def unread(monkeypatch):
    """Tell the engine that reading a number would make it wait; return what counts the reads."""
    monkeypatch.setattr(foreach, "_on_cpu", lambda batch: False)
    monkeypatch.setattr(flags, "host_waits_for", lambda device: True)
    monkeypatch.setattr(device, "HostCopy", OnCpu)
    OnCpu.reads = 0
    return OnCpu


@pytest.fixture(params=["read", "unread"])
def path(request):
    if request.param == "unread":
        request.getfixturevalue("unread")
    return request.param
