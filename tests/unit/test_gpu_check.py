"""Every part of ``benchmarks/gpu_check.py`` runs here, so that no renaming breaks it unseen.

On a CPU, with small models, and with Triton's kernels in its interpreter where every policy is
tried: only the ways to time a GPU are others.
"""

import csv
import os
import re
from contextlib import nullcontext
from itertools import product
from math import isfinite
from pathlib import Path

import pytest
import torch

kernels = pytest.importorskip("gradclip.clipping.kernels.triton")
triton_plan = pytest.importorskip("gradclip.clipping.kernels.triton_plan")

ROOT = Path(__file__).parents[2]
SIZES = {
    "rounds": 1,
    "detailed": 1,
    "memory": 1000,
    "smoke": ((30, 7), (5,)),
    "chunks": (64, 128),
    "programs": (1, 2),
    "layers": 1,
    "width": 4,
    "batch": 3,
    "in_a_row": 2,
}
SHAPES = [(9, 20), (7,)]
TASKS = ("within", "clips", "value, none over", "value, 4.6 % over")

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="no interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.delenv("GRADCLIP_BACKEND", raising=False)
    import gpu_check  # noqa: PLC0415 - it lies in no package

    return gpu_check


@pytest.fixture
def make_check(script, tmp_path):
    """The script's work on a CPU; its device remembers which sizes its clock saw."""

    class Cpu(script.Gpu):
        name = "cpu"

        def __init__(self):
            self.seen = set()

        def graph_ms(self, functions, rounds, prepare=script.nothing):
            self.seen.add((triton_plan.CHUNK, triton_plan.PROGRAMS))
            return script.paired(functions, rounds, prepare=prepare)

        def kernels_us(self, function):
            function()
            return [("a kernel", 1.0), ("a kernel", 2.0)]

        def no_waiting(self):
            return nullcontext()

        def release(self):
            pass

    cases = [script.Case("small", SHAPES, dtype) for dtype in (torch.float32, torch.bfloat16)]

    def make(cases=cases):
        return script.Check(Cpu(), cases, tmp_path / "clip_gpu.csv", script.Sizes(**SIZES))

    return make


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_part_runs_and_the_report_reads_it(script, make_check, tmp_path, monkeypatch):
    check = make_check()
    usual = triton_plan.CHUNK, triton_plan.PROGRAMS
    assert check.run() == []
    found = rows(tmp_path / "clip_gpu.csv")
    assert {row["part"] for row in found} == {
        *(f"smoke, {name}" for name in script.POLICIES),
        "bandwidth",
        "small float32",
        "small bfloat16",
        "sweep, small float32",
        "step",
    }
    assert all(isfinite(float(row["value"] or row["ms"])) for row in found)
    assert {row["machine"] for row in found} == {check.device.machine()}
    # What was timed had those sizes, and the usual ones are there again.
    assert check.device.seen == {usual, *product(SIZES["chunks"], SIZES["programs"])}
    assert usual == (triton_plan.CHUNK, triton_plan.PROGRAMS)
    check_model([row for row in found if row["part"] == "small float32"], kernel_by_kernel=True)
    check_model([row for row in found if row["part"] == "small bfloat16"], kernel_by_kernel=False)
    import report  # noqa: PLC0415 - it lies in no package

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    table = report.cuda().splitlines()[2:]
    assert [line.split(" | ")[:2] for line in table] == [
        [f"| {part}", what] for part in ("small float32", "small bfloat16") for what in TASKS
    ]


def check_model(found, kernel_by_kernel):
    by = {(row["what"], row["how"], row["who"]): row for row in found}
    for what, how, who in product(TASKS, ("eager", "host"), ("torch", "function", "object")):
        assert float(by[what, how, who]["ms"]) > 0
    for what, who in product(TASKS, ("torch", "object")):
        assert float(by[what, "graph", who]["floors"]) > 0
    graph = [float(by["clips", "graph", who]["ms"]) for who in ("torch", "object")]
    ratio = float(by["clips", "graph, torch / object", ""]["value"])
    assert ratio == pytest.approx(graph[0] / graph[1], rel=1e-2)
    assert float(by["within", "host, all gradients moved", "object"]["ms"]) > 0
    for who in ("function", "object"):
        assert float(by["within", "error of the norm", who]["value"]) < 1e-6
    assert {what for what, how, _ in by if how == "kernel"} == (
        set(TASKS) if kernel_by_kernel else set()
    )


def test_a_kernel_that_is_wrong_is_found_and_stops_no_other_part(
    make_check, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(kernels, "scaling", lambda batch, coefficients, zeroes: [])
    failed = make_check([]).run()
    assert failed == ["smoke, clips", "smoke, p = inf", "smoke, p = 3", "smoke, two groups"]
    found = rows(tmp_path / "clip_gpu.csv")
    assert {"smoke, value", "bandwidth", "step"} <= {row["part"] for row in found}
    assert "AssertionError: Tensor-likes are not close" in capsys.readouterr().err


def test_all_models_are_there(script):
    assert [(case.name, case.dtype) for case in script.chosen()] == script.MEASURED


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_without_a_gpu_it_says_so(script):
    with pytest.raises(SystemExit, match="CUDA"):
        script.main()


def test_the_makefile_names_files_that_exist():
    named = re.findall(r"(?:tests|benchmarks)/\w[\w/]*(?:\.py)?", (ROOT / "Makefile").read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert len(named) > 10
