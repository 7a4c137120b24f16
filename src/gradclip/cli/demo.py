"""``gradclip demo``: the same training without and with clipping, and a picture of both."""

import shlex
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID
from rich.progress import TimeElapsedColumn as Elapsed

from gradclip.config import as_ceiling
from gradclip.diagnostics import clipping_figure, finding, save_figure, summarise
from gradclip.diagnostics.summary import compact
from gradclip.errors import MissingDependencyError

if TYPE_CHECKING:
    from gradclip.pipeline.hooks import PipelineHookArgs

__all__ = ["EXAMPLES", "demo"]

EXAMPLES = """Examples:

gradclip demo

gradclip demo --max-norm 0.5 --steps 100 --output-dir /tmp/demo
"""

_BOTH_START_HIGH = (
    "Both runs start high: the first step of AdamW has the same size whatever the norm is,\n"
    "so a limit makes a difference from the second step on."
)
_STEPS_A_LINE = 50
"""Where there is no terminal to draw a bar on."""


def demo(
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the text's order.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each run.")] = 300,
    max_norm: Annotated[float, typer.Option(help="The gradient norm that clipping allows.")] = 1.0,
    lr: Annotated[float, typer.Option(min=0, help="Learning rate of AdamW.")] = 3e-3,
    output_dir: Annotated[
        Path, typer.Option(file_okay=False, writable=True, help="Where the four files go.")
    ] = Path(),
) -> None:
    """Train a small recurrent network without and with clipping, and show what clipping did.

    Writes a record of each run (JSONL), a figure (SVG) and a report of both (HTML). The losses that
    are reported are medians of the last 50 steps. It takes well under a minute on two cores.
    """
    as_ceiling(max_norm, "max_norm")
    for name in ("accelerate", "matplotlib"):
        _require(name)
    from gradclip.cli.demo_model import train  # noqa: PLC0415 - here torch is imported
    from gradclip.diagnostics.runs import read_runs  # noqa: PLC0415 - numpy
    from gradclip.report import write_report  # noqa: PLC0415

    record = output_dir / "gradclip-demo.jsonl"
    of_unclipped = output_dir / "gradclip-demo-unclipped.jsonl"
    figure = output_dir / "gradclip-demo.svg"
    page = output_dir / "gradclip-demo.html"
    runs = (("unclipped", None, of_unclipped), ("clipped", max_norm, record))
    console = Console(stderr=True)
    with Progress(
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        Elapsed(),
        "{task.fields[loss]}",
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        unclipped, clipped = (
            train(
                limit,
                path,
                seed=seed,
                steps=steps,
                lr=lr,
                on_step=partial(_advance, progress, progress.add_task(name, total=steps, loss="")),
            )
            for name, limit, path in runs
        )
    picture = clipping_figure(clipped, unclipped)
    picture.supxlabel(_BOTH_START_HIGH, fontsize=8, color="#59636e", x=0.04, ha="left")
    save_figure(picture, figure)
    write_report([run for each in (record, of_unclipped) for run in read_runs(each)], page)

    without = summarise(unclipped)
    norms = f"p99 norm {compact(without.norm_p99)}, largest {compact(without.norm_max)}"
    typer.echo(f"{finding(clipped, unclipped)} ({norms})")
    typer.echo(f"record  {record}    figure  {figure}    report  {page}")
    for each in _next_commands(record, output_dir):
        typer.echo(each)


def _next_commands(record: Path, folder: Path) -> list[str]:
    """Return what to try next on the record, as lines to paste."""
    outputs = {"suggest": None, "report": "gradclip-demo-report.html", "plot": "gradclip-demo.png"}
    lines = []
    for name, output in outputs.items():
        named = ["-o", str(folder / output)] if output is not None else []
        lines.append(shlex.join(["gradclip", name, str(record), *named]))
    return [f"{'' if at else 'next':8}{line}" for at, line in enumerate(lines)]


def _advance(progress: Progress, task: TaskID, args: "PipelineHookArgs") -> None:
    if args.reduce_loss is None:
        return
    loss, done = f"loss {float(args.reduce_loss):.2f}", args.global_step_id + 1
    progress.update(task, advance=1, loss=loss)
    each = progress.tasks[task]
    if progress.disable and (done % _STEPS_A_LINE == 0 or done == each.total):
        typer.echo(f"{each.description} {done}/{each.total:.0f}  {loss}", err=True)


def _require(name: str) -> None:
    try:
        import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f'the demo needs {name}, which is not installed.\n  pip install "gradclip[all]"'
        ) from error
