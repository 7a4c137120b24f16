"""Blocks of the documentation that say they run as they stand."""

import re
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

DOCS = Path(__file__).parents[2] / "docs"
MARKED = re.compile(r"<!-- executed -->\n```python\n(.*?)```", re.DOTALL)
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in sorted(DOCS.glob("*.md"))
    for number, block in enumerate(MARKED.findall(page.read_text(encoding="utf-8")))
]


@pytest.fixture(autouse=True)
def _fresh():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.smoke
@pytest.mark.parametrize("block", BLOCKS)
def test_it_runs_as_it_stands(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "a block of the documentation", "exec"), {"__name__": "__main__"})


def test_there_are_such_blocks():
    assert len(BLOCKS) >= 3
