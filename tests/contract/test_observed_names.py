"""What ``gradclip run`` wraps of torch: private names, which a new torch may change."""

import inspect

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import clip_grad
from torch.optim import optimizer

PARAMETERS = [
    (clip_grad._get_total_norm, ["tensors", "norm_type", "error_if_nonfinite", "foreach"]),
    (clip_grad._clip_grads_with_norm_, ["parameters", "max_norm", "total_norm", "foreach"]),
    (clip_grad.clip_grad_value_, ["parameters", "clip_value", "foreach"]),
    (torch.amp.GradScaler.scale, ["self", "outputs"]),
    (
        torch.amp.GradScaler._maybe_opt_step,
        ["self", "optimizer", "optimizer_state", "args", "kwargs"],
    ),
    (torch.Tensor.backward, ["self", "gradient", "retain_graph", "create_graph", "inputs"]),
    (FullyShardedDataParallel.clip_grad_norm_, ["self", "max_norm", "norm_type"]),
    (optimizer.register_optimizer_step_pre_hook, ["hook"]),
    (optimizer.register_optimizer_step_post_hook, ["hook"]),
]
MODULES = {
    "torch.optim.optimizer": torch.optim.Optimizer,
    "torch._tensor": torch.Tensor.backward,
    "torch.amp.grad_scaler": torch.amp.GradScaler,
    "torch.distributed.fsdp.fully_sharded_data_parallel": FullyShardedDataParallel,
}


@pytest.mark.parametrize(("function", "names"), PARAMETERS)
def test_what_is_wrapped_has_these_parameters(function, names):
    assert list(inspect.signature(function).parameters) == names


@pytest.mark.parametrize("name", MODULES)
def test_classes_are_made_in_the_modules_that_are_waited_for(name):
    assert MODULES[name].__module__ == name


def layers():
    net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1))
    net(torch.ones(2, 3)).sum().backward()
    return net


def test_public_names_call_the_private_ones(monkeypatch):
    called = []
    for name in ("_get_total_norm", "_clip_grads_with_norm_"):
        function = getattr(clip_grad, name)
        monkeypatch.setattr(
            clip_grad, name, lambda *a, f=function, n=name: called.append((n, a)) or f(*a)
        )
    total = torch.nn.utils.clip_grad_norm_(layers().parameters(), 1.0)
    assert [name for name, _ in called] == ["_get_total_norm", "_clip_grads_with_norm_"]
    assert called[1][1][2] is total


def test_the_norms_are_stacked_in_the_order_of_the_gradients(monkeypatch):
    class Torch:
        norms, calls = [], []

        def __getattr__(self, name):
            return getattr(torch, name)

        def _foreach_norm(self, *args):
            self.calls.append(args)
            return torch._foreach_norm(*args)

        def stack(self, tensors):
            self.norms.append(torch.stack(tensors))
            return self.norms[-1]

    gradients = [each.grad for each in layers().parameters()]
    monkeypatch.setattr(clip_grad, "torch", Torch())
    torch.nn.utils.get_total_norm(gradients)
    (norms,) = Torch.norms
    assert len(Torch.calls) == 1
    expected = torch.stack([each.norm() for each in gradients])
    torch.testing.assert_close(norms, expected, rtol=1e-6, atol=0)


def test_a_step_is_called_inside_the_wrapper_that_calls_the_hooks():
    """The watch counts its frames, to know a step inside a step."""
    net, frames = layers(), []
    made = torch.optim.SGD(net.parameters(), lr=0.1)
    made.register_step_pre_hook(lambda *_: frames.extend(f.frame.f_code for f in inspect.stack()))
    made.step()
    names = [code.co_qualname for code in frames]
    assert names.count("Optimizer.profile_hook_step.<locals>.wrapper") == 1


def test_a_fused_step_is_told_the_scale_and_the_overflow():
    net, seen = layers(), {}
    made = torch.optim.SGD(net.parameters(), lr=0.1, fused=True)
    made.register_step_pre_hook(lambda of, *_: seen.update(vars(of)))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    made.zero_grad()
    scaler.scale(net(torch.ones(2, 3)).sum()).backward()
    scaler.step(made)
    assert float(seen["grad_scale"]) == 8
    assert float(seen["found_inf"]) == 0
