"""Compile every Triton configuration ahead of time for every architecture, without a card, and print what came out.

Usage: aot.py [--arch NAME ...] [--group 32|64 ...] [--dtype bfloat16|float16 ...] [--json FILE]      (make aot)

Shapes are gpt-oss's (hidden and intermediate 2880, 32 experts, top-4). Registers, spills and static shared memory of
CUDA are what ptxas -v (the one in the triton wheel) says to triton; those of AMD are the metadata of the compiled
code. `matrix` counts matrix instructions in the text (mma.sync, wgmma, tcgen05 in PTX, WMMA in amdgcn). Exits 1 when
any kernel spills or a `blocks` kernel has no matrix instruction.
"""

import argparse
import io
import itertools
import json
import os
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

# compile, not interpret; anew, since only then does triton print what ptxas -v says
os.environ.pop("TRITON_INTERPRET", None)
os.environ |= {"TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gptoss_quantize.kernels import triton_kernels
from gptoss_quantize.kernels.experts_triton import CONFIGS, CONFIGS_AMD, FP_FUSION, SUM_COLUMNS, Config, Tile

CUDA = {f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 86, 89, 90, 120)}
HIP = {name: GPUTarget("hip", name, 32) for name in ("gfx1100", "gfx1201")}
TARGETS = CUDA | HIP
# dynamic shared memory that one program may have, bytes
SHARED_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_120": 101376}
SHARED_LIMIT |= {"gfx1100": 65536, "gfx1201": 65536}
HIDDEN, EXPERTS, CHOICES = 2880, 32, 4
POINTERS = {
    "x_ptr": "x", "index_ptr": "i64", "order_ptr": "i32", "block_ptr": "i32", "word_ptr": "i32", "scale_ptr": "bf16",
    "bias_ptr": "bf16", "prob_ptr": "x", "out_ptr": "x", "y_ptr": "fp32",
}  # fmt: skip
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def source(kernel: Any, constants: dict[str, Any], dtype: str, act: str) -> ASTSource:
    """Return what to compile: the kernel's arguments as `experts_triton` gives them, pointers aligned to 16 bytes."""
    types = {name: "*" + (SHORT[dtype] if kind == "x" else kind) for name, kind in POINTERS.items()}
    types |= {"act_ptr": "*" + act, "tokens": "i32", "limit": "fp32", "alpha": "fp32"}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    return ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)


def launches(config: Config, dtype: str, group: int, bits: int) -> list[tuple[Any, dict[str, Any], Tile, str]]:
    """Return (kernel, constants, tile, dtype of activations) of a configuration."""
    sizes = {"D": HIDDEN, "F": HIDDEN, "K": CHOICES, "GROUP": group, "BITS": bits}
    if config.path == "pairs":
        sizes |= {"E": EXPERTS, "BLOCK_W": config.words, "BLOCK_K": triton.next_power_of_2(CHOICES)}
        kernels, act = (triton_kernels.gate_up_pairs, triton_kernels.down_pairs), "fp32"
    else:
        sizes |= {
            "COMPUTE": triton_kernels.TYPES[getattr(torch, dtype)],
            "SORTED": config.path == "sorted",
            "SCALE_FIRST": config.scale_first and dtype == "bfloat16",
            "WIDE": config.wide,
            "BLOCK_M": config.block_m,
        }
        kernels, act = (triton_kernels.gate_up_blocks, triton_kernels.down_blocks), SHORT[dtype]
    found = []
    for kernel, tile in zip(kernels, (config.gate_up, config.down), strict=True):
        given = sizes | {"ROWS": tile.rows}
        found.append((kernel, {name: given[name] for name in given if name in kernel.arg_names}, tile, act))
    return found


def cuda_facts(compiled: Any, log: str) -> dict[str, int]:
    """Return registers, spilled bytes and matrix instructions: what ptxas said to triton, and the PTX."""
    used, spills = re.search(r"Used (\d+) registers", log), re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    assert used and spills, f"no report of ptxas: {log!r}"
    matrix = re.findall(
        r"^\s*(?:@\S+ )?(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", compiled.asm["ptx"], re.MULTILINE
    )
    return {"registers": int(used[1]), "spills": sum(map(int, spills)), "matrix": len(matrix)}


