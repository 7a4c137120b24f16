"""Fixtures for tests of policies."""

import pytest

from gradclip.clipping import flags
from gradclip.clipping.kernels import device, foreach


@pytest.fixture
def unread(monkeypatch):
    """Tell the engine that reading a number would make it wait."""
    monkeypatch.setattr(foreach, "_on_cpu", lambda batch: False)
    monkeypatch.setattr(flags, "host_waits_for", lambda device: True)
    monkeypatch.setattr(device, "HostCopy", lambda values: None)
