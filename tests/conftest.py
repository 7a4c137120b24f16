"""Where there is no GPU, Triton's kernels run in its interpreter, on the CPU."""

import os
from importlib.util import find_spec

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

collect_ignore = [] if find_spec("triton") else ["unit/clipping/triton_compiled.py"]