def hip_facts(compiled: Any) -> dict[str, int]:
    """Return registers, spilled registers and matrix instructions from the text of the compiled code."""
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found, f"no .{name} in the metadata"
        return int(found[1])

    spills = field("vgpr_spill_count") + field("sgpr_spill_count") + field("private_segment_fixed_size")
    matrix = len(re.findall(r"^\s*v_(?:wmma|mfma|swmmac)", text, re.MULTILINE))
    return {"registers": field("vgpr_count"), "spills": spills, "matrix": matrix}


def compile_one(
    kernel: Any, constants: dict[str, Any], tile: Tile, act: str, dtype: str, arch: str
) -> dict[str, Any]:
    """Return the facts of one kernel for one architecture."""
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": FP_FUSION}
    with redirect_stdout(io.StringIO()) as log:
        compiled = triton.compile(source(kernel, constants, dtype, act), target=TARGETS[arch], options=options)
    facts = cuda_facts(compiled, log.getvalue()) if arch in CUDA else hip_facts(compiled)
    return facts | {"shared": compiled.metadata.shared, "fits": compiled.metadata.shared <= SHARED_LIMIT[arch]}


def rows(
    archs: list[str], groups: list[int], dtypes: list[str], names: list[str], widths: list[int]
) -> list[dict[str, Any]]:
    """Return a row for every kernel, configuration, dtype, group, bits and architecture."""
    jobs: list[tuple[str, str, int, int, Any, str]] = []
    for dtype in dtypes:
        for group, bits, name, arch in itertools.product(groups, widths, names, archs):
            if name == "pairs" or name.startswith("float32") == (dtype == "float32"):
                config = (CONFIGS if arch in CUDA else CONFIGS_AMD)[name]
                jobs += [(name, dtype, group, bits, job, arch) for job in launches(config, dtype, group, bits)]
        size = {"D": HIDDEN, "E": EXPERTS, "K": CHOICES, "COLUMNS": SUM_COLUMNS}
        last = (triton_kernels.sum_choices, size, Tile(0, 4), SHORT[dtype])
        jobs += [("all but pairs", dtype, 0, 0, last, arch) for arch in archs]
    out = []
    for name, dtype, group, bits, (kernel, constants, tile, act), arch in jobs:
        row = {"config": name, "kernel": kernel.__name__, "dtype": dtype, "group": group, "bits": bits, "arch": arch}
        out.append(row | compile_one(kernel, constants, tile, act, dtype, arch))
    return out


def bad(row: dict[str, Any]) -> bool:
    """Return whether a kernel spills, is too big, or should use matrix instructions and does not.

    Float32 operands are multiplied exactly, so not on matrix units.
    """
    wants_matrix = row["kernel"].endswith("_blocks") and row["dtype"] != "float32"
    return bool(row["spills"] or not row["fits"] or (wants_matrix and not row["matrix"]))


def main() -> int:
    """Compile, print the table, write it; 1 if a kernel is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--config", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--group", nargs="+", type=int, default=[64, 32], choices=[64, 32])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2], choices=[4, 3, 2])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=list(SHORT))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = rows(args.arch, args.group, args.dtype, args.config, args.bits)
    table = Table(title=f"triton {triton.__version__}, hidden {HIDDEN}, {EXPERTS} experts, top-{CHOICES}")
    for column in found[0]:
        table.add_column(column)
    for row in found:
        table.add_row(*map(str, row.values()), style="red" if bad(row) else None)
    Console(width=140).print(table)
    if args.json:
        args.json.write_text(json.dumps({"triton": triton.__version__, "rows": found}, indent=1), encoding="utf-8")
    wrong = sum(map(bad, found))
    print(f"{len(found)} kernels compiled, {wrong} that spill, do not fit or miss matrix instructions")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
