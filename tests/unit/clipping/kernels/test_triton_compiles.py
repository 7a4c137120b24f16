"""The Triton kernels compile for an H100, on any machine, into what makes them fast and right.

``make test-oldest-triton`` runs this with the oldest Triton that is supported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def facts():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("triton_compiled.py")
    run = subprocess.run(
        [sys.executable, "-W", "error", script],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def test_aligned_memory_is_read_and_written_sixteen_bytes_at_a_time(facts):
    assert all(kernel["wide_loads"] for kernel in facts.values())
    assert facts["scale bfloat16"]["wide_stores"]
    assert facts["clamp float32"]["wide_stores"]


def test_unaligned_memory_is_read_and_written_one_element_at_a_time(facts):
    """On its own path, beside that of the aligned: as many elements as a thread holds, twice.

    Whole blocks and the rest of a chunk; the rest of aligned chunks comes on top.
    """
    for name, kernel in facts.items():
        assert kernel["narrow_loads"] >= 32, name
    assert facts["scale bfloat16"]["narrow_stores"] >= 32
    assert facts["clamp float32"]["narrow_stores"] >= 32


def test_eight_loads_of_a_full_chunk_are_on_their_way_at_once(facts):
    for name, kernel in facts.items():
        assert kernel["in_a_row"] >= 8 or name.startswith("scale"), name


def test_aligned_and_unaligned_sums_lie_alike_in_registers(facts):
    """Sums of one layout are added in one order: no conversion between two.

    What the clamp writes to unaligned memory is converted, at two places.
    """
    for name, kernel in facts.items():
        if name.startswith("power_sums"):
            assert kernel["conversions"] == 0, name
        elif name.startswith("clamp"):
            assert kernel["conversions"] == 2, name


def test_nothing_spills(facts):
    assert not any(kernel["spills"] for kernel in facts.values())
