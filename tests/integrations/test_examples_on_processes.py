"""The examples for several processes: what takes longest of all examples, and a launcher each."""

import re
import shutil
import sys

from example_runs import EXAMPLES, execute, launched


def by_process(text):
    # A library that is installed beside may say something too.
    *epochs, last = [line for line in text.splitlines() if line.startswith(("epoch", "error"))]
    error, processes = re.fullmatch(r"error without noise (\S+) on (\d) processes", last).groups()
    return epochs, float(error), int(processes)


def test_many_processes(tmp_path):
    """One process, two, and four of another engine that resume: the same numbers."""
    alone = [sys.executable, str(EXAMPLES / "many_processes.py")]  # it ends its process
    epochs, error, processes = by_process(execute(alone, tmp_path))
    assert (len(epochs), processes) == (4, 1)
    assert error < 0.8

    two = by_process(launched(2, "many_processes.py --checkpoints there", tmp_path))
    assert two == (epochs, error, 2)

    last = max((tmp_path / "there").iterdir())
    shutil.rmtree(last)  # as if the run had been ended after three epochs
    four = launched(4, "many_processes.py --engine fsdp2 --checkpoints there", tmp_path)
    assert by_process(four) == (epochs[-1:], error, 4)


def test_many_processes_by_accelerate(tmp_path):
    command = "launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    silent = "--mixed_precision no --dynamo_backend no"
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *command.split()]
    text = execute([*launcher, *silent.split(), str(EXAMPLES / "many_processes.py")], tmp_path)
    epochs, error, processes = by_process(text)
    assert (len(epochs), processes) == (4, 2)
    assert error < 0.8


def test_tensor_parallel(tmp_path):
    text = launched(4, "tensor_parallel.py", tmp_path)
    assert float(re.search(r"largest relative difference (\S+)", text).group(1)) < 1e-6


def test_pipeline_parallel(tmp_path):
    text = launched(2, "pipeline_parallel.py", tmp_path)
    norms = re.findall(r"rank \d, step (\d+): norm ([\d.]+) -> ([\d.]+)", text)
    assert len(norms) == 4
    assert len(set(norms)) == 2  # both ranks say the same
    assert all(float(before) > float(after) == 1.0 for _, before, after in norms)
