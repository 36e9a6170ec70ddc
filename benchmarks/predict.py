"""What the Triton kernels take on a GPU, predicted from their machine code. Needs no GPU.

    python benchmarks/predict.py --shapes 128x12x197x64 --gpu H200
    python benchmarks/predict.py --operation pairwise_cosine --shapes 256x196x384

Every launch of a call is recorded on meta tensors and compiled, its instructions are counted. A launch takes
the longest of: the issue of its instructions, its special functions, its shared memory, its products, and its
bytes at the speed of L2 and of the memory. Operations of torch take their bytes, or their products. It is a
floor for these kernels, beside which eager, torch.compile, SDPA and the closed forms are counted by their
bytes and products alone. No GPU has checked the constants yet.
"""

import argparse
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / name) for name in (".", "tests", "tests/support", "benchmarks")]

import aot  # noqa: E402
import predict_calls  # noqa: E402
import torch  # noqa: E402


class Gpu(NamedTuple):
    capability: int
    processors: int
    clock: float  # Hz, under load
    bytes_a_second: float  # of memory, of what a copy reaches
    of_l2: float  # bytes a clock and processor
    products: float  # multiply-adds a clock and processor of mma.sync in 16 bits
    of_warpgroups: float  # the same of wgmma, of mma.sync where there is none
    shared: int  # bytes of shared memory of a processor
    launch: float  # seconds of the host for a launch


# Data sheets of NVIDIA; memory at 0.85 of them, products of mma.sync at 0.62 and of wgmma at 0.95, as
# microbenchmarks find (Luo et al. 2024, arXiv:2402.13499). L2 as for the kernels in CUDA C++.
GPUS = {
    "H200": Gpu(90, 132, 1.755e9, 0.85 * 4.8e12, 24, 0.62 * 2048, 0.95 * 2048, 228 << 10, 5e-6),
    "A100": Gpu(80, 108, 1.41e9, 0.85 * 2.0e12, 24, 0.95 * 1024, 0.95 * 1024, 164 << 10, 5e-6),
}
REGISTERS, WARPS = 65536, 64  # of a processor
# Of an issue slot each clock that a warp takes on average: dependent instructions wait some 4 clocks, and in
# a tile many are independent. Not measured.
ISSUE_OF_A_WARP = 0.4
SCHEDULERS, MUFU_CLOCKS, SHARED_CLOCKS = 4, 8, {32: 1, 64: 2, 128: 4}  # of a warp's instruction


