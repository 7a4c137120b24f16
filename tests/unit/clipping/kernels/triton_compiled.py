"""Compiles the Triton kernels for an H100 without one, and prints what became of them as JSON.

They are compiled as a launch would: that works alike in all versions of Triton.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from gradclip.clipping.kernels import triton as backend
from gradclip.clipping.kernels import triton_launch
from gradclip.clipping.kernels import triton_programs as programs

I64, F64 = torch.int64, torch.float64
BLOCK, RECOUNT, FOLD = backend.BLOCK, backend._RECOUNT, backend._FOLD
BITS = backend._bits(0.3)


def cases():
    """Yield each program that is launched: a name, what it gets, its constants."""
    for dtype in (tl.float32, tl.bfloat16, tl.float64):
        kinds = {"DTYPE": dtype, "KIND": tl.float64 if dtype is tl.float64 else tl.float32}
        sizes = {"BLOCK": BLOCK, "RECOUNT": RECOUNT}
        for power in (2, programs.MAXIMUM.value):
            constants = {"POWER": power, **kinds, **sizes}
            yield f"power_sums {power}", programs.power_sums, (I64, I64, F64), constants
        got = (I64, I64, F64, 1000)
        yield "scale", programs.scale, got, {"PER_ROW": False, "DTYPE": dtype, "BLOCK": BLOCK}
        got = (I64, I64, F64, F64, F64, I64)
        yield "clamp", programs.clamp, got, {**kinds, "WRITE": True, **sizes}
        got = (I64, I64, F64, BITS, F64)
        sizes["BLOCK"] = RECOUNT if dtype is tl.float64 else BLOCK
        yield "scaled_power_sums", programs.scaled_power_sums, got, {**kinds, **sizes}
    constants = {"COLUMNS": 1, "LARGEST": False, "BLOCK": FOLD}
    yield "fold", programs.fold, (F64, I64, F64), constants
    got = (F64, F64, F64, BITS, BITS, torch.bool, BITS, BITS, F64, 5)
    yield "coefficients", programs.coefficients, got, {"NUMBERS": True, "BLOCK": FOLD}


class H100:
    """What Triton asks of a driver before it compiles."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def machine_code(asm):
    """Return the instructions that the GPU runs."""
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(asm["cubin"])
        command = [binaries / "cuobjdump", "-sass", file]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def loads_in_a_row(code):
    """Return how many loads of 16 bytes are issued at most before arithmetic or a store."""
    found = re.findall(r"\b(LDG\S*\.128|[FD](?:FMA|MUL|ADD)|STG|BRA)\b", code)
    runs = "".join("L" if one.startswith("LDG") else " " for one in found).split()
    return max(map(len, runs), default=0)


def main():
    triton.runtime.driver.set_active(H100())
    facts = {}
    for name, program, got, constants in cases():
        compiled = program.warmup(*got, **constants, **triton_launch._OPTIONS, grid=(1,))
        asm = compiled.asm
        code = machine_code(asm)
        facts[f"{name} {constants.get('DTYPE', '')}".strip()] = {
            "narrow_loads": len(re.findall(r"ld\.global\S*\.b(?:16|32) ", asm["ptx"])),
            "narrow_stores": len(re.findall(r"st\.global\S*\.b(?:16|32) ", asm["ptx"])),
            "wide_loads": len(re.findall(r"LDG\S*\.128\b", code)),
            "wide_stores": len(re.findall(r"STG\S*\.128\b", code)),
            "in_a_row": loads_in_a_row(code),
            "conversions": asm["ttgir"].count(".convert_layout"),
            "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        }
    json.dump(facts, sys.stdout)


if __name__ == "__main__":
    main()
