"""`make gpu-check`: on a machine with an NVIDIA GPU, build, test on it and measure, within nine minutes.

Installs nothing, needs no network: it uses the Python that runs it and what that has. Rows go to
benchmarks/results/<device>_<op>.csv, with a summary table beside them; to build/ if a test failed.
"""

import argparse
import csv
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 530
# Operation, providers, its share of the time that the tests leave.
BENCHMARKS = (
    ("reattention", "eager,compile,sdpa,reference,triton,triton-s1,triton-s2", 0.55),
    ("attn_diversity", "eager,compile,reference,triton", 0.2),
    ("pairwise_cosine", "eager,compile,closed,reference,triton", 0.2),
)
TESTED = ("gpu", "pairwise_cosine", "attn_diversity", "reattention", "determinism", "compile")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tests", action=argparse.BooleanOptionalAction, default=True, help="default: yes")
    add("--benchmarks", action=argparse.BooleanOptionalAction, default=True, help="default: yes")
    args = parser.parse_args()
    start = time.monotonic()
    if not torch.cuda.is_available():
        sys.exit("gpu-check needs an NVIDIA GPU, and torch sees no CUDA device here")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    os.environ.pop("TRITON_INTERPRET", None)
    built = run("setup.py", "build_ext", "--inplace") == 0
    run("-m", "vitdiv_kernels.info")
    green = built and (not args.tests or tests(limit=SECONDS / 2))
    if args.benchmarks:
        folder = ROOT / ("benchmarks/results" if green and args.tests else "build")
        measure(folder, start + SECONDS)
    print(f"{time.monotonic() - start:.0f} s; tests {'passed' if green else 'FAILED'}")
    return 0 if green else 1


def run(*arguments: str, timeout: float | None = None) -> int:
    """Exit status of this Python with these arguments, in the repository's root; 124 for a timeout."""
    print("$ python", *arguments, flush=True)
    try:
        return subprocess.run([sys.executable, *arguments], cwd=ROOT, timeout=timeout).returncode
    except subprocess.TimeoutExpired:
        print(f"not finished after {timeout:.0f} s")
        return 124


def tests(limit: float) -> bool:
    files = [f"tests/test_{name}.py" for name in TESTED]
    # most of the time goes to compiling kernels, which the processes share by Triton's cache
    parallel = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    return run("-m", "pytest", "-q", "-k", "triton-gpu or test_gpu", *parallel, *files, timeout=limit) == 0


def measure(folder: Path, deadline: float) -> None:
    device = re.sub(r"\W+", "_", torch.cuda.get_device_name().lower())
    folder.mkdir(exist_ok=True)
    left, rows = deadline - time.monotonic(), []
    for op, providers, share in BENCHMARKS:
        path = folder / f"{device}_{op}.csv"
        path.unlink(missing_ok=True)
        options = [
            "--device",
            "cuda",
            "--modes",
            "fwd,bwd,fwd+bwd",
            "--providers",
            providers,
            "--out",
            str(path),
        ]
        for suite, dtype, part in (("gpu", "bfloat16", 0.8), ("gpu-float16", "float16", 0.2)):
            budget = left * share * part
            # the last workload that a budget lets begin may take a while
            timeout = max(1.0, min(budget + 60, deadline - time.monotonic()))
            command = ["--suite", suite, "--dtype", dtype, "--budget", f"{budget:.0f}"]
            run(f"benchmarks/bench_{op}.py", *command, *options, timeout=timeout)
        if path.exists():
            with path.open(newline="") as file:
                rows += csv.DictReader(file)
    summary = summary_of(rows)
    (folder / f"{device}_summary.md").write_text(summary)
    print(summary)


def summary_of(rows: list[dict]) -> str:
    """A Markdown table of the Triton rows: speed over eager and compile, share of the floor, memory."""
    lines = [
        "| operation | shape, dtype | provider | mode | ms | × eager | × compile | of floor | MB (eager) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    same = ("op", "variant", "shape", "dtype", "mode")
    eager = {tuple(row[k] for k in same): row for row in rows if row["provider"] == "eager"}
    for row in rows:
        if not row["provider"].startswith("triton"):
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
