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

from gradclip.clipping.kernels import triton_decide, triton_launch, triton_plan
from gradclip.clipping.kernels import triton_programs as programs

I64, F64 = torch.int64, torch.float64
BITS = triton_plan.bits(0.3)
POINTERS = {
    programs.power_sums: (I64, I64, F64),
    programs.scaled_power_sums: (I64, I64, F64, BITS, F64),
    programs.fold: (F64, I64, F64),
    programs.coefficients: (F64, F64, F64, BITS, BITS, torch.bool, BITS, BITS, F64, 5),
    programs.scale: (I64, I64, F64, 1000),
    programs.clamp: (I64, I64, F64, F64, F64, I64),
    triton_decide.decide: (
        *(F64, F64, I64, I64, I64, F64, F64, BITS, torch.int32, F64, F64, F64, F64, F64),
        *(148, 2),
    ),
}
SIZES = {"BLOCK": triton_plan.BLOCK, "RECOUNT": triton_plan.RECOUNT}
FOLD = {"BLOCK": triton_plan.FOLD}
FEW = {"BLOCK": triton_plan.RECOUNT}
FLOAT32 = {"DTYPE": tl.float32, "KIND": tl.float32, **SIZES}
BFLOAT16 = {"DTYPE": tl.bfloat16, "KIND": tl.float32, **SIZES}
FLOAT64 = {"DTYPE": tl.float64, "KIND": tl.float64, **SIZES}
DECIDE = {"POWER": 2, "CLAMPS": False, "SKIPS": True, "SCALED": 0, "WIDTH": 2, **FOLD}
ONE = {"PER_ROW": False, "DTYPE": tl.bfloat16, "BLOCK": triton_plan.BLOCK}
CASES = {
    "power_sums float32": (programs.power_sums, {"POWER": 2, **FLOAT32}),
    "power_sums bfloat16": (programs.power_sums, {"POWER": 2, **BFLOAT16}),
    "scale bfloat16": (programs.scale, ONE),
    "clamp float32": (programs.clamp, {"WRITE": True, **FLOAT32}),
    "clamp bfloat16": (programs.clamp, {"WRITE": True, **BFLOAT16}),
}
"""Looked at closely."""
OTHERS = {
    "power_sums float64": (programs.power_sums, {"POWER": 2, **FLOAT64}),
    "maximum bfloat16": (programs.power_sums, {"POWER": programs.MAXIMUM.value, **BFLOAT16}),
    "scaled_power_sums float32": (programs.scaled_power_sums, {**FLOAT32, **FEW}),
    "scale float32": (programs.scale, {**ONE, "PER_ROW": True, "DTYPE": tl.float32}),
    "clamp float64": (programs.clamp, {"WRITE": False, **FLOAT64}),
    "fold": (programs.fold, {"COLUMNS": 3, "LARGEST": False, **FOLD}),
    "coefficients": (programs.coefficients, {"NUMBERS": True, **FOLD}),
    "decide": (triton_decide.decide, DECIDE),
    "decide values": (triton_decide.decide, {**DECIDE, "CLAMPS": True, "SCALED": 2, "WIDTH": 64}),
}
"""Only compiled, without spills."""


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


def spills(code):
    """Return how often registers are put into memory, or taken from there."""
    return len(re.findall(r"\b(?:LDL|STL)\b", code))


def compiled(program, constants):
    options = triton_launch._OPTIONS
    return program.warmup(*POINTERS[program], **constants, **options, grid=(1,)).asm


def main():
    triton.runtime.driver.set_active(H100())
    facts = {}
    for name, case in CASES.items():
        asm = compiled(*case)
        code = machine_code(asm)
        facts[name] = {
            "narrow_loads": len(re.findall(r"ld\.global\S*\.b(?:16|32) ", asm["ptx"])),
            "narrow_stores": len(re.findall(r"st\.global\S*\.b(?:16|32) ", asm["ptx"])),
            "wide_loads": len(re.findall(r"LDG\S*\.128\b", code)),
            "wide_stores": len(re.findall(r"STG\S*\.128\b", code)),
            "in_a_row": loads_in_a_row(code),
            "conversions": asm["ttgir"].count(".convert_layout"),
            "spills": spills(code),
        }
    spilling = [name for name, case in OTHERS.items() if spills(machine_code(compiled(*case)))]
    assert not spilling, spilling
    json.dump(facts, sys.stdout)


if __name__ == "__main__":
    main()
