"""Clocks of the CUDA kernels, predicted from their machine code. Needs no GPU.

    python tests/sass_model.py reattention
    python tests/sass_model.py reattention --heads 12 --width 32 --hot 10
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
import sass_clock
import sass_code
import sass_trace
import torch
from emulated_operators import emulator

ROOT = Path(__file__).resolve().parents[1]
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


def codes(files, capability):
    """{name: Code} of the kernels in cubins, or in a library that has them."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for file in map(Path, files):
            cubins = [file]
            if file.suffix == ".so":
                command = [cubin.cuobjdump(), "-xelf", f"sm_{capability}", file.resolve()]
                subprocess.run(command, cwd=folder, check=True, capture_output=True)
                cubins = sorted(Path(folder).glob(f"*sm_{capability}*.cubin"))
            for each in cubins:
                command = [cubin.cuobjdump(), "--dump-resource-usage", each]
                usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                registers = dict(re.findall(r"Function (\S+):\s+.*?REG:(\d+)", usage))
                for name, code in sass_code.functions(each).items():
                    found[without_namespace(name)] = code, int(registers[name])
    return found


class Model:
    """Predicts launches; what is launched alike is followed once."""

    def __init__(self, files, capability=90):
        self.capability, self.gpu = capability, sass_clock.GPUS[capability]
        self.codes, self.ready, self.known = codes(files, capability), {}, {}

    def code(self, name):
        if name not in self.ready:
            if name not in self.codes:
                raise KeyError(f"no machine code of {name} for sm_{self.capability}")
            code, registers = self.codes[name]
            self.ready[name] = Code(sass_trace.Kernel(code), registers)
        return self.ready[name]

    def predicted(self, launch):
        key = launch.name, launch.blocks, launch.threads, launch.shared
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
                    executed[f"{one.short}.{sass_clock.bits(one.name)}"] += launch.blocks
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


def reattention(images, heads, tokens, width, dtype, mode="none"):
    """(name, call) of each direction."""
    call = emulator()
    q, k, v, dout = torch.empty(4, images, heads, tokens, width, dtype=dtype)
    numbers = torch.float64 if dtype == torch.float64 else torch.float32
    mix = torch.randn(heads, heads, dtype=numbers)
    pre = mix if mode == "pre_mix" else None
    norm = (torch.ones(heads, dtype=numbers),) * 2 if mode == "layer" else (None, None)
    shared = (q, k, v, width**-0.5, pre, None, mix, None, False, *norm, 1e-5)
    needs = [True] * 3 + [mode == "pre_mix", True, mode == "layer"]
    yield "forward", lambda: call.reattention_fwd(*shared, True, False)
    yield "backward", lambda: call.reattention_bwd(dout, None, *shared, needs)


def attention_gram(images, heads, tokens, width, dtype, mode="none"):
    call = emulator()
    q, k = torch.empty(2, images, heads, tokens, width, dtype=dtype)
    coupling = torch.zeros(
        images, heads, heads, dtype=torch.float64 if dtype == torch.float64 else torch.float32
    )
    yield "forward", lambda: call.attention_gram_fwd(q, k, width**-0.5, None, None, 0.0)
    yield (
        "backward",
        lambda: call.attention_gram_bwd(coupling, q, k, width**-0.5, None, None, 0.0, [True] * 4),
    )


OPERATIONS = {"reattention": reattention, "attention_gram": attention_gram}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("operation", choices=OPERATIONS)
    add("--heads", type=int, nargs="+", default=[12, 6, 3])
    add("--tokens", type=int, default=197)
    add("--width", type=int, default=64)
    add("--images", type=int, default=16)
    add("--dtype", choices=DTYPES, default="bfloat16")
    add("--mode", choices=("none", "layer", "pre_mix"), default="none")
    add("--direction", choices=("forward", "backward"))
    add("--capability", type=int, choices=sass_clock.GPUS, default=90)
    add(
        "--code",
        nargs="+",
        default=[ROOT / "vitdiv_kernels/libvitdiv.so"],
        help="cubins, or the built library",
    )
    add("--hot", type=int, default=0, metavar="N", help="the instructions for which warps wait longest")
    args = parser.parse_args()
    model = Model(args.code, args.capability)
    for heads in args.heads:
        shape = args.images, heads, args.tokens, args.width
        calls = OPERATIONS[args.operation](*shape, DTYPES[args.dtype], args.mode)
        for direction, call in calls:
            if args.direction in (None, direction):
                show(f"{direction}, {heads} heads", recorded(call, args.capability), model, args)


def show(title, launches, model, args):
    pairs = args.images * args.tokens**2
    found = [(launch, model.predicted(launch)) for launch in launches]
    print(
        f"{title}: {sum(each.clocks for _, each in found) / pairs:.2f} clocks a pair, {len(found)} launches"
    )
    numbers = Counter(launch.name for launch in launches)
    for launch, each in {launch.name: (launch, each) for launch, each in found}.values():
        of_all = sum(other.clocks for one, other in found if one.name == launch.name) / each.clocks
        busy = ", ".join(
            f"{pipe} {clocks * of_all / pairs:.2f}"
            for pipe, clocks in sorted(each.busy.items(), key=lambda x: -x[1])
        )
        widths = ", ".join(
            f"{name} {count * of_all / pairs:.2f}"
            for name, count in sorted(each.executed.items())
            if "." in name
        )
        print(
            f"  {launch.plain} x {numbers[launch.name]}: {each.clocks * of_all / pairs:.2f}; {busy}; {widths}"
        )
        for place, share in each.waits.most_common(args.hot):
            print(f"    {share:.1%} {place}")


if __name__ == "__main__":
    main()
