"""Write docs/how-to/coming-from-roboorchard.md: what scripts left in both, and differences."""

import tempfile
from importlib.metadata import version
from pathlib import Path

from differences import table
from test_scripts import ALL, run

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "coming-from-roboorchard.md"
MARK = "<!-- written by tests/robo_orchard/page.py -->"


def scripts() -> str:
    """Run each script by both packages, and say how far apart they end."""
    lines = [
        "| script | steps | weights | learning rates | scalars in TensorBoard |",
        "|---|---|---|---|---|",
    ]
    for name in ALL:
        with tempfile.TemporaryDirectory() as folder:
            theirs = run(name, "robo_orchard_lab", Path(folder) / "theirs")
            ours = run(name, "gradclip", Path(folder) / "ours")
        weights = max(
            float((a - b).abs().max()) for a, b in zip(theirs.weights, ours.weights, strict=True)
        )
        pairs = [
            (a, b)
            for tag, values in theirs.scalars.items()
            for (_, a), (_, b) in zip(values, ours.scalars[tag], strict=True)
        ]
        scalars = max((abs(a - b) for a, b in pairs), default=0.0)
        steps = ours.trainer.trainer_progress_state.global_step_id
        rates = "equal" if theirs.rates == ours.rates else "differ"
        lines.append(
            f"| `{name}` | {steps} | {weights:.1e} | {rates} | {len(pairs)}, {scalars:.1e} |"
        )
    return "\n".join(lines)


WORDS = """{words}{mark}

## Its scripts, under both

The largest difference of a weight at the end; the learning rates; how many scalars were logged,
and the largest difference of one. RoboOrchardLab {lab}, Accelerate {accelerate}, torch {torch}, one
process on a CPU.

{scripts}

## What is different

{differences}
"""

if __name__ == "__main__":
    words, _, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    page = WORDS.format(
        words=words,
        mark=MARK,
        lab=version("robo-orchard-lab"),
        accelerate=version("accelerate"),
        torch=version("torch").partition("+")[0],
        scripts=scripts(),
        differences=table(),
    )
    PAGE.write_text(page, encoding="utf-8")
