"""Make the picture of docs/how-to/report.md, with a real Chromium.

PYTHONPATH=src:tests python tests/report_picture.py
"""

import io
import tempfile
from pathlib import Path

from PIL import Image

from chromium import Chromium
from gradclip.diagnostics.runs import read_runs
from gradclip.report import write_report
from made_up_record import write_record

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "report.png"
WIDTH = 1168
COLOURS = 128


def main():
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        write_record(folder / "runs-1")
        write_report(read_runs(folder / "runs-1"), folder / "report.html")
        browser = Chromium(folder / "profile")
        browser.open(folder / "report.html", width=WIDTH)
        bottom = browser.evaluate("document.querySelector('.key').getBoundingClientRect().bottom")
        browser.look(width=WIDTH, height=int(bottom) + 12)
        browser.next_frame()
        picture = Image.open(io.BytesIO(browser.screenshot())).convert("RGB")
        browser.close()
    few = picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
