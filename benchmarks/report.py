"""The tables and the plot of the docs, from the CSV files that the benchmarks wrote.

    python benchmarks/report.py            # writes them into README.md and docs/
    python benchmarks/report.py --check    # fails where a table is not what the CSV files say

A table stands between ``<!-- benchmark: name -->`` and ``<!-- end -->``.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from timing import RESULTS, read

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")
PLOT = ROOT / "docs" / "images" / "performance.svg"

Row = dict[str, str]
SHORT = {"float32": "fp32", "bfloat16": "bf16"}
WHATS = {
    "within": "the norm is within its limit",
    "clips": "every call clips",
    "inf-norm": "the inf-norm, within its limit",
    "value": "by value, nothing exceeds it",
}
NOT_YET = "Not measured yet: no CSV file is committed for a GPU."


def models(rows: list[Row]) -> dict[tuple[str, str], dict[tuple[str, str], Row]]:
    """Return the rows by model and dtype, and by what is done and who does it."""
    found: dict[tuple[str, str], dict[tuple[str, str], Row]] = {}
    for row in sorted(rows, key=lambda row: int(row["elements"])):
        found.setdefault((row["model"], row["dtype"]), {})[row["what"], row["who"]] = row
    return found


def ms(text: str) -> str:
    """Return milliseconds as people read them."""
    value = float(text)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratio(one: Row, other: Row, column: str = "ms") -> str:
    value = float(one[column]) / float(other[column])
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def table(head: list[str], lines: list[list[str]]) -> str:
    rule = "|".join(["---"] * len(head))
    return "\n".join(
        [f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in lines)]
    )


def summary() -> str:
    """The README's table: a CPU, nothing clips."""
    head = ["gradients", "torch", "`clip_grad_norm_`", "`GradientClipper`"]
    head += ["error of the norm: torch", "gradclip"]
    lines = []
    for (model, dtype), by in models(read(RESULTS / "clip_cpu.csv")).items():
        torch_, ours = by["within", "torch"], by["within", "object"]
        faster = f"{ms(ours['ms'])} ms ({ratio(torch_, ours)} x)"
        lines.append(
            [
                f"{model}, {SHORT[dtype]}, {torch_['tensors']} tensors",
                f"{ms(torch_['ms'])} ms",
                f"{ms(by['within', 'function']['ms'])} ms",
                faster,
                f"{float(torch_['error']):.0e}",
                f"{float(ours['error']):.0e}",
            ]
        )
    return table(head, lines)


def cpu() -> str:
    """What is done on a CPU, against torch and against reading once."""
    head = ["gradients", "one read, ms"]
    head += [f"{text}: torch, ms | gradclip, ms | faster by" for text in WHATS.values()]
    lines = []
    for (model, dtype), by in models(read(RESULTS / "clip_cpu.csv")).items():
        floor = by.get(("read", "floor"))
        line = [f"{model} {SHORT[dtype]}", ms(floor["ms"]) if floor else ""]
        for what in WHATS:
            torch_, ours = by[what, "torch"], by[what, "object"]
            line += [ms(torch_["ms"]), ms(ours["ms"]), ratio(torch_, ours)]
        lines.append(line)
    return table([part for text in head for part in text.split(" | ")], lines)


def others() -> str:
    """The other ways to call torch's function, on a CPU."""
    who = ["torch", "torch, tensor by tensor", "torch, compiled", "accelerate", "object"]
    lines = [
        [f"{model} {SHORT[dtype]}"]
        + [ms(by["within", name]["ms"]) if ("within", name) in by else "" for name in who]
        for (model, dtype), by in models(read(RESULTS / "clip_cpu.csv")).items()
    ]
    return table(["gradients, ms", *who[:-1], "gradclip"], lines)


def cuda() -> str:
    """A GPU: device time by graph replay, and the host's."""
    rows = read(RESULTS / "clip_cuda.csv")
    if not rows:
        return NOT_YET
    head = ["gradients", "what", "floor, ms", "torch", "gradclip", "faster by"]
    head += ["called: torch", "gradclip", "host: torch", "gradclip", "all moved"]
    lines = []
    for (model, dtype), by in models(rows).items():
        for what in WHATS:
            torch_, ours = by[what, "torch"], by[what, "object"]
            line = [f"{model} {SHORT[dtype]}", what, ms(by["read", "floor"]["ms"])]
            line += [ms(torch_["device_ms"]), ms(ours["device_ms"])]
            line += [ratio(torch_, ours, "device_ms"), ms(torch_["ms"]), ms(ours["ms"])]
            line += [ms(torch_["host_ms"]), ms(ours["host_ms"]), ms(ours["host_moved_ms"])]
            lines.append(line)
    return table(head, lines)


def steps() -> str:
    """What clipping adds to a training step."""
    head = ["model", "where", "step, ms", "torch adds, ms", "gradclip adds, ms", "of the step"]
    lines = []
    for device in ("cpu", "cuda"):
        for row in read(RESULTS / f"training_step_{device}.csv"):
            line = [row["model"], device, ms(row["step_ms"]), ms(row["torch_added_ms"])]
            percent = f"{float(row['gradclip_added_percent']):.2g} %"
            lines.append([*line, ms(row["gradclip_added_ms"]), percent])
    return table(head, lines)


