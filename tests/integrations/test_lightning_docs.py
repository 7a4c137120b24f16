"""The diffs of docs/reference/integrations/lightning.md run as they stand."""

import re
from pathlib import Path

import pytest
import torch
from lightning_runs import CLOSE, QUIET, SAME, Net, loader, momentum, weights

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:.*`tensorboardX` has been removed"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
]
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "integrations" / "lightning.md"
DIFFS = re.findall(
    r"^```diff\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)


def side(diff, sign):
    """Return the lines of one side of a diff."""
    lines = [line or " " for line in diff.splitlines()]
    return "\n".join(line[1:] for line in lines if line[0] in (" ", sign))


class Called(Net):
    """Fabric calls its modules, and gives the loss to ``loss_of``."""

    def forward(self, batch):
        return self.loss_of(batch)


def run(code):
    losses = []

    def loss_of(model, batch):
        loss = model(batch)
        losses.append(float(loss.detach()))
        return loss

    model = Called(momentum)
    names = {
        "model": model,
        "optimizer": momentum(model.named_parameters()),
        "loader": loader(),
        "loss_of": loss_of,
    }
    exec(code, names)
    return losses or model.losses, weights(model), names


@pytest.mark.parametrize("diff", DIFFS, ids=["Trainer", "Fabric"])
def test_a_diff_trains_as_before(diff, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the Trainer writes its logs and checkpoints
    added = [line for line in diff.splitlines() if line.startswith("+")]
    assert len(added) <= 2
    losses, ours, names = run(side(diff, "+"))
    wanted, theirs, _ = run(side(diff, "-"))
    assert len(losses) == 8
    assert losses == pytest.approx(wanted, **CLOSE)
    torch.testing.assert_close(ours, theirs, **SAME)
    clipping = names.get("handle") or names["trainer"].callbacks[0]
    assert bool(clipping.last.clipped)
