"""Parameters with the gradients that a test gives them, and a failure that is told at once."""

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from patience import seconds

AT_ONCE = 5.0


def plain(value):
    parameter = nn.Parameter(torch.zeros_like(value))
    parameter.grad = value.clone()
    return parameter


def sharded(value, mesh, *placements):
    zeros = torch.zeros_like(value)
    parameter = nn.Parameter(distribute_tensor(zeros, mesh, placements, src_data_rank=None))
    parameter.grad = distribute_tensor(value.clone(), mesh, placements, src_data_rank=None)
    return parameter


def line():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def local(parameter):
    gradient = parameter.grad
    return gradient._local_tensor if isinstance(gradient, DTensor) else gradient


def fails(call, error, match):
    """Raise on this rank, at once, and change nothing; return what a test compares."""
    started = time.monotonic()
    with pytest.raises(error, match=match):
        call()
    assert time.monotonic() - started < seconds(AT_ONCE)
