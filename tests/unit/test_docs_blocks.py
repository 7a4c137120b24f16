"""Blocks of the documentation that say they run as they stand, and whole tutorials."""

import pytest

from pages import DOCS, ROOT, marked, run_page, run_program

BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(DOCS).with_suffix('').as_posix()}-{number}")
    for page in sorted(DOCS.rglob("*.md"))
    for number, block in enumerate(marked(page))
]


@pytest.mark.smoke
@pytest.mark.parametrize("block", BLOCKS)
def test_it_runs_as_it_stands(block, tmp_path):
    run_program(block, tmp_path)


def test_there_are_such_blocks():
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize(
    "page", ["README.md", "docs/tutorials/plain-loop.md", "docs/tutorials/trainer.md"]
)
def test_every_block_of_the_page_runs(page, tmp_path):
    run_page(ROOT / page, tmp_path)
