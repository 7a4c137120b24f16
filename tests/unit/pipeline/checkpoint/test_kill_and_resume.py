import json

import killed_run
import pytest

from gradclip.diagnostics.record import read_record
from pairwise import ALL_COMBINATIONS
from processes import alone

KILLS = 10 if ALL_COMBINATIONS else 5


def steps(log):
    return [tuple(map(json.dumps, json.loads(line))) for line in log.read_text().splitlines()]


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="the runs are forks")
def test_a_run_killed_at_random_moments_is_the_run_that_was_not(tmp_path):
    """SIGKILL, again and again; then the next 50 steps and more, losses and weights as hex."""
    outcome = alone(killed_run.main, tmp_path, 4, KILLS)
    whole = {number: rest for number, *rest in steps(tmp_path / "whole.log")}
    assert len(whole) == outcome["resumed_at"] + 50
    starts = []
    for log in [*(tmp_path / f"{number}.log" for number in range(KILLS)), tmp_path / "last.log"]:
        # A line that the kill cut off has no end.
        complete = log.read_text()[: log.read_text().rfind("\n") + 1]
        log.write_text(complete)
        made = steps(log)
        starts.append(int(made[0][0]))
        differing = [number for number, *rest in made if whole[number] != rest]
        assert differing == [], log.name
    assert starts == sorted(starts)
    assert starts[-1] == outcome["resumed_at"] > 0

    def record(name):
        return [
            (r.step, r.loss, r.norm_pre, r.lr) for r in read_record(tmp_path / name / "run.jsonl")
        ]

    assert record("killed") == record("whole")
    left = sorted(p.name for p in (tmp_path / "killed").iterdir())
    assert [name for name in left if name.startswith(".")] == []
    assert len(left) == 3
