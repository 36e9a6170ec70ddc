"""Compiles, on a machine without a GPU, the Triton kernels that the GPU tests and the benchmarks launch.

    python benchmarks/compile_cache.py --out build/triton_cache

The folder is a Triton cache of a few MB. On the machine with the GPU, once it has been copied there:

    python benchmarks/compile_cache.py --moved build/triton_cache
    TRITON_CACHE_DIR=$PWD/build/triton_cache make gpu-check

Triton takes a compiled kernel where the kernel's sources, every file of Triton's compiler, the version of its
ptxas, the options and the variables that change them are the same; paths, torch and the driver do not matter.
Triton's wheels for two versions of Python differ in one file of the compiler: where the other machine has
another Python, name the wheel of its Triton with --wheel. What does not fit is compiled there, as without a
cache. The C code that launches a kernel is always compiled there, in half a second for each list of types.
"""

import argparse
import functools
import hashlib
import importlib
import inspect
import json
import multiprocessing
import os
import sys
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / name) for name in (".", "tests", "tests/support")]

import fake_driver  # noqa: E402
import gpu_rows  # noqa: E402
import harness  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton import knobs  # noqa: E402

from vitdiv_kernels import _dispatch  # noqa: E402
from vitdiv_kernels.ops import _operators  # noqa: E402

Launch = tuple[str, str, str]  # module, kernel, specialization: see tests/support/fake_driver.py
EXTENSIONS = ".py", ".so"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="fill the cache in this folder; what it has is kept")
    where.add_argument("--moved", type=Path, help="only note in the cache that it now lies in this folder")
    add("--of", choices=SOURCES, action="append", help="the tests or a benchmark; default: all")
    add("--kernels", help="comma-separated names: these only")
    add("--capability", type=int, default=90, help="of the GPU; default: 90")
    add("--wheel", type=Path, help="of the Triton on the other machine, where its Python is another one")
    add("--jobs", type=int, default=os.cpu_count(), help="processes; default: as many as cores")
    args = parser.parse_args()
    start = time.monotonic()
    os.environ.pop("TRITON_INTERPRET", None)
    if args.moved:
        print(f"{len(move(args.moved))} kernels lie in {args.moved}")
        return 0
    launches = set().union(*(SOURCES[name](args.capability) for name in args.of or SOURCES))
    if args.kernels:
        launches = {launch for launch in launches if launch[1] in args.kernels.split(",")}
    failures = fill(args.out, launches, args.capability, args.jobs, args.wheel)
    kernels = move(args.out)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    spent = f"{size / 1e6:.1f} MB, {time.monotonic() - start:.0f} s"
    print(f"{len(kernels)} kernels in {args.out}, {len(launches)} of this call: {spent}")
    print(*failures, sep="\n", end="\n" if failures else "")
    return int(bool(failures))


def of_tests(capability: int) -> set[Launch]:
    """What the tests of `make gpu-check` launch."""
    import launch_recorder  # needs pytest, as --moved does not

    return set().union(*launch_recorder.record(capability).values())


def of_benchmark(op: str, capability: int) -> set[Launch]:
    """What the Triton providers launch for the rows that `make gpu-check` measures."""
    launches = set()
    fake_driver.install(capability)
    fake_driver.record(lambda *launch: launches.add(launch))
    for entry in gpu_rows.ENTRIES:
        if entry.op == op:
            run_on_meta_tensors(entry)
    knobs.runtime.jit_cache_hook = None
    return launches


def run_on_meta_tensors(entry: gpu_rows.Entry) -> None:
    """Forward alone, and forward and backward, of the Triton providers of a row."""
    missing, _dispatch.missing = _dispatch.missing, lambda *arguments, **options: None
    workload = gpu_rows.workload_of(entry)
    inputs = workload.inputs(torch.device("meta"), gpu_rows.DTYPES[entry.dtype])
    leaves = [x for x in inputs.values() if x.requires_grad]
    try:
        for name in entry.providers:
            if not name.startswith("triton"):
                continue
            try:
                operation = workload.providers[name]()
            except harness.Unavailable:
                continue
            with Launching():
                with torch.no_grad():
                    operation(**inputs)
                out = operation(**inputs)
                torch.autograd.grad(out, leaves, torch.empty_like(out), allow_unused=True)
    finally:
        _dispatch.missing = missing


