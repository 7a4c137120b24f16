"""Compiles the Triton kernels for an H100 without one, and prints what became of them as JSON."""

import json
import re
import sys

import triton.language as tl
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gradclip.clipping.kernels import triton as backend
from gradclip.clipping.kernels import triton_launch
from gradclip.clipping.kernels import triton_programs as programs

TABLES = {"addresses": "*i64", "table": "*i64"}
CASES = {
    "power_sums float32": (
        programs.power_sums,
        {**TABLES, "found": "*fp64"},
        {"POWER": 2, "DTYPE": tl.float32, "KIND": tl.float32, "RECOUNT": 1024},
    ),
    "power_sums bfloat16": (
        programs.power_sums,
        {**TABLES, "found": "*fp64"},
        {"POWER": 2, "DTYPE": tl.bfloat16, "KIND": tl.float32, "RECOUNT": 1024},
    ),
    "scale bfloat16": (
        programs.scale,
        {**TABLES, "coefficients": "*fp64", "chunks": "i32"},
        {"PER_ROW": False, "DTYPE": tl.bfloat16},
    ),
    "clamp float32": (
        programs.clamp,
        {**TABLES, "limit": "*fp64", "before": "*fp64", "after": "*fp64", "changed": "*i64"},
        {"DTYPE": tl.float32, "KIND": tl.float32, "WRITE": True},
    ),
}


def compiled(kernel, pointers, constants):
    names = kernel.arg_names
    constants = {**constants, "BLOCK": backend.BLOCK}
    types = {name: pointers.get(name, "constexpr") for name in names}
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in types.items()
            if kind.startswith("*")
        },
    )
    return compile_kernel(
        source, target=GPUTarget("cuda", 90, 32), options=triton_launch._OPTIONS
    ).asm


def main():
    facts = {}
    for name, case in CASES.items():
        asm = compiled(*case)
        facts[name] = {
            "narrow_loads": len(re.findall(r"ld\.global\S*\.b(?:16|32) ", asm["ptx"])),
            "narrow_stores": len(re.findall(r"st\.global\S*\.b(?:16|32) ", asm["ptx"])),
            "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", asm["ptx"])),
            "wide_stores": len(re.findall(r"st\.global\S*\.v4\.b32", asm["ptx"])),
            "conversions": asm["ttgir"].count("ttg.convert_layout"),
            "spills": len(re.findall(r"(?:ld|st)\.local", asm["ptx"])),
        }
    json.dump(facts, sys.stdout)


if __name__ == "__main__":
    main()