def sharded() -> str:
    """1000 sharded gradients on two processes."""
    rows = read(RESULTS / "sharded_cpu.csv")
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["shape"], row["what"]), {})[row["who"]] = row
    lines = []
    for (shape, what), by in found.items():
        torch_, function, ours = by["torch"], by["function"], by["object"]
        line = [f"{torch_['tensors']} of {shape}", WHATS[what], ms(torch_["ms"])]
        line += [ms(function["ms"]), ratio(torch_, function)]
        lines.append([*line, ms(ours["ms"]), ratio(torch_, ours)])
    head = ["DTensors", "what", "torch, ms", "`clip_grad_norm_`, ms", "faster by"]
    return table([*head, "`GradientClipper`, ms", "faster by"], lines)


def scale() -> str:
    """Collectives on thousands of ranks."""
    head = ["layout", "ranks", "p", "collectives", "of so many ranks", "bytes each"]
    lines = [
        [
            row["layout"],
            row["ranks"],
            row["norm_type"],
            row["collectives"],
            row["of_ranks"].replace(" ", ", "),
            row["bytes"].replace(" ", ", "),
            f"{float(row['estimate_us']):.0f} us",
        ]
        for row in read(RESULTS / "scale.csv")
    ]
    return table([*head, "all together, estimated"], lines)


def goals() -> str:
    """What was aimed at on a CPU, and what was reached."""
    found = models(read(RESULTS / "clip_cpu.csv"))
    gpt2 = found["GPT-2 124M", "float32"]
    many = found["3168 tensors of 64", "float32"]
    ours = gpt2["within", "object"]
    worst = max(float(by["within", "object"]["error"]) for by in found.values())
    added = {r["loop"]: float(r["overhead_us"]) for r in read(RESULTS / "pipeline_overhead.csv")}
    alone = added["gradclip"] - added["plain_with_gradclip"]
    slowest = max(alone / added["lightning"], alone / added["transformers"])
    faster, reading = ratio(gpt2["within", "torch"], ours), ratio(ours, gpt2["read", "floor"])
    lines = [
        ["GPT-2 124M fp32, not clipping, against torch", "2 x faster", f"{faster} x"],
        ["the same against one read", "at most 1.25 x", f"{reading} x"],
        ["error of the norm, all models above", "at most 1e-6", f"{worst:.0e}"],
        [
            "3168 tensors of 64, not clipping, against torch",
            "4 x faster",
            f"{ratio(many['within', 'torch'], many['within', 'object'])} x",
        ],
        [
            "the pipeline around a step, against Lightning's and transformers.Trainer's",
            "at most 25 %",
            f"{100 * slowest:.0f} %",
        ],
    ]
    held: dict[tuple[str, str], dict[str, float]] = {}
    for row in read(RESULTS / "sharded_cpu.csv"):
        held.setdefault((row["shape"], row["what"]), {})[row["who"]] = float(row["ms"])
    for shape, goal in (("8x4", 6), ("64x64", 5)):
        by = held[shape, "within"]
        lines.append(
            [
                f"1000 DTensors of {shape} on two ranks, not clipping, against torch",
                f"{goal} x faster",
                f"{by['torch'] / by['object']:.2f} x",
            ]
        )
    return table(["on a CPU", "goal", "reached"], lines)


TABLES: dict[str, Callable[[], str]] = {
    "summary": summary,
    "cpu": cpu,
    "others": others,
    "cuda": cuda,
    "steps": steps,
    "goals": goals,
    "sharded": sharded,
    "scale": scale,
}


def filled(page: str) -> str:
    """Return a page with its tables made anew."""
    return re.sub(
        r"(<!-- benchmark: (\w+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}",
        page,
        flags=re.DOTALL,
    )


def plot() -> None:
    """Draw how many times as long as one read of the memory clipping takes, on a CPU."""
    import matplotlib as mpl  # noqa: PLC0415 - not needed to check

    mpl.use("svg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    found = models(read(RESULTS / "clip_cpu.csv"))
    shown = {
        key: by
        for key, by in found.items()
        if ("read", "floor") in by and float(by["read", "floor"]["elements"]) > 1e7
    }
    style = {"font.size": 9, "svg.hashsalt": "gradclip", "axes.spines.top": False}
    style |= {"axes.spines.right": False, "axes.spines.left": False, "font.family": "DejaVu Sans"}
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(7.2, 0.55 * len(shown) + 1.1), layout="constrained")
        for position, ((model, dtype), by) in enumerate(reversed(shown.items())):
            read_ms = float(by["read", "floor"]["ms"])
            for offset, who, colour in ((0.2, "torch", "#D55E00"), (-0.2, "object", "#0072B2")):
                value = float(by["within", who]["ms"]) / read_ms
                axes.barh(position + offset, value, 0.36, color=colour)
                label = {"torch": "torch", "object": "gradclip"}[who]
                axes.text(value + 0.04, position + offset, f"{value:.2g}  {label}", va="center")
            axes.text(-0.05, position, f"{model}\n{SHORT[dtype]}", ha="right", va="center")
        axes.axvline(1, color="#333333", linewidth=0.8)
        axes.set_yticks([])
        axes.set_xlabel("times as long as reading the gradients once (on a CPU, nothing clips)")
        axes.set_title("A step that does not clip should cost one read", loc="left", fontsize=11)
        figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    checks = parser.parse_args().check
    for page in PAGES:
        text = page.read_text()
        if checks and filled(text) != text:
            sys.exit(f"{page.name} is not what the CSV files say: python benchmarks/report.py")
        page.write_text(filled(text))
    if not checks:
        plot()


if __name__ == "__main__":
    main()
