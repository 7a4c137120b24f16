"""A training that is killed at any moment: its record is readable, and lacks at most 64 steps.

``PYTHONPATH=tests python tests/unit/record/test_killed.py 50`` kills 50 trainings.
"""

import os
import random
import sys
import tempfile
import warnings
from itertools import count
from pathlib import Path

import torch

import gradclip
from gradclip.diagnostics import read_events, read_header, read_norms, read_record
from gradclip.record import lines, norms
from gradclip.record.ring import BATCH
from processes import FORKED


def train(folder, told):
    """Train for ever, and tell each step."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines.SEGMENT, norms.MOST_ROWS = 300, 200  # so that files are packed and thinned all the time
    weights = [(f"w{n}", torch.nn.Parameter(torch.ones(n + 1))) for n in range(4)]
    handle = gradclip.attach(torch.optim.SGD(weights, lr=0.0), 1.0, record=folder)
    for step in count():
        for _, weight in weights:
            weight.grad = torch.full_like(weight, float("nan") if step % 50 == 7 else 9.0)
        handle.note(loss=1.0)
        handle.optimizer.step()
        os.write(told.fileno(), b"x")


def killed(folder, after):
    """Kill a training after so many steps, and return how many it has made."""
    ours, theirs = FORKED.Pipe(duplex=False)
    training = FORKED.Process(target=train, args=(folder, theirs))
    training.start()
    theirs.close()
    made = 0
    while made < after:
        read = os.read(ours.fileno(), 64)
        assert read
        made += len(read)
    training.kill()
    training.join()
    while read := os.read(ours.fileno(), 2**16):
        made += len(read)
    ours.close()
    return made


def lost(folder, made):
    """Return how many steps a record lacks at its end; everything in it is read."""
    steps = [record.step for record in read_record(folder)] if made > 1 else []
    assert steps == list(range(len(steps)))
    read_header(folder)
    assert all(event["step"] <= made for event in read_events(folder))
    found = read_norms(folder)
    assert (found.steps <= made).all()
    assert found.norms.shape[1] == 4
    return made - len(steps)


def test_a_kill_loses_at_most_what_waits_to_be_read_together(tmp_path):
    for number, after in enumerate((1, 83, 1261)):
        made = killed(tmp_path / str(number), after)
        assert lost(tmp_path / str(number), made) <= BATCH


def main():
    chance = random.Random(0)
    most = 0
    for _ in range(int(sys.argv[1])):
        with tempfile.TemporaryDirectory() as folder:
            made = killed(Path(folder, "run"), chance.randrange(1, 3000))
            most = max(most, lost(Path(folder, "run"), made))
    print(f"{sys.argv[1]} kills: every record is readable, at most {most} steps are lost")  # noqa: T201


if __name__ == "__main__":
    main()