def passes(launch, loops):
    """Of each loop of the machine code, how often a program passes it, whenever it comes to it."""
    found = []
    for loop in loops:
        function, variable, _ = loop["source"]
        if function in aot.sass.RARE:
            found.append(0)
            continue
        count = predict_calls.LOOPS[function, variable](launch.arguments)
        # ptxas unrolls short loops and leaves one for the rest, with as many fewer loads
        alike = [other for other in loops if other["source"] == loop["source"]]
        fewest = min(other.get("global", 0) for other in alike) or 1
        unrolled = loop.get("global", 0) // fewest
        if unrolled > 1:
            count = count // unrolled
        elif (most := max(other.get("global", 0) for other in alike) // fewest) > 1:
            count = count % most
        found.append(count)
    return found


def issued(launch, result, kind="issued"):
    """Instructions of a warp of this launch."""
    loops = result["loops"]
    counts = passes(launch, loops)

    def inside(loop, other):
        return loop is not other and other["first"] <= loop["first"] and loop["last"] <= other["last"]

    def of(body, loop=None):
        """A body once, but the loops in it as often as they are passed."""
        nested = [
            (other, count)
            for other, count in zip(loops, counts, strict=True)
            if (loop is None or inside(other, loop))
            and not any(inside(other, mid) and (loop is None or inside(mid, loop)) for mid in loops)
        ]
        return body.get(kind, 0) + sum(
            count * of(other, other) - other.get(kind, 0) for other, count in nested
        )

    return of(result["usual"])


def resident_warps(launch, result, gpu):
    registers = -(-result["registers"] // 8) * 8 * 32 * launch.num_warps
    blocks = min(REGISTERS // registers, WARPS // launch.num_warps, gpu.shared // (result["shared"] + 1024))
    return blocks * launch.num_warps


def moved(launch):
    """Bytes (through memory, through L2)."""
    times = predict_calls.MOVED[launch.kernel.__name__](launch.arguments)
    tensors = [(launch.arguments.get(name), count) for name, count in times.items()]
    return [sum(n[i] * x.numel() * x.element_size() for x, n in tensors if x is not None) for i in (0, 1)]


def parts(launch, result, gpu):
    """Seconds of what a launch could wait for, by name."""
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
    clocks["products"] = warps * (
        issued(launch, result, "multiply-adds") / gpu.products
        + issued(launch, result, "of warpgroups") / gpu.of_warpgroups
    )
    of_memory, of_l2 = moved(launch)
    clocks["L2"] = of_l2 / gpu.of_l2
    found = {name: count / gpu.processors / gpu.clock for name, count in clocks.items()}
    return found | {"memory": of_memory / gpu.bytes_a_second}


def seconds(launch, result, gpu):
    """(seconds on the device, what binds)"""
    found = parts(launch, result, gpu)
    binds = max(found, key=found.get)
    return found[binds], binds


def of_torch(operation, gpu):
    """Seconds of (name, bytes, multiply-adds)."""
    _, bytes_moved, products = operation
    rate = gpu.of_warpgroups * gpu.processors * gpu.clock
    return max(bytes_moved / gpu.bytes_a_second, products / rate)


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


def report(operation, shape, gpu, dtype, penalty, packed):
    """Prints the launches of both directions, and the rivals."""
    rivals = predict_calls.rivals(operation, shape, dtype, gpu, penalty)
    for i, mode in enumerate(("fwd", "bwd")):
        launches, others = predict_calls.launches_of(
            operation, shape, mode, gpu.capability, dtype, penalty, packed
        )
        total = 0.0
        for launch, result in compiled(launches, gpu.capability):
            took, binds = seconds(launch, result, gpu)
            total += took
            found = parts(launch, result, gpu)
            beside = ", ".join(
                f"{name} {found[name] * 1e3:.3f}"
                for name in ("issue", "L2", "memory", "products", "shared memory")
                if name != binds
            )
            print(
                f"  {mode} {launch.kernel.__name__:22} {took * 1e3:.3f} by {binds} ({beside}), "
                f"{resident_warps(launch, result, gpu)} warps, {result['registers']} registers, "
                f"{issued(launch, result):.0f} instructions a warp"
            )
        of_others = sum(of_torch(other, gpu) for other in others)
        if others:
            print(f"  {mode} torch: {len(others)} operations, {of_others * 1e3:.3f}")
        total += of_others
        host = (len(launches) + len(others)) * gpu.launch
        beside = ", ".join(f"{name} {modes[i] * 1e3:.3f}" for name, modes in rivals.items())
        print(
            f"  {mode} total {total * 1e3:.3f}, {total / rivals['floor'][i]:.1f} times the floor, "
            f"host {host * 1e3:.2f}; {beside}"
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operation", choices=predict_calls.CALLS, default="reattention")
    parser.add_argument("--shapes", help="BxHxNxd of re-attention, else BxNxD, comma-separated")
    parser.add_argument("--gpu", choices=GPUS, default="H200")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32", "float64"), default="bfloat16")
    parser.add_argument("--penalty", default="", help="of pairs; of pairwise_rows the scale")
    parser.add_argument("--packed", action="store_true", help="q, k and v as views of one projection")
    args = parser.parse_args()
    default = "128x12x197x64" if args.operation == "reattention" else "256x196x384,64x1024x768"
    for text in (args.shapes or default).split(","):
        print(f"{args.operation}, {text}, {args.dtype}, {args.gpu}, predicted ms")
        shape = tuple(map(int, text.split("x")))
        report(args.operation, shape, GPUS[args.gpu], getattr(torch, args.dtype), args.penalty, args.packed)


if __name__ == "__main__":
    main()
