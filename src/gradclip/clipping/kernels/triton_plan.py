"""How the rows of tensors are cut for the programs of a GPU: one program for each chunk.

What both halves of the Triton backend share: ``triton.py``, which takes one step at a time, and
``triton_fused.py``, which takes a whole clip.
"""

import struct

import torch
import triton.language as tl
from torch import Tensor

from gradclip.clipping.kernels.tables import Addresses, Table
from gradclip.clipping.kernels.tensor_specs import Batch, TensorSpecs
from gradclip.clipping.kernels.triton_launch import Launcher

CHUNK = 1 << 14
"""Elements of one program."""

BLOCK = 1 << 12
"""Elements that a program holds at a time."""

RECOUNT = 1 << 10
"""Elements at a time where a chunk is counted in float64."""

PROGRAMS = 8
"""Programs for each multiprocessor, of a pass that may have nothing to do and then ends at once."""

FOLD = 1 << 10
"""Sums of chunks that are added at a time."""

TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class Chunks:
    """The chunks of a specs, and where its tensors were found last."""

    def __init__(self, specs: TensorSpecs) -> None:
        sizes_R = torch.tensor(specs.row_sizes, dtype=torch.int64, device="cpu")
        rows_T = torch.tensor(specs.rows, dtype=torch.int64, device="cpu")
        tensor_R = _numbers(len(specs)).repeat_interleave(rows_T)
        first_row_T = rows_T.cumsum(0) - rows_T
        start_R = (_numbers(len(sizes_R)) - first_row_T[tensor_R]) * sizes_R
        chunks_R = (sizes_R + CHUNK - 1) // CHUNK
        row_C = _numbers(len(sizes_R)).repeat_interleave(chunks_R)
        last_R = chunks_R.cumsum(0)
        offset_C = (_numbers(len(row_C)) - (last_R - chunks_R)[row_C]) * CHUNK
        count_C = (sizes_R[row_C] - offset_C).clamp(max=CHUNK)
        self.rows = len(sizes_R)
        self.chunks = len(row_C)
        self.table = Table(
            torch.stack([tensor_R[row_C], start_R[row_C] + offset_C, count_C, row_C], dim=1)
        )
        """For each chunk: tensor, first element, elements, row; int64 (C, 4)."""
        self.firsts = Table(torch.cat([last_R.new_zeros(1), last_R]))
        """The first chunk of each row, and their number: int64 (R + 1,)."""
        self.launch = Launcher()
        self._addresses: Addresses | None = None

    def addresses_of(self, batch: Batch) -> Tensor:
        """Return where the tensors of a batch are: int64 (T,), on their device."""
        self.table.on(batch.device)  # refuses a capture that comes before the first steps
        if self._addresses is None:
            self._addresses = Addresses(batch.device, len(batch.tensors))
        return self._addresses.of(batch.addresses)


def programs_on(device: torch.device) -> int:
    """Return how many programs a pass has that may have nothing to do."""
    if device.type != "cuda":  # in the interpreter
        return PROGRAMS
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


def bits(number: float) -> int:
    """Return the bits of a float64: Triton would round a number to float32."""
    found: int = struct.unpack("q", struct.pack("d", number))[0]
    return found


def _numbers(count: int) -> Tensor:
    return torch.arange(count, device="cpu")
