"""Gradients for the short way of a GPU."""

import torch


def made(seed=0, spike=0.0, dtypes=(torch.float32, torch.bfloat16, torch.float32, torch.float16)):
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for number, (dtype, size) in enumerate(zip(dtypes, (300, 70, 5, 64), strict=True)):
        weight = torch.nn.Parameter(torch.zeros(size, dtype=dtype))
        weight.grad = torch.randn(size, generator=generator).to(dtype)
        pairs.append((f"w{number}", weight))
    pairs[1][1].grad[3] += spike
    return pairs


def regain(pairs, **kwargs):
    """Give parameters other gradients, elsewhere in memory."""
    for (_, weight), (_, other) in zip(pairs, made(**kwargs), strict=True):
        weight.grad = other.grad
