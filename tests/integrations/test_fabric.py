"""Fabric: ``gradclip.attach`` on the optimizer that ``fabric.setup`` returned."""

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision
from lightning_ranks import fits_fabric
from lightning_runs import (
    BATCH,
    BATCHES,
    CLOSE,
    LIMIT,
    QUIET,
    SAME,
    Net,
    adamw,
    fused_adamw,
    fused_momentum,
    loader,
    moments,
    momentum,
    same,
    weights,
)
from torch import nn

import gradclip
from processes import together

pytestmark = QUIET


class Plain(nn.Module):
    """The same network as a module of torch."""

    def __init__(self):
        super().__init__()
        net = Net()
        self.up, self.norm, self.down = net.up, net.norm, net.down

    def forward(self, batch):
        inputs, targets = batch
        outputs = self.down(torch.tanh(self.norm(self.up(inputs))))
        return nn.functional.mse_loss(outputs.float(), targets.float())


def fit(make, policy=None, theirs=None, broken=None, plugins=None):
    """Train under Fabric, clipped by an attachment or by Fabric; look at every step."""
    fabric = Fabric(accelerator="cpu", devices=1, plugins=plugins)
    module = Plain()
    model, optimizer = fabric.setup(module, make(module.named_parameters()))
    handle = None if policy is None else gradclip.attach(optimizer, policy)
    losses, results, unchanged = [], [], []
    for number, batch in enumerate(fabric.setup_dataloaders(loader())):
        loss = model(batch)
        losses.append(float(loss.detach()))
        fabric.backward(loss)
        if number == broken:
            module.up.weight.grad[0, 0] = torch.inf
        if theirs is not None:
            fabric.clip_gradients(model, optimizer, max_norm=theirs)
        before = weights(module), moments(optimizer)
        optimizer.step()
        unchanged.append(same(before, (weights(module), moments(optimizer))))
        optimizer.zero_grad()
        if handle is not None:
            results.append(handle.last.to_host())
    return losses, weights(module), results, unchanged


def half():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return MixedPrecision("16-mixed", device="cpu", scaler=scaler)


@pytest.mark.parametrize("make", [adamw, fused_adamw, momentum])
def test_losses_and_weights_are_those_of_fabrics_own_clipping(make):
    losses, ours, results, _ = fit(make, policy=LIMIT)
    wanted, theirs, _, _ = fit(make, theirs=LIMIT)
    assert losses == pytest.approx(wanted, **CLOSE)
    torch.testing.assert_close(ours, theirs, **SAME)
    assert all(each.clipped for each in results)
    assert len(results) == BATCHES


@pytest.mark.parametrize(("fused", "plain"), [(fused_adamw, adamw), (fused_momentum, momentum)])
def test_a_fused_optimizer_under_a_scaler_which_fabric_refuses_to_clip(fused, plain):
    with pytest.raises(NotImplementedError, match="optimizers handling the unscaling"):
        fit(fused, theirs=LIMIT, plugins=[half()])
    losses, ours, results, _ = fit(fused, policy=LIMIT, plugins=[half()])
    wanted, theirs, _, _ = fit(plain, theirs=LIMIT, plugins=[half()])
    assert losses == pytest.approx(wanted, **CLOSE)
    torch.testing.assert_close(ours, theirs, **SAME)
    assert all(LIMIT < each.norm_pre < 100 and each.clipped for each in results)


@pytest.mark.parametrize("make", [adamw, fused_adamw, momentum, fused_momentum])
@pytest.mark.parametrize("scaled", [False, True], ids=["float32", "scaler"])
def test_an_infinity_is_not_stepped_on(make, scaled):
    plugin = half()
    _, ours, _, unchanged = fit(make, policy=LIMIT, broken=3, plugins=[plugin] if scaled else None)
    assert unchanged == [number == 3 for number in range(BATCHES)]
    assert all(torch.isfinite(each).all() for each in ours.values())
    assert plugin.scaler.get_scale() == (512.0 if scaled else 1024.0)


def test_patterns_name_parameters_without_what_fabric_adds():
    fabric = Fabric(accelerator="cpu", devices=1)
    model = fabric.setup_module(Plain())
    assert next(name for name, _ in model.named_parameters()) == "_forward_module.up.weight"
    fabric.backward(model(next(iter(loader()))))
    result = gradclip.GradientClipper(model, {"up.*": 0.1, "*": None}).clip().to_host()
    assert result.groups["up.*"].norm_post == pytest.approx(0.1)


def test_two_ranks_of_fsdp2_end_where_one_process_does_and_fsdp1_is_refused():
    (norms, found, refusal), (others, _, _) = together(fits_fabric, 2)
    assert norms == others
    module = Plain()
    optimizer = momentum(module.named_parameters())
    handle = gradclip.attach(optimizer, LIMIT)
    for number, batch in enumerate(loader(len(norms), 2 * BATCH)):
        module(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert norms[number] == pytest.approx(float(handle.last.norm_pre), rel=1e-5)
    torch.testing.assert_close(found, weights(module), rtol=1e-5, atol=1e-6)
    assert "ArgumentValueError" in refusal
    assert "shard that FSDP1 holds" in refusal
