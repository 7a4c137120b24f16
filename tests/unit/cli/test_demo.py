import math
import shlex

import pytest
import torch
from typer.testing import CliRunner

from gradclip.cli.app import app
from gradclip.cli.demo_model import train, windows
from gradclip.diagnostics import finding, read_record, summarise
from pairwise import ALL_COMBINATIONS


@pytest.mark.parametrize("seed", range(5 if ALL_COMBINATIONS else 1))
def test_without_clipping_it_ends_worse_and_with_clipping_it_trains(seed, tmp_path):
    unclipped = summarise(train(None, tmp_path / "unclipped.jsonl", seed=seed))
    clipped = summarise(train(1.0, tmp_path / "clipped.jsonl", seed=seed))

    assert (unclipped.steps, clipped.steps) == (300, 300)
    assert (unclipped.clipped, unclipped.threshold) == (0, math.inf)
    assert 0.1 < clipped.clipped / clipped.steps < 0.4
    assert clipped.diverged_at is None
    assert clipped.final_loss < 1.9
    assert unclipped.diverged_at is not None or unclipped.final_loss > clipped.final_loss + 0.4


def numbers(records):
    return [(r.step, r.loss, r.norm_pre, r.norm_post, r.clipped) for r in records]


def test_the_same_seed_gives_the_same_numbers_and_another_one_others(tmp_path):
    first, again, other = (
        numbers(train(1.0, tmp_path / "run.jsonl", seed=seed, steps=8)) for seed in (3, 3, 4)
    )

    assert first == again
    assert first[0][1:3] != other[0][1:3]


def test_both_runs_begin_the_same(tmp_path):
    unclipped = train(None, tmp_path / "run.jsonl", steps=2)
    clipped = train(1.0, tmp_path / "run.jsonl", steps=2)

    assert (unclipped[0].loss, unclipped[0].norm_pre) == (clipped[0].loss, clipped[0].norm_pre)
    assert unclipped[0].norm_post == unclipped[0].norm_pre > 1
    assert clipped[0].norm_post == pytest.approx(1.0)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_training_leaves_the_process_as_it_was(tmp_path, two_threads):
    torch.manual_seed(7)
    random = torch.get_rng_state()
    during = []

    train(
        1.0,
        tmp_path / "run.jsonl",
        steps=1,
        on_step=lambda _: during.append(torch.get_num_threads()),
    )

    assert during == [1]
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), random)


def test_a_run_that_diverges_is_shown_to_its_end(tmp_path):
    unclipped = train(None, tmp_path / "unclipped.jsonl", steps=30, lr=1.0)
    clipped = train(1.0, tmp_path / "clipped.jsonl", steps=30, lr=1.0)

    assert len(unclipped) == len(clipped) == 30
    assert summarise(unclipped).nonfinite > 25
    assert not any(record.skipped for record in unclipped)
    assert all(record.skipped for record in clipped if record.nonfinite)
    assert "without: NaN from step" in finding(clipped, unclipped)


def test_windows_are_the_text_in_order():
    text = "abcde" * 30
    windows_NW, characters = windows(text)

    assert characters == 5
    assert windows_NW.shape == (2, 65)
    assert windows_NW.flatten().tolist() == [*range(5)] * 26


def test_the_command_writes_two_records_a_figure_and_a_report_and_says_what_it_found(tmp_path):
    folder = tmp_path / "a new one"
    options = ["--steps", "12", "--seed", "1", "--max-norm", "0.5", "--output-dir", str(folder)]
    result = CliRunner().invoke(app, ["demo", *options], catch_exceptions=False)

    assert result.exit_code == 0
    assert result.stderr.splitlines()[-1].startswith("clipped 12/12  loss ")  # no terminal
    assert sorted(path.name for path in folder.iterdir()) == [
        "gradclip-demo-unclipped.jsonl",
        "gradclip-demo.html",
        "gradclip-demo.jsonl",
        "gradclip-demo.svg",
    ]
    clipped = read_record(folder / "gradclip-demo.jsonl")
    unclipped = read_record(folder / "gradclip-demo-unclipped.jsonl")
    assert [record.threshold for record in clipped] == [0.5] * 12
    assert [record.threshold for record in unclipped] == [math.inf] * 12
    line, files, *following = result.stdout.splitlines()
    assert line.startswith(finding(clipped, unclipped) + " (p99 norm ")
    assert " of 12 steps (100 %) at max_norm 0.5: " in line
    assert files == (
        f"record  {folder / 'gradclip-demo.jsonl'}    figure  {folder / 'gradclip-demo.svg'}"
        f"    report  {folder / 'gradclip-demo.html'}"
    )
    assert (folder / "gradclip-demo.svg").read_text().startswith("<?xml")
    commands = [shlex.split(each.removeprefix("next"))[1:] for each in following]
    assert [(name, record) for name, record, *_ in commands] == [
        (name, str(folder / "gradclip-demo.jsonl")) for name in ("suggest", "report", "plot")
    ]
    codes = [CliRunner().invoke(app, each, catch_exceptions=False).exit_code for each in commands]
    assert codes == [1, 0, 0]  # twelve norms carry no advice
    assert (folder / "gradclip-demo.png").is_file()
    assert "<!doctype html>" in (folder / "gradclip-demo-report.html").read_text()
