"""Gradients on several devices: two names of the CPU stand for two of them."""

from math import inf

import torch

from gradclip.clipping.kernels import Batch, choose
from gradclip.clipping.measure import norm
from gradclip.clipping.measure.scopes import OneScope, OneScopeEach
from pairwise import pairwise

TENSORS = [
    torch.tensor([[3.0, 4.0], [6.0, 8.0]]),
    torch.tensor([1e200, 1.0], dtype=torch.float64),
    torch.tensor([[0.5], [12.0], [0.0]]),
    torch.tensor([2.0]),
]
ROWS = [2, 1, 3, 1]
PLACES = [torch.device("cpu"), torch.device("cpu", 0), torch.device("cpu", 0), torch.device("cpu")]


@pairwise(p=[0.5, 1.0, 2.0, 3.0, inf], per_row=[False, True], backend=["foreach", "reference"])
def test_rows_come_home_in_their_order(p, per_row, backend):
    def measured(devices):
        batch = Batch.of(TENSORS, ROWS)
        batch.specs.devices = devices
        home = torch.device("cpu")
        rows = OneScopeEach(sum(ROWS), None) if per_row else OneScope()
        found = norm.read(choose(backend), batch, home, p, rows)
        return norm.read_again(choose(backend), batch, found, rows)[0]

    together, apart = measured([torch.device("cpu")] * 4), measured(PLACES)
    torch.testing.assert_close(apart.norms(), together.norms(), rtol=1e-13, atol=0)
    torch.testing.assert_close(apart.row_sums_R, together.row_sums_R, rtol=1e-13, atol=0)
    if per_row:
        rows = [row for t, n in zip(TENSORS, ROWS, strict=True) for row in t.reshape(n, -1)]
        truth = [torch.linalg.vector_norm(r.double() / 1e150, p) * 1e150 for r in rows[2:3]]
        torch.testing.assert_close(apart.norms()[2:3], torch.stack(truth), rtol=1e-12, atol=0)
