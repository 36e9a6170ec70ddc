"""What the Triton kernels of re-attention take on a GPU, predicted from their machine code. Needs no GPU.

    python benchmarks/predict.py --shapes 128x12x197x64 --gpu H200

Every launch of a call is recorded on meta tensors and compiled, its instructions are counted. A launch takes
the longest of: the issue of its instructions, its special functions, its shared memory, its products, and its
bytes at the speed of the memory. It is a floor for these kernels, beside which eager, torch.compile and SDPA
are counted by their bytes and products alone. No GPU has checked the constants yet.
"""

import argparse
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / name) for name in (".", "tests", "tests/support")]

import aot  # noqa: E402
import torch  # noqa: E402

from vitdiv_kernels.ops import _launch  # noqa: E402
from vitdiv_kernels.ops.maps.reattention import triton_kernels  # noqa: E402


class Gpu(NamedTuple):
    capability: int
    processors: int
    clock: float  # Hz, under load
    bytes_a_second: float  # of memory, of what a copy reaches
    products: float  # multiply-adds a clock and processor of mma.sync in 16 bits
    shared: int  # bytes of shared memory of a processor
    launch: float  # seconds of the host for a launch


# Data sheets of NVIDIA; memory at 0.85 of them, products at 0.62 of them, as microbenchmarks of mma.sync find
# (Luo et al. 2024, arXiv:2402.13499).
GPUS = {
    "H200": Gpu(90, 132, 1.755e9, 0.85 * 4.8e12, 0.62 * 2048, 228 << 10, 5e-6),
    "A100": Gpu(80, 108, 1.41e9, 0.85 * 2.0e12, 0.95 * 1024, 164 << 10, 5e-6),
}
REGISTERS, WARPS = 65536, 64  # of a processor
# Of an issue slot each clock that a warp takes on average: dependent instructions wait some 4 clocks, and in
# a tile many are independent. Not measured.
ISSUE_OF_A_WARP = 0.4
SCHEDULERS, MUFU_CLOCKS, SHARED_CLOCKS = 4, 8, {32: 1, 64: 2, 128: 4}  # of a warp's instruction
# How often a launch moves each of its tensors: written and read again counts as 2.
MOVED = {
    "logits_kernel": {"a": 1, "b": 1, "maps": 1},
    "values_kernel": {"maps": 1, "b": 1, "result": 1},
    "forward_rows": {"z": 2},
    "backward_rows": {"z": 2, "dy": 2},
    "dot_rows": {"x": 1, "y": 1},
}
# Passes over the maps that the plain formula makes, and torch.compile of it.
PASSES = {"eager": {"fwd": 8, "bwd": 11}, "compile": {"fwd": 6, "bwd": 9}}


def passes_of_loops(launch):
    """How often a program walks its outer loop, and each of those inside."""
    arguments = launch.arguments
    if launch.kernel.__name__ in ("forward_rows", "backward_rows"):
        return arguments["tiles"], math.ceil(arguments["keys"] / arguments["BLOCK"])
    if launch.kernel.__name__ == "values_kernel":
        return math.ceil(arguments["inner"] / arguments["INNER"]), 1
    if launch.kernel.__name__ == "logits_kernel":
        return math.ceil(arguments["WIDTH"] / arguments["INNER"]), 1
    return arguments.get("STEPS", 1), 1


def issued(launch, result, kind="issued"):
    """Instructions of a warp of this launch."""
    outer, inner = passes_of_loops(launch)
    loops = result["loops"]
    tops = sum(loop.get(kind, 0) for loop in loops if loop["depth"] == 0)
    nested = sum(loop.get(kind, 0) for loop in loops if loop["depth"] > 0)
    return result["whole"].get(kind, 0) + (outer - 1) * tops + outer * (inner - 1) * nested


