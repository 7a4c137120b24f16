import re

from example_runs import EXAMPLES, run


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


def test_limits_by_group(tmp_path):
    text = run("limits_by_group.py", tmp_path)
    lines = re.findall(r"(\S+) +clipped +(\d+) of 200 steps; last norm \S+ -> (\S+)\n", text)
    assert [pattern for pattern, *_ in lines] == ["embedding.*", "*"]
    for (_, clipped, after), limit in zip(lines, (0.05, 0.5), strict=True):
        assert 0 < int(clipped) < 200
        assert float(after) <= limit
    assert float(re.search(r"loss (\S+)", text).group(1)) < 0.1
