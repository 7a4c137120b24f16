"""The optimizer's step as a hook, where the verdict of clipping is on a device."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gradclip.clipping import flags
from gradclip.pipeline.hooks import OptimizerHook, PipelineHookArgs


@pytest.mark.parametrize("skipped", [False, True])
def test_a_fused_step_is_queued_before_the_verdict_is_read(monkeypatch, skipped):
    """Else the device would be idle between the two."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.ones(3, 2)).sum().backward()
    optimizer.step()  # one that never stepped is not called under a flag
    before = model.weight.detach().clone()
    done = []
    monkeypatch.setattr(flags, "host_waits_for", lambda device: True)
    read = torch.Tensor.__bool__
    fused = torch._fused_adamw_
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: done.append("read") or read(self))
    monkeypatch.setattr(
        torch,
        "_fused_adamw_",
        lambda *given, **named: done.append("step") or fused(*given, **named),
    )
    result = SimpleNamespace(withheld=torch.tensor(skipped))
    arg = PipelineHookArgs(model=model, optimizer=optimizer, clip_result=result)
    with OptimizerHook().begin("on_step", arg):
        pass
    assert done == ["step", "read"]
    assert arg.is_optimizer_step_committed is not skipped
    assert torch.equal(model.weight, before) is skipped
