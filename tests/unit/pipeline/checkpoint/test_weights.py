"""What a checkpoint keeps of models and optimizers of every kind, and that saving changes nothing.

``torch.distributed.checkpoint.state_dict`` fails most of these, so it is not used.
"""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import gradclip
from gradclip.pipeline.checkpoint.weights import gathered_weights, load_weights, write_weights


class FactorsByDimension(torch.optim.SGD):
    """Keeps factors by the number of a dimension, as Shampoo does, and an entry of no parameter."""

    @torch.no_grad()
    def step(self):  # torch passes a closure where it makes a step of zeros
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                self.state[parameter]["factors"] = {
                    dim: parameter.grad.square().sum(dim) for dim in range(parameter.dim())
                }
        self.state["steps"] = self.state.get("steps", 0) + 1
        super().step()


class KeepsBeside(torch.optim.SGD):
    """Keeps a tensor beside the states of its parameters."""

    def __init__(self, *args, **fields):
        super().__init__(*args, **fields)
        self.slow = torch.zeros(2)

    def step(self, closure=None):
        self.slow += 1
        return super().step(closure)

    def state_dict(self):
        return super().state_dict() | {"slow": self.slow}

    def load_state_dict(self, state):
        self.slow = state["slow"]
        super().load_state_dict({name: state[name] for name in ("state", "param_groups")})


class Lookahead:
    """Is no torch optimizer, and has a form of its own for its state."""

    def __init__(self, params, lr):
        self.fast = torch.optim.AdamW(params, lr)
        self.param_groups = self.fast.param_groups
        self.slow = [p.detach().clone() for p in self.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self):
        self.fast.step()
        for slow, parameter in zip(self.slow, self.param_groups[0]["params"], strict=True):
            parameter.copy_(slow.lerp_(parameter, 0.5))

    def zero_grad(self):
        self.fast.zero_grad()

    def state_dict(self):
        return {"fast": self.fast.state_dict(), "slow": self.slow}

    def load_state_dict(self, state):
        self.fast.load_state_dict(state["fast"])
        self.slow = [each.clone() for each in state["slow"]]


def adam(params, lr):
    return torch.optim.AdamW(params, lr)


def adam_of_a_list_of_groups(params, lr):
    first, *rest = params
    groups = [{"params": []}, {"params": [first], "names": []}, {"params": []}, {"params": rest}]
    return torch.optim.AdamW(groups, lr)


OPTIMIZERS = [
    torch.optim.SGD,
    adam,
    adam_of_a_list_of_groups,
    FactorsByDimension,
    KeepsBeside,
    Lookahead,
]


class Network(nn.Module):
    """Has a parameter that no loss depends on."""

    def __init__(self):
        super().__init__()
        self.first, self.idle, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, inputs):
        return self.last(torch.tanh(self.first(inputs)))


def of_two_models(seed, optimizer):
    """One optimizer of two models, as of a network and of a loss that learns."""
    torch.manual_seed(seed)
    models = Network(), nn.Linear(1, 1)
    made = optimizer([p for model in models for p in model.parameters()], 0.1)
    accelerator = Accelerator(cpu=True)
    accelerator._models, accelerator._optimizers = list(models), [made]
    return accelerator, models, made


def train(models, optimizer, steps):
    network, loss = models
    for number in range(steps):
        inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(number))
        loss(network(inputs)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def save(accelerator, folder):
    write_weights(folder, gathered_weights(accelerator))


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_any_optimizer_goes_on_as_if_it_had_not_stopped(tmp_path, optimizer, steps):
    accelerator, models, made = of_two_models(0, optimizer)
    train(models, made, steps)
    before = copy.deepcopy(made.state_dict())
    save(accelerator, tmp_path)
    assert repr(made.state_dict()) == repr(before)
    again, models_again, made_again = of_two_models(9, optimizer)
    load_weights(tmp_path, again)
    assert repr(made_again.state_dict()) == repr(before)
    train(models, made, 3)
    train(models_again, made_again, 3)
    for model, model_again in zip(models, models_again, strict=True):
        for value, other in zip(model.parameters(), model_again.parameters(), strict=True):
            assert torch.equal(value, other)


def test_no_step_is_made_by_saving_or_loading(tmp_path):
    """``get_optimizer_state_dict`` makes one with zeros, which whoever counts steps takes in."""
    for folder in (tmp_path, None):
        accelerator, _, optimizer = of_two_models(0, adam)
        handle = gradclip.attach(optimizer, 1.0)
        steps = []
        optimizer.register_step_post_hook(lambda *given, steps=steps: steps.append(given))
        if folder:
            save(accelerator, folder)
        else:
            load_weights(tmp_path, accelerator)
        assert (handle.last, steps, dict(optimizer.state)) == (None, [], {})


def one(model):
    accelerator = Accelerator(cpu=True)
    accelerator._models = [model]
    return accelerator


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        self.last.weight = self.first.weight


class SavesMore(nn.Linear):
    """Saves an entry that is no attribute of it."""

    def __init__(self):
        super().__init__(3, 3)
        self.version = 2
        self.register_state_dict_post_hook(
            lambda module, state, prefix, _: state.update(
                {f"{prefix}meta.version": torch.tensor(module.version)}
            )
        )
        self.register_load_state_dict_pre_hook(
            lambda module, state, prefix, *_: setattr(
                module, "version", state.pop(f"{prefix}meta.version").item()
            )
        )


def in_one_piece():
    """Return a layer whose parameters are pieces of one tensor, as those of an LSTM on a GPU."""
    layer = nn.Linear(3, 2)
    flat = torch.randn(8)
    layer.weight, layer.bias = nn.Parameter(flat[:6].view(2, 3)), nn.Parameter(flat[6:])
    return layer


def channels_last():
    return nn.Conv2d(3, 2, 2).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("model", [Tied, SavesMore, in_one_piece, channels_last])
def test_any_model_comes_back(tmp_path, model):
    saved, again = model(), model()
    save(one(saved), tmp_path)
    load_weights(tmp_path, one(again))
    for value, other in zip(saved.parameters(), again.parameters(), strict=True):
        assert torch.equal(value, other)
        assert value.stride() == other.stride()


def test_a_weight_that_is_not_in_the_checkpoint_is_an_error(tmp_path):
    """``set_model_state_dict`` would leave it as it is."""
    save(one(nn.Linear(3, 2, bias=False)), tmp_path)
    with pytest.raises(RuntimeError, match="Missing key"):
        load_weights(tmp_path, one(nn.Linear(3, 2)))
