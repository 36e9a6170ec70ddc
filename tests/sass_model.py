"""Clocks of the CUDA kernels, predicted from their machine code. Needs no GPU.

    python tests/sass_model.py reattention
    python tests/sass_model.py reattention 12x197x32 --hot 10
    python tests/sass_model.py attention_gram --code build/a.cubin build/b.cubin

The operators' host code plans and launches as on a GPU; a launch is noted down instead of run. For each, the
warps of a block in the middle of the grid are followed through the machine code (support/sass_trace.py), and
as many blocks as fit a multiprocessor are timed together (support/sass_clock.py). Clocks are those of a
multiprocessor, for each pair (i, j) of a query and a key, all heads. That the last round of blocks may fill
only part of the GPU is not counted.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path += [str(Path(__file__).parent), str(Path(__file__).with_name("support"))]

import cubin
import numpy as np
import sass_clock
import sass_code
import sass_trace
import torch
from emulated_operators import emulator

from vitdiv_kernels import _native
from vitdiv_kernels._layout import accumulation_dtype

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


class Launch(NamedTuple):
    name: str  # mangled, without the unnamed namespace
    blocks: int
    threads: int
    shared: int  # bytes a block
    arguments: bytes

    @property
    def plain(self):
        return plain_name(self.name)


class Code(NamedTuple):
    kernel: sass_trace.Kernel
    registers: int


class Predicted(NamedTuple):
    clocks: float  # of a multiprocessor, of all blocks
    busy: dict  # clocks of each pipe, of the busiest scheduler's, or of the multiprocessor's
    executed: Counter  # instructions by name and width, of all blocks
    waits: Counter  # share of the warps' time, by the instruction that waited


def without_namespace(mangled):
    """A mangled name without the unnamed namespace, which compilers name each in their own way."""
    while found := re.search(r"(\d+)_GLOBAL__N_", mangled):
        # the digits may be the end of the number before them: "1" + "12_GLOBAL__N_1"
        mangled = mangled[: found.start()] + mangled[found.end(1) + int(found[1]) :]
    return mangled


def plain_name(name):
    found = re.match(r"_ZN6vitdiv4cuda(\d+)", name)
    return name[found.end() : found.end() + int(found[1])] if found else name


def recorded(call, capability):
    """The launches of a call of the package's operators over emulated kernels."""
    with emulator().configure(architecture=capability):
        return [Launch(without_namespace(name), *others) for name, *others in emulator().recorded(call)]