class Launching(TorchDispatchMode):
    """The Triton operators' own functions on meta tensors, for which they have fake kernels otherwise."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace != _operators.NAMESPACES["triton"]:
            return operator(*args, **(kwargs or {}))
        name = operator._schema.name.rpartition("::")[2]
        beside = _operators.DECLARED[name][0].fakes["triton"].__module__.rpartition(".")[0]
        return getattr(importlib.import_module(f"{beside}.triton_kernels"), name)(*args)


SOURCES = {"tests": of_tests}
SOURCES |= {op: functools.partial(of_benchmark, op) for op in gpu_rows.BENCHMARKS}


def fill(folder: Path, launches: set[Launch], capability: int, jobs: int, wheel: Path | None) -> list[str]:
    """Compile what the cache does not have; a sentence of each kernel that does not compile."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"TRITON_CACHE_DIR": str(folder.resolve()), "TRITON_STORE_BINARY_ONLY": "1"}
    if wheel is not None:
        key = compiler_key(files_of(wheel), version_of(wheel))
        triton.runtime.cache.triton_key = lambda: key
    fake_driver.install(capability)
    context = multiprocessing.get_context("fork")
    bar, failures = harness.progress_bar(total=len(launches), desc="kernels"), []
    with ProcessPoolExecutor(jobs, context) as pool:
        for result in pool.map(compile_one, sorted(launches)):
            failures += [] if result is None else [result]
            bar.update()
    bar.close()
    return failures


def compile_one(launch: Launch) -> str | None:
    module, kernel, specialization = launch
    try:
        getattr(importlib.import_module(module), kernel).preload(specialization)
    except Exception as error:
        return f"{kernel}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def move(folder: Path) -> list[Path]:
    """The groups of files of a cache, which name them by absolute paths, brought to where they lie."""
    groups = sorted(folder.glob("*/__grp__*.json"))
    for group in groups:
        here = group.resolve().parent
        (here / group.name.removeprefix("__grp__")).with_suffix(".source").unlink(missing_ok=True)
        names = json.loads(group.read_text())["child_paths"]
        there = {name: str(here / name) for name in names if (here / name).exists()}
        group.write_text(json.dumps({"child_paths": there}))
    return groups


def compiler_key(files: dict[str, Callable[[], bytes]], version: str) -> str:
    """As `triton.runtime.cache.triton_key`, of the files of a Triton that is not imported."""
    digest = functools.cache(lambda name: hashlib.sha256(files[name]()).hexdigest())
    names = ["runtime/cache.py", *walk("compiler", files), *walk("backends", files)]
    names += ["_C/libtriton.so", *walk("language", files)]
    return version + "-".join(map(digest, names))


def walk(folder: str, files: dict) -> list[str]:
    """The files of the modules of a package, in the order of pkgutil.walk_packages."""
    found, seen = [], {"__init__"}
    depth = folder.count("/") + 1
    for entry in sorted({name.split("/")[depth] for name in files if name.startswith(folder + "/")}):
        package = f"{folder}/{entry}/__init__.py"
        name = inspect.getmodulename(entry) or (entry if package in files else "")
        if not name or "." in name or name in seen:
            continue
        seen.add(name)
        found += [package, *walk(f"{folder}/{entry}", files)] if package in files else [f"{folder}/{entry}"]
    return found


def files_of(wheel: Path) -> dict[str, Callable[[], bytes]]:
    archive = zipfile.ZipFile(wheel)
    names = [name for name in archive.namelist() if name.startswith("triton/") and name.endswith(EXTENSIONS)]
    if "triton/_C/libtriton.so" not in names:
        sys.exit(f"--wheel {wheel}: expected a wheel of Triton, found no triton/_C/libtriton.so in it")
    return {name.removeprefix("triton/"): functools.partial(archive.read, name) for name in names}


def version_of(wheel: Path) -> str:
    return wheel.name.split("-")[1]


if __name__ == "__main__":
    sys.exit(main())
