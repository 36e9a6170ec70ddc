"""The emulated CUDA kernels as programs: compiles csrc/cuda with the emulation in tests/cuda/emulation."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from multiprocessing.pool import ThreadPool

from places import ROOT, TESTS

EMULATION = TESTS / "cuda/emulation"
KERNELS = sorted((ROOT / "csrc/cuda").rglob("*.cu"))


def compiler():
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def build(*sources, name=None, shared=True, libraries=(), includes=(), headers=()):
    """Compile sources to a library or a program, once for each state of the sources.

    Of what has changed only the files whose preprocessed text has are compiled again. With `libraries` the
    emulation is in one of them. `headers` are included before each source.
    """
    # Plain -O2: g++ 12 at -O3 stores vectors to stack arrays that it has not aligned.
    options = [
        "-std=c++20",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Wno-clobbered",
        f"-I{EMULATION}",
        f"-I{ROOT / 'csrc/cuda'}",
    ]
    options += os.environ.get("VITDIV_EMULATION_FLAGS", "").split()
    options += [f"-isystem{include}" for include in includes]
    options += [f"-include{header}" for header in headers]
    options += ["-shared", "-fPIC"] if shared else []
    if not libraries:
        sources += (EMULATION / "emulation.cpp",)
    state = hashlib.sha256(" ".join(map(str, [compiler(), *options, *sources, *libraries])).encode())
    for path in sorted([*(ROOT / "csrc").rglob("*"), *EMULATION.rglob("*")]):
        if path.is_file():
            state.update(path.read_bytes())
    folder, name = ROOT / "build/emulation", name or sources[0].stem
    target = folder / f"{name}-{state.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as lock, tempfile.TemporaryDirectory(dir=folder) as unfinished:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests may run in several processes
        if not target.exists():
            for earlier in folder.glob(f"{name}-*"):
                earlier.unlink()
            with ThreadPool(os.cpu_count()) as pool:
                places = pool.starmap(
                    compiled, [(source, options, folder / "objects" / name) for source in sources]
                )
            compile_cleanly([*options, *places, *libraries, "-o", f"{unfinished}/{name}"])
            os.replace(f"{unfinished}/{name}", target)
    return target


def output_of(source):
    """The lines that a program of the emulation's folder prints, split at tabs."""
    program = build(EMULATION / source, shared=False)
    run = subprocess.run([str(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [line.split("\t") for line in run.stdout.splitlines()]


def compiled(source, options, folder):
    """The object file of a source, made once for each of its preprocessed texts."""
    text = compile_cleanly([*options, "-E", "-x", "c++", source])
    key = hashlib.sha256(" ".join(map(str, [compiler(), *options, text])).encode()).hexdigest()[:16]
    target = folder / f"{source.stem}-{key}.o"
    folder.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        for earlier in folder.glob(f"{source.stem}-*.o"):
            earlier.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            compile_cleanly([*options, "-c", "-x", "c++", source, "-o", f"{unfinished}/object"])
            os.replace(f"{unfinished}/object", target)
    return target


def compile_cleanly(arguments):
    """What the compiler prints to standard output; its errors and warnings are raised."""
    run = subprocess.run([compiler(), *map(str, arguments)], capture_output=True, text=True)
    if run.returncode != 0 or "warning" in run.stderr:
        raise RuntimeError(f"the emulated kernels do not compile cleanly:\n{run.stderr}")
    return run.stdout
