"""How many operations a policy asks of a device: each is a launch, however little it does."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gradclip import AGCClip, EMAClip, GradientClipper, QuantileClip, ZScoreClip
from gradclip.clipping.policies import Measurement, Scopes

pytestmark = pytest.mark.usefixtures("unread")


class Operations(TorchDispatchMode):
    """Notes what a device would do; for views of its memory it does nothing."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations(call):
    with torch.no_grad(), Operations() as noted:
        call()
    return noted.names


@pytest.mark.parametrize("kind", [ZScoreClip, EMAClip, QuantileClip])
def test_a_policy_is_few_operations(kind):
    """At most 30; where the norm of all tensors decides on skips, as many for that one again."""
    for scope in ("group", "tensor"):
        for on_spike in ("clip", "skip"):
            policy, count = kind(scope=scope, on_spike=on_spike), 1 if scope == "group" else 5
            sizes_S, device = torch.ones(count, dtype=torch.int64), torch.device("cpu")
            state = policy.initial_state(Scopes([f"w{n}" for n in range(count)], sizes_S, device))
            norms_S, zero = torch.ones(count, dtype=torch.float64), torch.tensor(0)
            seen = Measurement(
                norms_S=norms_S,
                total_norm=norms_S.norm(),
                committed=torch.tensor(True),
                step=zero,
                skips=zero,
            )
            policy.decide(seen, state)  # which makes its tables
            found = operations(lambda: policy.decide(seen, state))  # noqa: B023 - called here
            twice = scope == "tensor" and on_spike == "skip"
            assert len(found) <= (60 if twice else 30), (scope, on_spike, len(found), found)
            assert "_local_scalar_dense" not in found


def test_the_rows_of_a_tensor_are_read_and_scaled_together():
    """An operation for each unit would be a hundred thousand of a language model."""
    counts = []
    for rows in (3, 300):
        weights = [torch.nn.Parameter(torch.ones(rows, 4)) for _ in range(2)]
        weights[1].data = torch.ones(4, rows).T  # rows with gaps
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        clipper = GradientClipper(weights, AGCClip(), backend="foreach")
        clipper.clip()
        counts.append(len(operations(clipper.clip)))
        assert torch.allclose(weights[1].grad.norm(dim=1), torch.tensor(0.02))
    assert counts[0] == counts[1] <= 100, counts
