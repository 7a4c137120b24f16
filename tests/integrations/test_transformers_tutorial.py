"""The tutorial for transformers runs as it stands."""

from pages import DOCS, run_page


def test_every_block_runs(tmp_path):
    run_page(DOCS / "tutorials" / "transformers.md", tmp_path)
