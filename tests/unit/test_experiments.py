"""Each script of ``benchmarks/experiments/`` runs, and writes what the tables of its page read."""

import csv
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CONDITIONS = {"steps", "machine", "load_start", "load_end", "date", "code"}
COMMON = {"policy", "seed", "clipped", "skipped", "lost"} | CONDITIONS
COLUMNS = {
    "recurrent": {"lr", "accuracy"},
    "wrong_scale": {"optimizer", "wrong", "loss"},
    "learning_rates": {"lr", "accuracy"},
    "price": {"noise", "loss"},
    "faults": {"loss"},
    "rescaled": {"optimizer", "loss", "clipped_at_end", "coefficient_at_end"},
}


def test_every_experiment_runs_and_writes_what_its_table_reads(monkeypatch, tmp_path):
    pytest.importorskip("sklearn")
    for folder in (BENCHMARKS, BENCHMARKS / "experiments"):
        monkeypatch.syspath_prepend(folder)
    tables = import_module("experiment_tables")
    for module in (import_module("shared"), tables):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    for name in ("recurrent", "learning_rates"):
        monkeypatch.setattr(import_module(name), "LEARNING_RATES", (0.01,))
    monkeypatch.setattr(import_module("text"), "TESTED", 2)
    monkeypatch.setattr(import_module("wrong_scale"), "CONDITIONS", [("SGD", "three")])
    monkeypatch.setattr(sys, "argv", ["", "--seeds", "1"])
    threads = torch.get_num_threads()
    for make in tables.MADE:
        script = import_module(make.__name__)
        script.main(make.__name__, script.__doc__, script.rows, steps=2)
        with (tmp_path / f"experiment_{make.__name__}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert set(rows[0]) == COMMON | COLUMNS[make.__name__]
        policies = {row["policy"] for row in rows}
        assert {"none", "zscore", "ema", "quantile"} < policies
        assert make().count("\n") == len(policies) + 1
    script = import_module("next_steps")
    begin = dict(script.runs(1, 40))
    advice, clipped, above = script.compare(begin["E2 SGD, none"], 40)
    assert advice.clip_fraction_settled is not None
    assert {type(clipped), type(above)} == {float}
    torch.set_num_threads(threads)
