"""The figures in the docs are those of the CSV files, which are what the benchmarks write."""

import csv
import logging
import shutil
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CONDITIONS = {"machine", "load_start", "load_end", "date", "code"}


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Imports a script, which will write and read its files elsewhere."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    threads = torch.get_num_threads()

    def load(name, **instead):
        loaded = import_module(name)
        for attribute, value in {"RESULTS": tmp_path, **instead}.items():
            monkeypatch.setattr(loaded, attribute, value)
        return loaded

    yield load
    torch.set_num_threads(threads)
    logging.disable(logging.NOTSET)


def test_the_tables_are_those_of_the_csv_files(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    script("report", RESULTS=BENCHMARKS / "results").main()  # it exits where a table is another


def tiny_model(device):
    model = torch.nn.Linear(3, 2)
    return model, lambda: model(torch.ones(1, 3)).square().mean()


def test_every_benchmark_runs_and_writes_what_the_report_reads(script, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    make_case = script("clip").Case
    names = ("GPT-2 124M", "3168 tensors of 64")
    cases = [make_case(name, [(9, 20), (70,)], torch.float32) for name in names]
    scripts = {
        "clip": script("clip", cases=lambda: cases, TINY=0),
        "host": script("host", COUNTS={4: 2}),
        "small": script("small", CASES={4: [(3, 2), (2,)] * 2}, WARM_UP=1),
        "hook_overhead": script("hook_overhead"),
        "policies": script("policies", SMALL=[(2,)] * 2, LARGE=[(3, 2)], WARM_UP=1),
        "pipeline_overhead": script("pipeline_overhead", SHORT=1, LONG=2, TENSORS=(4,)),
        "training_step": script("training_step", gpt2=tiny_model, robot_policy=tiny_model),
    }
    for name, loaded in scripts.items():
        monkeypatch.setattr(sys, "argv", [name, "--rounds", "2"])
        with warnings.catch_warnings():
            loaded.main()
    for path in tmp_path.glob("*.csv"):
        with path.open() as file:
            rows = list(csv.DictReader(file))
        assert rows
        for row in rows:
            assert all(row[condition] for condition in CONDITIONS), path
            assert float(row["ms_q1"]) <= float(row["ms"]) <= float(row["ms_q3"]), path
            assert row["cpu_ms"], path
    for name in ("sharded_cpu.csv", "scale.csv"):
        shutil.copy(BENCHMARKS / "results" / name, tmp_path)
    report = script("report")
    for name, make in report.BY_NAME.items():
        assert make(), name
    assert "| 4 | gradclip alone |" in report.pipeline()
    assert "| 4 tensors bf16 | `attach`, with the step |" in report.small()
    assert "| robot policy | cpu |" in report.steps()
    assert "GPT-2 124M fp32" in report.cpu()


def test_lines_that_were_not_measured_again_keep_their_conditions(script, tmp_path):
    timing = script("timing")
    path = tmp_path / "some.csv"
    path.write_text("who,ms,machine\nan older one,1.5,elsewhere\n")
    timing.write(path, [{"who": "a newer one", "ms": 2.0, "machine": "here"}], timing.read(path))
    older, newer = timing.read(path)
    assert older == {**dict.fromkeys(newer, ""), "who": "an older one", "ms": "1.5"} | {
        "machine": "elsewhere"
    }
    assert newer["ms"] == "2"
    assert newer["date"]