def resident_warps(launch, result, gpu):
    registers = -(-result["registers"] // 8) * 8 * 32 * launch.num_warps
    blocks = min(REGISTERS // registers, WARPS // launch.num_warps, gpu.shared // (result["shared"] + 1024))
    return blocks * launch.num_warps


def seconds(launch, result, gpu):
    """(seconds on the device, what binds)"""
    warps = launch.num_warps * math.prod(launch.grid)
    clocks = {}
    efficiency = min(1.0, resident_warps(launch, result, gpu) / SCHEDULERS * ISSUE_OF_A_WARP)
    clocks["issue"] = issued(launch, result) * warps / SCHEDULERS / efficiency
    clocks["special functions"] = issued(launch, result, "mufu") * warps * MUFU_CLOCKS / SCHEDULERS
    shared = sum(
        issued(launch, result, f"{name}.{width}") * rounds
        for name in ("LDS", "STS", "LDSM", "STSM", "LDGSTS")
        for width, rounds in SHARED_CLOCKS.items()
    )
    clocks["shared memory"] = shared * warps
    clocks["products"] = issued(launch, result, "multiply-adds") * warps / gpu.products
    found = {name: count / gpu.processors / gpu.clock for name, count in clocks.items()}
    moved = MOVED[launch.kernel.__name__]
    tensors = {name: launch.arguments.get(name) for name in moved}
    found["memory"] = (
        sum(moved[name] * x.numel() * x.element_size() for name, x in tensors.items() if x is not None)
        / gpu.bytes_a_second
    )
    binds = max(found, key=found.get)
    return found[binds], binds


def launches_of(shape, mode, dtype=torch.bfloat16, packed=False, capability=90):
    """Those of a call, without a norm."""
    images, heads, tokens, width = shape
    made = {"dtype": dtype, "device": "meta"}
    if packed:
        q, k, v = torch.empty(images, tokens, 3, heads, width, **made).permute(2, 0, 3, 1, 4)
    else:
        q, k, v = torch.empty(3, images, heads, tokens, width, **made)
    arguments = q, k, v, width**-0.5, None, None, torch.empty(heads, heads, device="meta"), None, False
    arguments = *arguments, None, None, 1e-5
    with _launch.recording(divmod(capability, 10)) as launches:
        if mode == "fwd":
            triton_kernels.reattention_fwd(*arguments, True, False)
        else:
            triton_kernels.reattention_bwd(q, None, *arguments, [True] * 3 + [False, True, False])
    return launches


def compiled(launches, capability):
    """(launch, what tests/aot.py finds of it) for each; each kind of kernel is compiled once."""
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for launch in launches:
            key = ("", capability, *aot.specialised(launch))
            if key not in found:
                found[key] = aot.compiled(launch.kernel, key, counts=True)
            yield launch, found[key]


def others(shape, itemsize, gpu):
    """Seconds of eager, compile and SDPA, by name and direction: passes over the maps, inputs and results."""
    images, heads, tokens, width = shape
    maps = images * heads * tokens * tokens * itemsize
    rows = images * heads * tokens * width * itemsize
    products = images * heads * tokens * tokens * width / (gpu.products * gpu.processors * gpu.clock)
    inputs = {"fwd": 4, "bwd": 7}
    found = {
        (name, mode): (passes * maps + inputs[mode] * rows) / gpu.bytes_a_second
        for name, modes in PASSES.items()
        for mode, passes in modes.items()
    }
    for mode, number in (("fwd", 2), ("bwd", 5)):
        found["sdpa", mode] = max(inputs[mode] * rows / gpu.bytes_a_second, number * products)
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="128x12x197x64", help="BxHxNxd, comma-separated")
    parser.add_argument("--gpu", choices=GPUS, default="H200")
    parser.add_argument("--packed", action="store_true", help="q, k and v as views of one projection")
    args = parser.parse_args()
    gpu = GPUS[args.gpu]
    for text in args.shapes.split(","):
        shape = tuple(map(int, text.split("x")))
        print(f"{text}, bfloat16, {args.gpu}, predicted ms")
        for mode in ("fwd", "bwd"):
            launches = launches_of(shape, mode, packed=args.packed, capability=gpu.capability)
            total = 0.0
            for launch, result in compiled(launches, gpu.capability):
                took, binds = seconds(launch, result, gpu)
                total += took
                warps = resident_warps(launch, result, gpu)
                print(
                    f"  {mode} {launch.kernel.__name__:14} {took * 1e3:.3f} by {binds}, {warps} warps, "
                    f"{issued(launch, result)} instructions a warp"
                )
            rivals = others(shape, 2, gpu)
            beside = ", ".join(
                f"{name} {rivals[name, mode] * 1e3:.2f}" for name in ("eager", "compile", "sdpa")
            )
            host = len(launches) * gpu.launch
            print(f"  {mode} total {total * 1e3:.2f}, host {host * 1e3:.2f}; {beside}")


if __name__ == "__main__":
    main()
