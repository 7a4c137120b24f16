"""The figures and the plot of the docs, from the CSV files that the benchmarks wrote.

    python benchmarks/report.py            # writes them into README.md and docs/
    python benchmarks/report.py --check    # fails where a page is not what the CSV files say

Tables and sentences with figures stand between ``<!-- benchmark: name -->`` and ``<!-- end -->``.
"""

import argparse
import re
import sys
from collections.abc import Callable
from math import nan
from pathlib import Path
from textwrap import fill

import experiment_tables
from tables import Row, table
from timing import RESULTS, optional, read

ROOT = Path(__file__).parents[1]
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / "reference" / f"{name}.md" for name in ("hooks", "policies")),
    *(
        ROOT / "docs" / "explanation" / f"{name}.md"
        for name in ("performance", "performance-many-ranks", "performance-gpu", "experiments")
    ),
)
PLOT = ROOT / "docs" / "images" / "performance.svg"

SHORT = {"float32": "fp32", "bfloat16": "bf16"}
WHATS = {
    "within": "the norm is within its limit",
    "clips": "every call clips",
    "inf-norm": "the inf-norm, within its limit",
    "value": "by value, nothing exceeds it",
}
WAYS = {
    "function": "`clip_grad_norm_`",
    "object": "`GradientClipper`",
    "attach": "`attach`, with the step",
}
TRAINERS = {"lightning": "Lightning", "transformers": "transformers.Trainer"}
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
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def us(text: str) -> str:
    """Return milliseconds in microseconds."""
    return ms(str(float(text) * 1e3))


def ratio(one: Row, other: Row) -> str:
    return times(float(one["ms"]) / float(other["ms"]))


