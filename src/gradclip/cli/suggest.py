"""``gradclip suggest``: what the limit should be, from the log of a run."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradclip.cli.columns import LossKey, NormKey, StepKey

if TYPE_CHECKING:
    from gradclip.diagnostics import LoggedRun
    from gradclip.diagnostics.advice import Advice

__all__ = ["EXAMPLES", "suggest"]

EXAMPLES = """Examples:

gradclip suggest runs/checkpoint-500/trainer_state.json

gradclip suggest metrics.csv --intent regularise

gradclip suggest train.log --norm-key "GradNorm(P)"

gradclip suggest events.out.tfevents.1 --json
"""


class _Intent(StrEnum):
    guard = "guard"
    regularise = "regularise"


def suggest(
    files: Annotated[
        list[Path],
        typer.Argument(help="Records, and logs: JSON, JSONL, CSV, TensorBoard events, text."),
    ],
    intent: Annotated[
        _Intent,
        typer.Option(help="guard: clip what is far from usual; regularise: about a tenth."),
    ] = _Intent.guard,
    norm_key: NormKey = None,
    step_key: StepKey = None,
    loss_key: LossKey = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object; a list of several runs.")
    ] = False,
) -> None:
    """Suggest a limit from the gradient norms in a log, whatever wrote it.

    The exit code is 0 where there is advice, 1 where the norms carry none for any run, and 2 where
    a file cannot be read.
    """
    from gradclip.diagnostics import read_log  # noqa: PLC0415 - numpy
    from gradclip.diagnostics.advice import advise  # noqa: PLC0415

    found = []
    for file in files:
        runs = read_log(file, norm_key=norm_key, step_key=step_key, loss_key=loss_key)
        for number, run in enumerate(runs, start=1):
            place = f", run {number} of {len(runs)}" if len(runs) > 1 else ""
            found.append((file, place, run, advise(run, intent.value)))
    if as_json:
        told = [_as_data(file, run, advice) for file, _, run, advice in found]
        typer.echo(json.dumps(told if len(told) > 1 else told[0], indent=2, allow_nan=False))
    else:
        typer.echo("\n\n".join(_as_text(*each) for each in found))
    if all(advice.policy is None for *_, advice in found):
        raise typer.Exit(1)


def _as_text(file: Path, place: str, run: "LoggedRun", advice: "Advice") -> str:
    if run.spacing is None:
        spacing = " at unknown steps" if run.step_key is None else f" by {run.step_key!r}"
    elif run.spacing == 1:
        all_steps = len(run.norms) + run.left_out
        spacing = f" of {all_steps} steps" if run.left_out else " of each step"
    else:
        spacing = f", one every {run.spacing:g} steps,"
    read = f"{file}{place}: {advice.points} norms{spacing} from {run.norm_key!r} ({run.format})"
    return f"{read}\n{advice}"


def _as_data(file: Path, run: "LoggedRun", advice: "Advice") -> dict[str, Any]:
    from gradclip.diagnostics.advice_words import as_in_a_file  # noqa: PLC0415

    suggestion = None
    if advice.policy is not None:
        suggestion = {
            "policy": as_in_a_file(advice.policy),
            "line": advice.line,
            "clip_fraction": advice.clip_fraction,
            "clip_fraction_by_third": advice.clip_fraction_by_third,
            "clip_fraction_settled": advice.clip_fraction_settled,
            "lr_factor": advice.lr_factor,
        }
    return {
        "read": {
            "file": str(file),
            "format": run.format,
            "norm_key": run.norm_key,
            "step_key": run.step_key,
            "points": advice.points,
            "spacing": advice.spacing,
            "zeros": advice.zeros,
            "nonfinite": advice.nonfinite,
        },
        "norms": {
            "p50": advice.p50,
            "p90": advice.p90,
            "p99": advice.p99,
            "max": advice.largest,
            "drift": advice.drift,
        },
        "kind": advice.kind,
        "finding": advice.finding,
        "suggestion": suggestion,
        "reason": advice.reason,
        "policies": [
            {
                "policy": as_in_a_file(each.policy),
                "clip_fraction": each.clip_fraction,
                "clip_fraction_by_third": each.by_third,
                "lr_factor": each.lr_factor,
                "rough": each.is_rough,
            }
            for each in advice.policies
        ],
        "warnings": [{"code": each.code, "text": each.text} for each in advice.warnings],
    }
