"""`make gpu-check`: on a machine with an NVIDIA GPU, build, test on it and measure, within nine minutes.

Installs nothing, needs no network: it uses the Python that runs it and what that has. Where there is an nvcc
it builds the CUDA kernels too, for the GPU that is here; tests them, and again under compute-sanitizer where
that is on PATH; and measures them if they passed. Rows go to benchmarks/results/<device>_<op>.csv, with a
summary table beside them; to build/ if a test failed.
"""

import argparse
import csv
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 530
# Operation, providers, its share of the time that the tests leave.
BENCHMARKS = (
    ("reattention", "eager,compile,sdpa,reference,native,triton,triton-s1,triton-s2", 0.55),
    ("attn_diversity", "eager,compile,reference,native,triton", 0.2),
    ("pairwise_cosine", "eager,compile,closed,reference,native,triton", 0.2),
)
# The longest that each may take, as a share of all time.
BUILD, TRITON_TESTS, NATIVE_TESTS, SANITIZERS = 0.25, 0.35, 0.15, 0.1
CHECKS = ("memcheck", "racecheck", "initcheck")
TESTED = (
    "gpu", "pairwise_cosine", "attn_diversity", "reattention", "triton_streaming", "triton_workspace",
    "determinism", "compile",
)  # fmt: skip
TRITON = "triton-gpu or triton_streaming or triton_workspace"
STATES = {True: "passed", False: "FAILED", None: "not finished"}  # slow is not wrong
NEEDED = {"tests": ("pytest", "hypothesis"), "benchmarks": ("tqdm",)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tests", action=argparse.BooleanOptionalAction, default=True, help="default: yes")
    add("--benchmarks", action=argparse.BooleanOptionalAction, default=True, help="default: yes")
    args = parser.parse_args()
    begin = time.monotonic()
    if not torch.cuda.is_available():
        sys.exit("gpu-check needs an NVIDIA GPU, and torch sees no CUDA device here")
    absent = [
        name
        for stage, names in NEEDED.items()
        if getattr(args, stage)
        for name in names
        if importlib.util.find_spec(name) is None
    ]
    if absent:
        sys.exit(f"gpu-check needs {', '.join(absent)}, which this Python does not have: pip install them")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    os.environ.pop("TRITON_INTERPRET", None)
    results = {"build": build()}
    run("-m", "vitdiv_kernels.info")
    native = native_operations()
    if args.tests:
        results["Triton tests"] = tests(TRITON, SECONDS * TRITON_TESTS)
        if native:
            results["CUDA tests"] = tests("native-cuda", SECONDS * NATIVE_TESTS)
            results |= sanitized(SECONDS * SANITIZERS)
    green = False not in results.values()
    if not results.get("CUDA tests", True):
        native = []  # a kernel that fails may stop a benchmark
    if args.benchmarks:
        folder = ROOT / ("benchmarks/results" if green and args.tests else "build")
        results |= measure(folder, begin + SECONDS, native)
    for name in dict.fromkeys(["build", "Triton tests", "CUDA tests", *results, "benchmarks"]):
        print(f"{name}: {STATES[results[name]] if name in results else 'not run'}")
    print(f"{time.monotonic() - begin:.0f} s")
    return int(False in results.values())


def build() -> bool:
    """In place; the CUDA kernels for the GPU that is here, unless TORCH_CUDA_ARCH_LIST says otherwise."""
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "{}.{}".format(*torch.cuda.get_device_capability()))
    if run("setup.py", "build_ext", "--inplace", timeout=SECONDS * BUILD) == 0:
        return True
    print("the CUDA kernels do not compile here: building without them")
    run("setup.py", "build_ext", "--inplace", VITDIV_CUDA="0")
    return False


def native_operations() -> list[str]:
    """The operations that have CUDA kernels here; asked in a process of its own, after the build."""
    ask = (
        "from vitdiv_kernels import _dispatch as d;"
        "print(*(o for o in d.OPERATIONS if d.missing('native', 'cuda', operation=o) is None))"
    )
    asked = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True)
    return asked.stdout.split()


def run(*arguments: str, timeout: float | None = None, **environment: str) -> int:
    """Exit status of this Python with these arguments, in the repository's root; 124 for a timeout."""
    print("$ python", *arguments, flush=True)
    return finish(start([sys.executable, *arguments], os.environ | environment), timeout)


def start(command: list[str], env: dict, output=None) -> subprocess.Popen:
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True)


