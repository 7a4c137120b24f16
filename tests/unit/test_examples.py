import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gradclip
from patience import seconds

EXAMPLES = Path(__file__).parents[2] / "examples"
SOURCE = Path(gradclip.__file__).parents[1]


def run(name, folder):
    return execute([sys.executable, "-W", "error", str(EXAMPLES / name)], folder)


def launched(processes, command, folder):
    """Run an example on several processes, as its docstring says."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    name, *options = command.split()
    return execute(
        [*launcher, f"--nproc_per_node={processes}", str(EXAMPLES / name), *options], folder
    )


def execute(command, folder):
    result = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds(),
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "deepspeed_zero.py",  # in tests/integrations
        "limits_by_group.py",
        "pipeline.py",
        "many_processes.py",
        "pipeline_from_yaml.py",
        "pipeline_parallel.py",
        "plain_loop.py",
        "tensor_parallel.py",
    }


def test_plain_loop(tmp_path):
    unclipped, clipped = re.findall(
        r"max_norm (\S+): clipped (\d+) of 500 steps, largest norm (\d+), error (\S+)\n",
        run("plain_loop.py", tmp_path),
    )

    assert unclipped[:2] == ("inf", "0")
    assert clipped[0] == "5.0"
    assert 100 < int(clipped[1]) < 300
    assert float(unclipped[3]) > 0.8
    assert float(clipped[3]) < 0.4


def test_pipeline(tmp_path):
    *epochs, error = run("pipeline.py", tmp_path).splitlines()

    assert [line.split(":")[0] for line in epochs] == [f"epoch {epoch}" for epoch in range(4)]
    counts = [
        re.fullmatch(r"epoch \d: clipped (\d+) of 128 steps", line).group(1) for line in epochs
    ]
    assert all(30 < int(count) < 100 for count in counts)
    assert float(error.removeprefix("error without noise ")) < 0.8


def test_pipeline_from_yaml(tmp_path):
    text = run("pipeline_from_yaml.py", tmp_path)

    clipped, largest, error = re.fullmatch(
        r"clipped (\d+) of 512 steps, largest norm (\d+)\nerror without noise (\S+)\n", text
    ).groups()
    assert 150 < int(clipped) < 500
    assert int(largest) > 50
    assert float(error) < 0.8
    assert (tmp_path / "gradclip-example.jsonl").exists()


def by_process(text):
    # A library that is installed beside may say something too.
    *epochs, last = [line for line in text.splitlines() if line.startswith(("epoch", "error"))]
    error, processes = re.fullmatch(r"error without noise (\S+) on (\d) processes", last).groups()
    return epochs, float(error), int(processes)


def test_many_processes(tmp_path):
    """One process, two, and four of another engine that resume: the same numbers."""
    epochs, error, processes = by_process(run("many_processes.py", tmp_path))
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


def test_limits_by_group(tmp_path):
    text = run("limits_by_group.py", tmp_path)
    lines = re.findall(r"(\S+) +clipped +(\d+) of 200 steps; last norm \S+ -> (\S+)\n", text)
    assert [pattern for pattern, *_ in lines] == ["embedding.*", "*"]
    for (_, clipped, after), limit in zip(lines, (0.05, 0.5), strict=True):
        assert 0 < int(clipped) < 200
        assert float(after) <= limit
    assert float(re.search(r"loss (\S+)", text).group(1)) < 0.1


def test_tensor_parallel(tmp_path):
    text = launched(4, "tensor_parallel.py", tmp_path)
    assert float(re.search(r"largest relative difference (\S+)", text).group(1)) < 1e-6


def test_pipeline_parallel(tmp_path):
    text = launched(2, "pipeline_parallel.py", tmp_path)
    norms = re.findall(r"rank \d, step (\d+): norm ([\d.]+) -> ([\d.]+)", text)
    assert len(norms) == 4
    assert len(set(norms)) == 2  # both ranks say the same
    assert all(float(before) > float(after) == 1.0 for _, before, after in norms)