def times(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def faster(ours: Row, theirs: Row) -> str:
    """Return how many times faster than torch's, with the quartiles; older lines have none."""
    if not ours.get("faster"):
        return ratio(theirs, ours)
    value = times(float(ours["faster"]))
    if not ours.get("faster_q1"):
        return value
    return f"{value} ({times(float(ours['faster_q1']))} to {times(float(ours['faster_q3']))})"


def speed() -> str:
    """The README's sentence about a CPU."""
    measured = models(read(RESULTS / "clip_cpu.csv"))
    within, clips = (
        [times(float(by[what, "object"]["faster"])) for by in measured.values()]
        for what in ("within", "clips")
    )
    return fill(
        f"Where nothing is clipped, {min(within, key=float)} to {max(within, key=float)} times as "
        f"fast as torch's function, for the {len(measured)} models of [the table]"
        "(docs/explanation/performance.md), on two cores of a slow virtual machine. Where every "
        f"step is clipped, {min(clips, key=float)} to {max(clips, key=float)} times: there both "
        "have to write everything, and an exact sum takes longer.",
        width=118,
    )


def summary() -> str:
    """A CPU, nothing clips."""
    head = ["gradients", "torch", "`clip_grad_norm_`", "`GradientClipper`"]
    head += ["error of the norm: torch", "gradclip"]
    lines = []
    for (model, dtype), by in models(read(RESULTS / "clip_cpu.csv")).items():
        torch_, ours = by["within", "torch"], by["within", "object"]
        measured = f"{ms(ours['ms'])} ms ({faster(ours, torch_).partition(' ')[0]} x)"
        lines.append(
            [
                f"{model}, {SHORT[dtype]}, {torch_['tensors']} tensors",
                f"{ms(torch_['ms'])} ms",
                f"{ms(by['within', 'function']['ms'])} ms",
                measured,
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
            line += [ms(torch_["ms"]), ms(ours["ms"]), faster(ours, torch_)]
        lines.append(line)
    return table([part for text in head for part in text.split(" | ")], lines)


def others() -> str:
    """The other ways to call torch's function, and other packages, on a CPU."""
    ways = ["torch", "torch, tensor by tensor", "torch, compiled", "accelerate"]
    return by_contender("ms", [*ways, "autoclip", "smartclip"], ms)


def errors() -> str:
    """The errors of the norm."""
    return by_contender("error", ["torch", "autoclip", "smartclip"], lambda v: f"{float(v):.0e}")


def by_contender(column: str, names: list[str], shown: Callable[[str], str]) -> str:
    """Return a table of one column of the CSV: a line for each model, a column for each name."""
    found = models(read(RESULTS / "clip_cpu.csv"))
    measured = {who for by in found.values() for _, who in by}
    who = [*(name for name in names if name in measured), "object"]
    lines = [
        [f"{model} {SHORT[dtype]}"]
        + [shown(by["within", name][column]) if ("within", name) in by else "" for name in who]
        for (model, dtype), by in found.items()
    ]
    return table([f"gradients, {column}", *who[:-1], "gradclip"], lines)


def small() -> str:
    """How many times faster than torch's function small models on a CPU are, on one thread."""
    between = ("nothing", "a backward pass")
    found: dict[tuple[str, ...], dict[tuple[str, str], Row]] = {}
    for row in read(RESULTS / "small_cpu.csv"):
        if " 1 threads" in row["machine"]:
            key = (row["dtype"], row["way"], row["tensors"])
            found.setdefault(key, {})[row["what"], row["between"]] = row
    lines = []
    for (dtype, way, tensors), by in found.items():
        gradients = f"{tensors} tensors {SHORT[dtype]}"
        cells = [(what, before) for before in between for what in ("within", "clips")]
        of_all = [faster(by[each], {}) if each in by else "" for each in cells]
        lines.append([gradients, WAYS.get(way, way), *of_all])
        if way == "attach":
            alone = [by[each]["faster_without_step"] if each in by else "" for each in cells]
            alone = [times(float(each)) if each else "" for each in alone]
            lines.append([gradients, "`attach`, without the step", *alone])
    head = ["gradients", "way", "within its limit, call after call", "every call clips"]
    return table([*head, "within, after a backward pass", "clips, after a backward pass"], lines)


def cuda() -> str:
    """A GPU: device time by graph replay, and the host's."""
    rows = read(RESULTS / "clip_gpu.csv")
    if not rows:
        return NOT_YET
    by = {(row["part"], row["what"], row["how"], row["who"]): row for row in rows}
    lines = []
    for part, what in dict.fromkeys((r["part"], r["what"]) for r in rows if r["how"] == "host"):
        line = [part, what]
        for how in ("graph", "eager", "host"):
            torch_, ours = by[part, what, how, "torch"], by[part, what, how, "object"]
            line += [ms(torch_["ms"]), ms(ours["ms"])]
            if how == "graph":
                line += [ratio(torch_, ours), times(float(ours["floors"]))]
        moved = by.get((part, what, "host, all gradients moved", "object"))
        lines.append([*line, ms(moved["ms"]) if moved else ""])
    head = ["gradients, ms", "what", "torch", "gradclip", "faster by", "times the floor"]
    head += ["called: torch", "gradclip", "host: torch", "gradclip", "all moved"]
    return table(head, lines)


def steps() -> str:
    """What clipping adds to a training step."""
    head = ["model", "where", "step, ms", "torch adds, ms", "gradclip adds, ms", "of the step"]
    lines = []
    for device in ("cpu", "cuda"):
        found: dict[str, dict[str, str]] = {}
        for row in read(RESULTS / f"training_step_{device}.csv"):
            found.setdefault(row["model"], {})[row["who"]] = row["ms"]
        for model, by in found.items():
            percent = f"{100 * float(by['gradclip']) / float(by['none']):.2g} %"
            line = [model, device, *(ms(by[who]) for who in ("none", "torch", "gradclip"))]
            lines.append([*line, percent])
    return table(head, lines)


def loops() -> dict[str, dict[str, dict[str, Row]]]:
    """Return what was measured of loops, by tensors, "step" or "added", and loop."""
    found: dict[str, dict[str, dict[str, Row]]] = {}
    for row in read(RESULTS / "pipeline_overhead.csv"):
        found.setdefault(row["tensors"], {}).setdefault(row["what"], {})[row["who"]] = row
    return found


def pipeline() -> str:
    """What loops add to a training step."""
    lines = []
    for tensors, by in loops().items():
        for who in {**by["step"], **by["added"]}:
            step, added = (by[what].get(who, {}) for what in ("step", "added"))
            cells = (step.get("ms"), added.get("ms"), added.get("cpu_ms"))
            lines.append([tensors, who, *(us(cell) if cell else "" for cell in cells)])
    return table(["tensors", "loop", "step, us", "adds, us", "of computing"], lines)


def hooks() -> str:
    """What a hook channel costs."""
    found = {row["what"]: us(row["ms"]) for row in read(RESULTS / "hook_overhead.csv")}
    cases = {"plain arg": "`arg` without `exception`", "arg with exception": "`arg` with it"}
    cases["contextlib"] = "the same loops with `contextlib.contextmanager`"
    lines = [[text, *(found[f"{n} hooks, {case}"] for n in (0, 3))] for case, text in cases.items()]
    return table(["us a call", "no hooks", "three hooks"], lines)


def host() -> str:
    """What a clip on a GPU takes of the host, without launches."""
    rows = read(RESULTS / "host.csv")
    lines = [[row["what"], row["tensors"], us(row["ms"]), row["calls"]] for row in rows]
    return table(["clips by norm", "tensors", "us of the host", "calls of Python"], lines)


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
        line += [ms(function["ms"]), faster(function, torch_)]
        lines.append([*line, ms(ours["ms"]), faster(ours, torch_)])
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
    found_loops = loops()["4"]["added"].items()
    added = {who: float(row.get("cpu_ms") or row["ms"]) for who, row in found_loops}
    shares = [added["gradclip alone"] / added[who] for who in TRAINERS if who in added]
    against = " and ".join(name for who, name in TRAINERS.items() if who in added)
    reached = ratio(gpt2["within", "torch"], ours)
    lines = [
        ["GPT-2 124M fp32, not clipping, against torch", "2 x faster", f"{reached} x"],
        [
            "the same against one read",
            "at most 1.25 x",
            f"{ratio(ours, gpt2['read', 'floor'])} x",
        ],
        ["error of the norm, all models above", "at most 1e-6", f"{worst:.0e}"],
        [
            "3168 tensors of 64, not clipping, against torch",
            "4 x faster",
            f"{ratio(many['within', 'torch'], many['within', 'object'])} x",
        ],
        [
            f"what the pipeline adds to a step, against {against}",
            "at most 25 %",
            f"{100 * max(shares, default=nan):.0f} %",
        ],
    ]
    held: dict[tuple[str, str, str], Row] = {}
    for row in read(RESULTS / "sharded_cpu.csv"):
        held.setdefault((row["shape"], row["what"], row["who"]), row)
    for shape, goal in (("8x4", 6), ("64x64", 5)):
        torch_, ours = (held[shape, "within", who] for who in ("torch", "object"))
        lines.append(
            [
                f"1000 DTensors of {shape} on two ranks, not clipping, against torch",
                f"{goal} x faster",
                f"{ratio(torch_, ours)} x",
            ]
        )
    return table(["on a CPU", "goal", "reached"], lines)


POLICIES = {"zscore": ("ZScoreClip", 0.3), "ema": ("EMAClip", 0.3), "quantile": ("QuantileClip", 1)}


def policies() -> str:
    """What policies take for 300 tensors beside a clip by norm, and AGC beside torch's."""
    found = read(RESULTS / "policies_cpu.csv")
    by = {(row["policy"], row["scope"], row["what"]): row for row in found}
    lines = []
    for (policy, scope, what), row in by.items():
        if policy in POLICIES and what == "within":
            name, goal = POLICIES[policy]
            line = [f'`{name}(scope="{scope}")`', ms(by["norm", scope, what]["cpu_ms"])]
            for each in (row, by[policy, scope, "varying"]):
                over = [ms(each[f"over_cpu_ms{quartile}"]) for quartile in ("", "_q1", "_q3")]
                line.append(f"{over[0]} ({over[1]} to {over[2]}) ms more")
            lines.append([*line, f"{goal} ms more"])
    agc, torch_ = (by[who, "unit", "within"] for who in ("agc", "torch"))
    longer = f"{times(1 / float(agc['faster_cpu']))} times as long"
    line = ["`AGCClip()` on GPT-2 124M, beside torch's norm", ms(torch_["cpu_ms"]), longer, ""]
    lines.append([*line, "3 times as long"])
    head = ["policy", "`NormClip`, ms", "nothing clips", "norms vary, and some clip"]
    return table([*head, "goal: at most"], lines)


MADE: tuple[Callable[[], str], ...] = (
    *(speed, summary, cpu, others, errors, small, cuda, host, steps, pipeline, hooks),
    *(goals, sharded, scale, policies, *experiment_tables.MADE),
)
BY_NAME = {make.__name__: make for make in MADE}


def filled(page: str) -> str:
    """Return a page with its figures made anew."""
    return re.sub(
        r"(<!-- benchmark: (\w+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{BY_NAME[found[2]]()}\n{found[3]}",
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
    if not checks and optional("matplotlib"):
        plot()


if __name__ == "__main__":
    main()