def finish(process: subprocess.Popen, timeout: float | None) -> int:
    """Exit status; 124, and the end of the process and all that it started, after a timeout."""
    try:
        return process.wait(timeout)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        print(f"not finished after {timeout:.0f} s: {Path(process.args[-1]).name}")
        return 124


def tests(which: str, limit: float) -> bool:
    files = [f"tests/test_{name}.py" for name in TESTED]
    # most of the time goes to compiling kernels, which the processes share by Triton's cache
    parallel = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    return run("-m", "pytest", "-q", "-k", which, *parallel, *files, timeout=limit) == 0


def sanitized(limit: float) -> dict[str, bool | None]:
    """Whether each of CHECKS passes benchmarks/sanitize.py, None if it did not end; all at once, each with a
    log in build/.
    """
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not on PATH: left out")
        return {}
    # each tensor memory of its own, or the tools see one large block
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    script = [sys.executable, "benchmarks/sanitize.py"]
    logs = {check: ROOT / f"build/{check}.log" for check in CHECKS}
    running, results, end = {}, {}, time.monotonic() + limit
    for check, log in logs.items():
        command = [tool, "--tool", check, "--error-exitcode", "1", "--report-api-errors", "no", *script]
        print("$", *command, flush=True)
        with log.open("w") as file:
            running[check] = start(command, env, file)
    for check, process in running.items():
        status = finish(process, max(0.0, end - time.monotonic()))
        results[check] = None if status == 124 else status == 0
        print(f"{check}:", *logs[check].read_text().splitlines()[-1:])
        if status not in (0, 124):
            print(*logs[check].read_text().splitlines()[:40], sep="\n")
    return results


def providers_here(providers: str, op: str, native: list[str]) -> str:
    return ",".join(name for name in providers.split(",") if name != "native" or op in native)


def measure(folder: Path, deadline: float, native: list[str]) -> dict[str, bool | None]:
    """Whether no benchmark failed, and by name those that did not end. Rows are written as they are made."""
    device = re.sub(r"\W+", "_", torch.cuda.get_device_name().lower())
    folder.mkdir(exist_ok=True)
    left, rows, results = deadline - time.monotonic(), [], {"benchmarks": True}
    for op, providers, share in BENCHMARKS:
        path = folder / f"{device}_{op}.csv"
        path.unlink(missing_ok=True)
        options = [
            "--device",
            "cuda",
            "--modes",
            "fwd,bwd,fwd+bwd",
            "--providers",
            providers_here(providers, op, native),
            "--out",
            str(path),
        ]
        for suite, dtype, part in (("gpu", "bfloat16", 0.8), ("gpu-float16", "float16", 0.2)):
            budget = max(0.0, left * share * part)
            # the last workload that a budget lets begin may take a while
            timeout = max(1.0, min(budget + 60, deadline - time.monotonic()))
            command = ["--suite", suite, "--dtype", dtype, "--budget", f"{budget:.0f}"]
            status = run(f"benchmarks/bench_{op}.py", *command, *options, timeout=timeout)
            if status == 124:
                results[f"benchmark of {op}, {dtype}"] = None
            elif status != 0:
                results["benchmarks"] = False
        if path.exists():
            with path.open(newline="") as file:
                rows += csv.DictReader(file)
    summary = summary_of(rows)
    (folder / f"{device}_summary.md").write_text(summary)
    print(summary)
    return results


def summary_of(rows: list[dict]) -> str:
    """A Markdown table of the kernels' rows: speed over eager and compile, share of the floor, memory."""
    lines = [
        "| operation | shape, dtype | provider | mode | ms | × eager | × compile | of floor | MB (eager) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    same = ("op", "variant", "shape", "dtype", "mode")
    eager = {tuple(row[k] for k in same): row for row in rows if row["provider"] == "eager"}
    for row in rows:
        if not row["provider"].startswith(("native", "triton")):
            continue
        name = " ".join(filter(None, (row["op"], row["variant"])))
        plain = eager.get(tuple(row[k] for k in same), {})
        numbers = [_rounded(row[k]) for k in ("ms", "ratio_eager", "ratio_compile", "ratio_floor")]
        memory = f"{_rounded(row['peak_extra_mb'])} ({_rounded(plain.get('peak_extra_mb', ''))})"
        cells = [name, f"{row['shape']}, {row['dtype']}", row["provider"], row["mode"], *numbers, memory]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _rounded(text: str) -> str:
    return f"{float(text):.3g}" if text else "-"


if __name__ == "__main__":
    sys.exit(main())