class Model:
    """Predicts launches of the kernels in cubins, or in a library; launches alike are followed once."""

    def __init__(self, files, capability=90):
        self.capability, self.gpu = capability, sass_clock.GPUS[capability]
        self.folder = tempfile.TemporaryDirectory()
        self.codes, self.known = {}, {}
        self.places = {}  # of a kernel: its cubin, its name there, its registers
        for file in map(Path, files):
            for each in self._cubins(file):
                usage = cubin.usage_of(each)
                self.places |= {
                    without_namespace(name): (each, name, found["registers"]) for name, found in usage.items()
                }

    def _cubins(self, file):
        if file.suffix != ".so":
            return [file]
        command = [cubin.cuobjdump(), "-xelf", f"sm_{self.capability}", file.resolve()]
        subprocess.run(command, cwd=self.folder.name, check=True, capture_output=True)
        return sorted(Path(self.folder.name).glob(f"*sm_{self.capability}*.cubin"))

    def code(self, name):
        if name not in self.codes:
            if name not in self.places:
                raise KeyError(f"no machine code of {name} for sm_{self.capability}")
            file, mangled, registers = self.places[name]
            self.codes[name] = Code(sass_trace.Kernel(sass_code.function(file, mangled)), registers)
        return self.codes[name]

    def predicted(self, launch):
        numbers = np.frombuffer(launch.arguments[: len(launch.arguments) // 8 * 8], np.uint64)
        alike = (
            np.where(numbers < 1 << 40, numbers, 0).tobytes(),
            launch.arguments[numbers.nbytes :],
        )  # no pointers
        key = launch.name, launch.blocks, launch.threads, launch.shared, alike
        if key not in self.known:
            self.known[key] = self._predicted(launch)
        return self.known[key]

    def _predicted(self, launch):
        kernel, registers = self.code(launch.name)
        warps = [
            kernel.warp(launch.arguments, self.capability, launch.blocks // 2, first, launch.threads)
            for first in range(0, launch.threads, sass_trace.LANES)
        ]
        at_once = sass_clock.blocks_at_once(self.gpu, registers, launch.shared, launch.threads)
        at_once = min(at_once, launch.blocks)
        found = sass_clock.clocks_of(kernel.code, [warps] * at_once, self.gpu)
        rounds = launch.blocks / at_once
        executed = Counter()
        for warp in warps:
            for at, *_ in warp:
                one = kernel.code[at]
                executed[one.short] += launch.blocks
                if one.short in _BY_WIDTH:
                    executed[f"{one.short}.{sass_code.width_of(one.name)}"] += launch.blocks
        total = sum(found.waits.values()) or 1
        waits = Counter(
            {
                f"{kernel.code[at].address:#x} {kernel.code[at].name}": clocks / total
                for at, clocks in found.waits.items()
            }
        )
        busy = {pipe: clocks * rounds for pipe, clocks in found.busy.items()}
        return Predicted(found.clocks * rounds, busy, executed, waits)


_BY_WIDTH = "LDS", "STS", "LDSM", "LDG", "STG", "LDGSTS", "LDC"


def reattention(images, shape, dtype, mode):
    """(direction, call) for a shape H x N x d."""
    call, (heads, tokens, width) = emulator(), shape
    q, k, v, dout = torch.empty(4, images, heads, tokens, width, dtype=dtype)
    mix = torch.zeros(heads, heads, dtype=accumulation_dtype(q))
    norm = (mix[0], mix[0]) if mode == "layer" else (None, None)
    shared = (q, k, v, width**-0.5, mix if mode == "pre_mix" else None, None, mix, None, False, *norm, 1e-5)
    needs = [True] * 3 + [mode == "pre_mix", True, mode == "layer"]
    yield "forward", lambda: call.reattention_fwd(*shared, True, False)
    yield "backward", lambda: call.reattention_bwd(dout, None, *shared, needs)


def attention_gram(images, shape, dtype, mode):
    call, (heads, tokens, width) = emulator(), shape
    q, k = torch.empty(2, images, heads, tokens, width, dtype=dtype)
    coupling = torch.zeros(images, heads, heads, dtype=accumulation_dtype(q))
    yield "forward", lambda: call.attention_gram_fwd(q, k, width**-0.5)
    yield "backward", lambda: call.attention_gram_bwd(coupling, q, k, width**-0.5)


def pairwise_cosine(images, shape, dtype, mode):
    """For a shape N x D."""
    call, x = emulator(), torch.empty(images, *shape, dtype=dtype)
    penalty = "abs" if mode == "none" else mode
    saved = call.pairwise_cosine_fwd(x, None, penalty)[1]
    sums = torch.zeros(images, dtype=accumulation_dtype(x))
    yield "forward", lambda: call.pairwise_cosine_fwd(x, None, penalty)
    yield "backward", lambda: call.pairwise_cosine_bwd(sums, x, None, saved, penalty)


def pairwise_rows(images, shape, dtype, mode):
    call, x = emulator(), torch.empty(images, *shape, dtype=dtype)
    rows, saved = call.pairwise_logsumexp_fwd(x, x, 10.0)
    yield "forward", lambda: call.pairwise_logsumexp_fwd(x, x, 10.0)
    yield "backward", lambda: call.pairwise_logsumexp_bwd(rows, rows, x, x, saved, 10.0)
    yield "nearest", lambda: call.pairwise_nearest(x, None)


def two_gram(images, shape, dtype, mode):
    call, (x, y) = emulator(), torch.empty(2, images, *shape, dtype=dtype)
    sums, saved = call.two_gram_fwd(x, y, "square")
    yield "forward", lambda: call.two_gram_fwd(x, y, "square")
    yield "backward", lambda: call.two_gram_bwd(sums, x, y, saved, "square", needs_dx=True)


MAPS, PAIRS = ("12x197x64", "6x197x64", "3x197x64", "12x197x32"), ("196x384", "196x768")
OPERATIONS = {
    "reattention": (reattention, MAPS),
    "attention_gram": (attention_gram, MAPS),
    "pairwise_cosine": (pairwise_cosine, PAIRS),
    "pairwise_rows": (pairwise_rows, PAIRS),
    "two_gram": (two_gram, PAIRS),
}


class Calls:
    """The directions of an operation for a shape; what they share is made without running a kernel."""

    def __init__(self, operation, images, shape, dtype=torch.bfloat16, mode="none", capability=90):
        self.capability = capability
        self.pairs = images * shape[-2] ** 2
        with emulator().configure(architecture=capability):
            found = []
            emulator().recorded(lambda: found.extend(OPERATIONS[operation][0](images, shape, dtype, mode)))
        self.calls = dict(found)

    def launches(self, direction):
        return recorded(self.calls[direction], self.capability)


def clocks_a_pair(model, calls, direction):
    return sum(model.predicted(launch).clocks for launch in calls.launches(direction)) / calls.pairs


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("operation", choices=OPERATIONS)
    add(
        "shapes",
        nargs="*",
        help="HxNxd of maps, NxD of vectors; default: those of the tables in docs/kernels",
    )
    add("--images", type=int, default=16)
    add("--dtype", choices=DTYPES, default="bfloat16")
    add("--mode", default="none", help="layer or pre_mix; of pairwise_cosine the penalty")
    add("--direction", help="default: all")
    add("--capability", type=int, choices=sass_clock.GPUS, default=90)
    add("--code", nargs="+", default=[_native.OPERATORS], help="cubins; default: the built library")
    add("--parts", action="store_true", help="show what each pipe takes, and loads and stores by their bits")
    add("--hot", type=int, default=0, metavar="N", help="show the instructions for which warps wait longest")
    args = parser.parse_args()
    model, rows = Model(args.code, args.capability), {}
    shapes = args.shapes or OPERATIONS[args.operation][1]
    for text in shapes:
        shape = tuple(map(int, text.split("x")))
        calls = Calls(args.operation, args.images, shape, DTYPES[args.dtype], args.mode, args.capability)
        for direction in calls.calls:
            if args.direction not in (None, direction):
                continue
            kernels = predictions(model, calls.launches(direction))
            for name, found in (("", [one for each in kernels.values() for one in each]), *kernels.items()):
                row = rows.setdefault((direction, name), dict.fromkeys(shapes, ""))
                row[text] = f"{sum(each.clocks for each in found) / calls.pairs:.2f}"
                if name and (args.parts or args.hot):
                    show(f"{text} {direction} {name}", found, calls.pairs, args.hot)
    print(f"| clocks a pair | {' | '.join(shapes)} |\n|{'---|' * (len(shapes) + 1)}")
    for (direction, name), row in rows.items():
        print(f"| {direction}{name and f': {name}'} | {' | '.join(row.values())} |")


def predictions(model, launches):
    """{kernel: [Predicted]}"""
    found = {}
    for launch in launches:
        found.setdefault(launch.plain, []).append(model.predicted(launch))
    return found


def show(title, found, pairs, hot):
    busy, executed = Counter(), Counter()
    for each in found:
        busy.update(each.busy)
        executed.update({name: n for name, n in each.executed.items() if "." in name})
    pipes = ", ".join(f"{pipe} {clocks / pairs:.2f}" for pipe, clocks in busy.most_common())
    widths = ", ".join(f"{name} {n / pairs:.3f}" for name, n in sorted(executed.items()))
    print(f"{title} x {len(found)}\n  clocks: {pipes}\n  instructions: {widths}", flush=True)
    for place, share in found[0].waits.most_common(hot):
        print(f"  {share:.1%} of the warps' time: {place}")


if __name__ == "__main__":
    main()
