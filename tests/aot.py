"""Compiles the Triton kernels ahead of time, with no GPU, and tells what they need.

    python tests/aot.py pairwise_cosine

What is compiled is what a GPU would launch: tests/support/aot_<operation>.py calls the operators' functions
on meta tensors, and every launch is recorded, once for each compute capability. Needs TRITON_INTERPRET unset.

89 stands for the GPUs with little shared memory, 86 and 120 among them. Triton makes the same of a kernel for
80 and for 89: what both would launch is compiled for 80 alone, and may take the shared memory of 89.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import wait
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource

try:
    from triton._C.libtriton import native_specialize_impl
except ImportError:  # before Triton 3.6
    from triton.runtime.jit import create_specialize_impl

    _specialise = create_specialize_impl(CUDABackend.get_arg_specialization)

    def native_specialize_impl(_, value, is_const, by_value, by_alignment):
        return _specialise(value, is_const, by_value, by_alignment)


sys.path.append(str(Path(__file__).with_name("support")))
import sampling
import sass

from vitdiv_kernels.ops import _launch as _triton

BINARIES = sass.BINARIES
CAPABILITIES = 80, 89, 90, 100
# Loads of the branch for vectors far from 1, which hardly a call takes.
FEW_ONE_BY_ONE = {"_tiles_kernel": 16}
TENSOR_CORE = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
ONE_ELEMENT = re.compile(r"\b(?:ld|st)\.global(?:\.(?!v\d)[\w:]+)*\.[bu]16\b")


def shared_memory(capability):
    """Bytes of shared memory that a block may take on a GPU of this (major, minor)."""
    if capability in ((8, 6), (8, 9)) or capability[0] >= 12:
        return 101376
    return 166912 if capability[0] == 8 else 232448


def to_compile(operations, capabilities):
    """(launches by key, of each key the bytes of shared memory that it may take)."""
    launches, limits = {}, {}
    for capability in capabilities:
        limit = shared_memory(divmod(capability, 10))
        for key, launch in recorded(operations, capability).items():
            if capability == 89 and (same := (key[0], 80, *key[2:])) in launches:
                limits[same] = limit
            else:
                launches[key], limits[key] = launch, limit
    return launches, limits


def recorded(operations, capability):
    """The launches of all operations on a GPU of this capability (80, 90, ..), by key, each kind once."""
    launches = {}
    for operation in operations:
        module = importlib.import_module(f"aot_{operation}")
        with _triton.recording(divmod(capability, 10)) as found:
            module.calls()
        for launch in found:
            launches.setdefault((operation, capability, *specialised(launch)), launch)
    return launches


def in_turn(launches):
    """Of what several GPUs would launch alike the launch of one, of the first, the second, .. in turn."""
    alike = {}
    for key in launches:
        alike.setdefault((key[0], *key[2:]), []).append(key)
    chosen = [keys[i % len(keys)] for i, keys in enumerate(alike.values())]
    return {key: launches[key] for key in chosen}


def sample(launches):
    """Few of what `in_turn` chooses: of each kernel, whatever operations launch it, each GPU, each constant,
    all options, and of each argument each type and whether 16 divides it is in one."""
    of_kernel = {}
    for key, launch in in_turn(launches).items():
        of_kernel.setdefault((launch.kernel.__module__, key[2]), {})[key] = values_of(key)
    return {key: launches[key] for values in of_kernel.values() for key in sampling.covering(values)}


def values_of(key):
    """What a sample is to have of a launch."""
    _, capability, _, signature, constexprs, attributes, options = key
    aligned = {i for i, _ in attributes}
    return {
        ("GPU", capability),
        ("options", options),  # warps and registers together: they decide what spills
        *(("argument", *argument) for argument in signature),
        *(("aligned", i, i in aligned) for i, (_, kind) in enumerate(signature) if kind != "constexpr"),
        *(("constant", *constant) for constant in constexprs),
    }


def one_in(n, launches):
    """Every n-th launch of each kernel."""
    of_kernel = {}
    for key in launches:
        of_kernel.setdefault((key[0], key[2]), []).append(key)
    return {key: launches[key] for keys in of_kernel.values() for key in keys[::n]}


def specialised(launch):
    """What Triton's JIT would compile: (kernel's name, signature, constexprs, attributes, options)."""
    signature, constexprs, attributes = [], [], []
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            kind, key = "constexpr", None
        else:
            by_value = not parameter.do_not_specialize
            by_alignment = not parameter.do_not_specialize_on_alignment
            kind, key = native_specialize_impl(CUDABackend, value, parameter.is_const, by_value, by_alignment)
        signature.append((parameter.name, kind))
        if kind == "constexpr":
            constexprs.append((i, value))
        elif key:
            attributes.append((i, key))
    options = launch.num_warps, launch.num_stages, launch.maxnreg
    return launch.kernel.__name__, tuple(signature), tuple(constexprs), tuple(attributes), options


def compiled(kernel, key, counts=False):
    """Compile; what the cubin needs, and the tensor-core instructions of its PTX.

    With counts also "whole", the machine code's instructions (see sass.Code.counts), "usual", without what
    hardly a call takes, and "loops", those of each loop, the longest first, with its depth, its first and
    last instruction and the loop of the source that it was made of.

    Kernels have nothing on the stack but what is spilled. To disassemble a cubin and count the loads and
    stores of spills took as long as to compile it, and found no more in 200 of these kernels.
    """
    _, capability, _, signature, constexprs, attributes, (num_warps, num_stages, maxnreg) = key
    attributes = {(i,): CUDABackend.parse_attr(text) for i, text in attributes}
    constexprs = {(i,): value for i, value in constexprs}
    options = {"num_warps": num_warps, "num_stages": num_stages, **_triton.OPTIONS}
    if maxnreg:
        options["maxnreg"] = maxnreg
    source = ASTSource(kernel, dict(signature), constexprs, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [BINARIES / "cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    code = sass.disassembled(binary.asm["cubin"]) if counts else None
    counted = {
        "whole": dict(code.counts()),
        "usual": dict(code.counts(rare=False)),
        "loops": [dict(code.counts(loop, rare=False)) | loop._asdict() for loop in code.loops],
    } if code else {}  # fmt: skip
    return {
        "registers": registers,
        "stack": stack,
        "shared": binary.metadata.shared,
        "tensor_core": Counter(TENSOR_CORE.findall(binary.asm["ptx"])),
        "chained": most_chained(binary.asm["ttgir"]),
        "one element": len(ONE_ELEMENT.findall(binary.asm["ptx"])) if all_aligned(kernel, key) else 0,
    } | counted


def all_aligned(kernel, key):
    """Whether 16 divides the address of each 16-bit tensor, and each stride and size that loads depend on."""
    _, _, _, signature, _, attributes, _ = key
    aligned = {i for i, _ in attributes}
    for i, (parameter, (_, kind)) in enumerate(zip(kernel.params, signature, strict=True)):
        matters = kind in ("*fp16", "*bf16") or (kind in ("i32", "i64") and not parameter.do_not_specialize)
        if matters and i not in aligned and not parameter.do_not_specialize_on_alignment:
            return False
    return True


def most_chained(ttgir):
    """Of products of sm_100's tensor memory in one step of a loop: the most that add to one another.

    Triton 3.6 to 3.8 is known to make wrong code of two (its issue 10821, for sm_103).
    """
    chained, most = Counter(), 0
    for line in ttgir.splitlines():
        if re.search(r"\bscf\.(for|if|while|yield)\b|^\s*}", line):
            chained.clear()
            continue
        result, _, operation = line.strip().rpartition(" = ")
        names = re.findall(r"%[\w#]+", operation)
        if "ttng.tc_gen5_mma" in operation:
            accumulator = names[2]
            adds = "%false" not in operation.split(accumulator, 1)[1].split(":", 1)[0].split(",")[1]
            chained[accumulator] = 1 + chained[accumulator] * adds
            most = max(most, chained[accumulator])
        elif "ttng.tmem_store" in operation:
            chained[names[1]] = chained[names[0]]
        elif result:
            chained[result.split(",")[0].split(":")[0]] = max((chained[name] for name in names), default=0)
    return most


def _compile_in_child(launches, counts, pipe, inherited):
    for other in inherited:  # held open they would keep other children waiting for a parent that is gone
        other.close()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a crash prints the whole module
    while (key := pipe.recv()) is not None:
        start = time.monotonic()
        try:
            result = compiled(launches[key].kernel, key, counts)
        except Exception as error:
            while error.__cause__ is not None:  # what the compiler's front end wraps in the lines around it
                error = error.__cause__
            result = {"failure": f"{type(error).__name__}: {str(error).strip()[-300:]}"}
        pipe.send(result | {"seconds": time.monotonic() - start})


def compile_all(launches, jobs, counts=False):
    """(key, result) of each launch as it comes. An LLVM assertion ends a process; then another goes on."""
    waiting, running = list(launches), {}

    def start():
        ours, theirs = context.Pipe()
        process = context.Process(target=_compile_in_child, args=(launches, counts, theirs, [ours, *running]))
        process.start()
        theirs.close()
        go_on(ours, process)

    def go_on(pipe, process):
        pipe.send(waiting[-1] if waiting else None)
        if waiting:
            running[pipe] = process, waiting.pop()
        else:
            process.join()

    context = multiprocessing.get_context("fork")
    for _ in range(min(jobs, len(waiting))):
        start()
    while running:
        for pipe in wait(list(running)):
            process, key = running.pop(pipe)
            try:
                result = pipe.recv()
            except EOFError:
                process.join()
                yield key, {"failure": f"the compiler crashed, exit code {process.exitcode}", "seconds": 0.0}
                if waiting:
                    start()
            else:
                yield key, result
                go_on(pipe, process)


def faults(name, limit, result):
    """What must not be, in words."""
    if "failure" in result:
        return [result["failure"]]
    found = []
    if result["stack"]:
        found.append(f"spills: stack of {result['stack']} bytes a thread")
    if result["shared"] > limit:
        found.append(f"shared memory of {result['shared']} bytes, at most {limit}")
    if result["chained"] > 1:
        found.append(f"{result['chained']} tcgen05 products into one accumulator: fewer rows take mma.sync")
    if result["one element"] > FEW_ONE_BY_ONE.get(name, 0):
        found.append(f"{result['one element']} loads and stores of one 16-bit element at aligned addresses")
    return found


def described(key):
    """Operation, kernel, capability, warps x stages, and the arguments that tell variants apart."""
    operation, capability, name, signature, constexprs, attributes, (num_warps, num_stages, _) = key
    names = [argument for argument, _ in signature]
    constants = " ".join(f"{names[i]}={value}" for i, value in constexprs if value is not None)
    kinds = sorted({kind for _, kind in signature if kind.startswith("*")})
    scalars = [i for i, (_, kind) in enumerate(signature) if kind in ("i32", "i64")]
    aligned = sum(i in dict(attributes) for i in scalars)
    return {
        "operation": operation,
        "cc": capability,
        "kernel": name,
        "pointers": ",".join(kinds),
        "multiples of 16": f"{aligned}/{len(scalars)}",
        "warps": num_warps,
        "stages": num_stages,
        "constants": constants,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("operations", nargs="+", help="as in tests/support/aot_<operation>.py")
    default = ",".join(map(str, CAPABILITIES))
    parser.add_argument("--capabilities", default=default, help=f"comma-separated; default: {default}")
    parser.add_argument("--kernels", default="", help="only kernels whose name contains this")
    parser.add_argument(
        "--sample",
        action="store_true",
        help="few: of each kernel each GPU, type, alignment, option and constant",
    )
    parser.add_argument("--one-in", type=int, default=1, metavar="N", help="every N-th of each kernel's")
    parser.add_argument(
        "--counts", action="store_true", help="also the instructions of each loop of the machine code"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes; default: 2")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--lines", type=Path, help="append each row here, as JSON, when it is compiled")
    args = parser.parse_args()
    launches, limits = to_compile(args.operations, map(int, args.capabilities.split(",")))
    launches = {key: launch for key, launch in launches.items() if args.kernels in key[2]}
    if args.sample:
        launches = sample(launches)
    launches = one_in(args.one_in, launches)
    rows = []
    # Nothing from an earlier run, which another version of the compiler may have made.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for key, result in compile_all(launches, args.jobs, args.counts):
            rows.append(described(key) | result | {"faults": faults(key[2], limits[key], result)})
            if args.lines:
                with args.lines.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    rows.sort(key=lambda row: (row["operation"], row["kernel"], row["constants"], row["pointers"], row["cc"]))
    for row in rows:
        print(line_of(row))
    if args.json:
        args.json.write_text(json.dumps(rows))
    failed = sum(bool(row["faults"]) for row in rows)
    seconds = sum(row["seconds"] for row in rows)
    print(f"{len(rows)} kernels compiled in {seconds:.0f} s of one core, {failed} with faults")
    return 1 if failed else 0


def line_of(row):
    """The row of the table."""
    if "failure" in row:
        figures = "-"
    else:
        units = " ".join(f"{name}:{n}" for name, n in sorted(row["tensor_core"].items())) or "none"
        figures = f"{row['registers']:3} registers {row['shared'] / 1024:5.1f} KB  {units}"
        figures += f" chained:{row['chained']}" * (row["chained"] > 1)
        figures += f" one element:{row['one element']}" * (row["one element"] > 0)
    head = f"{row['kernel']:24} sm_{row['cc']:<3} {row['warps']}x{row['stages']} {figures:45}"
    tail = f"{row['pointers']} {row['multiples of 16']} {row['constants']} ({row['seconds']:.1f} s)"
    loops = [
        f"loop {loop['source'][1] or 'while'} of {loop['source'][0]}, depth {loop['depth']}: {in_words(loop)}"
        for loop in row.get("loops", [])
    ]
    if "whole" in row:
        loops.insert(0, f"whole: {in_words(row['whole'])}")
    return "\n    ".join([f"{head} {tail}", *loops, *(f"FAULT: {fault}" for fault in row["faults"])])


def in_words(counts):
    """The instructions of a loop, those that are not arithmetic by name."""
    others = ", ".join(
        f"{name} {n}" for name, n in counts.items() if name not in ("issued", *sass.Loop._fields)
    )
    return f"{counts['issued']} instructions ({others})"


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
