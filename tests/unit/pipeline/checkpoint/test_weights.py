"""What a checkpoint keeps of models of every kind."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from gradclip.pipeline.checkpoint.weights import gathered_weights, load_weights, write_weights


def save(accelerator, folder):
    write_weights(folder, gathered_weights(accelerator))


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
    save(one(nn.Linear(3, 2, bias=False)), tmp_path)
    with pytest.raises(RuntimeError, match="Missing key"):
        load_weights(tmp_path, one(nn.Linear(3, 2)))
