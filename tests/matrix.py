"""Builds and tests the package beside other releases of torch; compiles the kernels with others of Triton.

    python tests/matrix.py                                  # everything: many hours
    python tests/matrix.py --torch 2.8.0 --only build
    python tests/matrix.py --only tests --torch 2.8.0,2.14.1 --sample
    python tests/matrix.py --only tables --triton 3.9.0 --capabilities 90,100 --one-in 8

Each release of torch gets an environment of its own, in which `make build` builds a copy of this tree. Each
release of Triton is unpacked to a folder, and compiles beside the torch that runs this script. Packages come
from where pip finds them; for a release that pip's settings exclude set PIP_CONSTRAINT and the like.

Two tables grow as it goes, so that a run that is stopped keeps what it has: releases.csv has a row for each
release and check; releases_kernels.csv the kernels that another release of Triton compiles to something
clearly different: with a fault that the release has not for which the tables were chosen, or without one
that it has, or with registers that differ by 32 or more.
"""

import argparse
import csv
import datetime
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
RESULTS = ROOT / "benchmarks/results"
TORCH = "2.8.0", "2.11.0", "2.13.0", "2.14.1"
# The first is that for which the tables were chosen: the others are compared with it.
TRITON = "3.6.0", "3.4.0", "3.5.1", "3.7.1", "3.8.0", "3.9.0"
CAPABILITIES = "80", "89", "90", "100", "120"
CHECKS = "build", "tests", "tables"
# What releases change most: torch's compilers, the registration of operators, hooks; each kind of kernel.
SAMPLE = (
    *("operators", "func", "compile", "export", "pairwise_cosine", "reattention", "nn", "nn_hooks"),
    *("objective", "torch_defaults", "use_backend", "imports", "triton_checks", "triton_kinds"),
)
COLUMNS = (
    *("check", "torch", "triton", "python", "of", "passed", "failed", "skipped", "seconds"),
    *("commit", "date", "what_failed"),
)
CLEARLY = 32  # registers
KERNEL = "operation", "kernel", "cc", "pointers", "multiples of 16", "warps", "stages", "constants"
FIGURES = "registers", "stack", "failure"
KERNEL_COLUMNS = ("triton", "of", *KERNEL, *FIGURES, *(f"{name} with {TRITON[0]}" for name in FIGURES))
PRINT_VERSIONS = """
import importlib.util, platform, torch
triton = importlib.util.find_spec("triton") and __import__("triton").__version__
print(torch.__version__, triton, platform.python_version())
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--torch", type=names, default=TORCH, metavar="A,B", help=f"default: {','.join(TORCH)}")
    add("--triton", type=names, default=TRITON, metavar="A,B", help=f"default: {','.join(TRITON)}")
    add("--only", choices=CHECKS, help="default: all; tests build what --folder does not hold")
    add("--sample", action="store_true", help="of the tests some files, without what is emulated")
    add("--tests", type=names, metavar="A,B", help="only tests/*/test_A.py, tests/*/test_B.py")
    add("-k", default="", metavar="EXPRESSION", help="only tests that match, as pytest takes it")
    add("--capabilities", default=",".join(CAPABILITIES), help="of GPUs; default: all")
    add("--one-in", type=int, default=1, metavar="N", help="compile every N-th launch of each kernel")
    add("--jobs", type=int, default=os.cpu_count(), help="processes; default: one for each core")
    add("--prefix", type=shlex.split, default=[], metavar="CMD", help="before what takes long, as nice -n 19")
    add("--folder", type=Path, help="of environments and builds, kept; default: a temporary one")
    add("--results", type=Path, default=RESULTS, help="folder of the tables; default: benchmarks/results")
    args = parser.parse_args()
    unknown = [stem for stem in args.tests or () if not list(TESTS.glob(f"*/test_{stem}.py"))]
    if unknown:
        parser.error(f"--tests: there is no tests/*/test_{unknown[0]}.py")
    unknown = [capability for capability in names(args.capabilities) if capability not in CAPABILITIES]
    if unknown:
        parser.error(f"--capabilities must be of {', '.join(CAPABILITIES)}, got {unknown[0]}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()  # processes start in other folders
        folder.mkdir(parents=True, exist_ok=True)
        if args.only != "tables":
            for version in args.torch:
                with_torch(version, folder, args)
        if args.only in (None, "tables"):
            for version in args.triton:
                with_triton(version, folder, args)


def names(text):
    return tuple(text.split(","))


def copy_of_tree(folder):
    """The tracked files, as they are now. What was built there stays, and only what changed is compiled."""
    source = folder / "source"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.split("\0"):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    return source


def with_torch(version, folder, args):
    environment, tree = folder / f"torch-{version}", folder / f"source-{version}"
    if not (args.only == "tests" and tree.exists()):
        build(version, environment, tree, folder, args)
    if tree.exists() and args.only != "build":
        tests(environment / "bin/python", tree, folder, args)
    if not args.folder:
        shutil.rmtree(environment, ignore_errors=True)


def build(version, environment, tree, folder, args):
    """All releases in turn in one tree: the sources that know nothing of torch are compiled once."""
    source = copy_of_tree(folder)
    begin = time.monotonic()
    (environment / "stamps/package").unlink(missing_ok=True)
    command = ["make", "build", f"PYTHON={sys.executable}", f"VENV={environment}", f"TORCH=torch=={version}"]
    built = finished(args.prefix + command, source)
    if "No matching distribution found for torch==" in built.stdout:
        sys.exit(f"--torch {version}: pip finds no such release")
    row = {"check": "build", "torch": version, "of": "make build", **origin(), "skipped": 0}
    row |= {"passed": int(built.returncode == 0), "failed": int(built.returncode != 0)}
    shutil.rmtree(tree, ignore_errors=True)
    if built.returncode == 0:
        row |= versions(environment / "bin/python")
        shutil.copytree(source, tree, ignore=shutil.ignore_patterns("build"))
    else:
        (folder / f"build-{version}.log").write_text(built.stdout)
        row["what_failed"] = built.stdout.strip().splitlines()[-1][:200]
    update(args.results, row | {"seconds": round(time.monotonic() - begin)})


def finished(command, folder):
    """The process, with its errors in its output."""
    return subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def versions(python, environment=None):
    """Of torch, of the Triton beside it and of Python."""
    command = [python, "-c", PRINT_VERSIONS]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(zip(("torch", "triton", "python"), run.stdout.split(), strict=True))


def origin():
    commit, changed = (
        subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True).stdout.strip()
        for command in (
            ("rev-parse", "--short", "HEAD"),
            ("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results"),
        )
    )
    commit += "-dirty" * bool(changed)
    return {"commit": commit, "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat()}


def tests(python, tree, folder, args):
    """Runs file by file, and updates the row after each."""
    stems = args.tests or (SAMPLE if args.sample else sorted(p.stem[5:] for p in TESTS.glob("*/test_*.py")))
    chosen = " and ".join(filter(None, (args.k and f"({args.k})", args.sample and "not emulated")))
    of = "all files" if not (args.tests or args.sample) else f"{len(stems)} files: {' '.join(stems)}"
    row = {"check": "tests", **versions(python), "of": f"{of}; {chosen}" if chosen else of, **origin()}
    row |= {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0, "what_failed": ""}
    for done, stem in enumerate(stems, 1):
        report = folder / f"tests-{row['torch']}-{stem}.xml"
        report.unlink(missing_ok=True)
        files = [str(path.relative_to(tree)) for path in tree.glob(f"tests/*/test_{stem}.py")]
        command = [python, "-m", "pytest", "-q", *files, f"--junitxml={report}"]
        command += ["-k", chosen] if chosen else []
        command += [f"--numprocesses={args.jobs}", "--dist=worksteal"] if args.jobs > 1 else []
        begin = time.monotonic()
        run = finished(args.prefix + command, tree)
        report.with_suffix(".log").write_text(run.stdout)
        if run.returncode in (-signal.SIGTERM, -signal.SIGKILL):
            return  # stopped, not wrong: the row says until where
        row["seconds"] += round(time.monotonic() - begin)
        if report.exists():
            count(report, row)
        else:
            row["failed"] += 1
            fails(row, f"{stem}: ended with {run.returncode}")
        print(f"{row['torch']} {stem}: {run.stdout.strip().splitlines()[-1]}", flush=True)
        so_far = row["of"] if done == len(stems) else f"{row['of']}; until now {done}"
        update(args.results, row, replaced=row["of"], of=so_far)


def count(report, row):
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        state = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        row[state] += 1
        if state == "failed":
            fails(row, f"{case.get('classname').removeprefix('tests.')}::{case.get('name')}")


def fails(row, name):
    row["what_failed"] = "; ".join(filter(None, (row["what_failed"], name)))


def with_triton(version, folder, args):
    """Compiles the launches of all operations, and updates the row and the table of kernels as they come."""
    target = folder / f"triton-{version}"
    if not target.exists():
        command = ["install", "-q", "--no-deps", "--no-compile", "--target", target, f"triton=={version}"]
        fetched = finished([sys.executable, "-m", "pip", *command], folder)
        if fetched.returncode:
            shutil.rmtree(target, ignore_errors=True)
            sys.exit(f"--triton {version}: pip did not install it: {fetched.stdout.strip()[-300:]}")
    of = f"sm_{args.capabilities}"
    of += f"; every {args.one_in}th launch of each kernel" if args.one_in > 1 else ""
    lines = folder / f"tables-{version}-{args.capabilities}-{args.one_in}.jsonl"
    lines.unlink(missing_ok=True)
    operations = sorted(path.stem.removeprefix("aot_") for path in TESTS.glob("support/aot_*.py"))
    command = [sys.executable, TESTS / "aot.py", *operations, "--lines", lines, f"--jobs={args.jobs}"]
    command += [f"--one-in={args.one_in}", f"--capabilities={args.capabilities}"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (target, ROOT)))
    row = {"check": "tables", **versions(sys.executable, environment), **origin()}
    if row["triton"] != version:
        sys.exit(
            f"--triton {version}: Python imports {row['triton']}; name a release in full, or delete {target}"
        )
    with (folder / f"tables-{version}.log").open("w") as log:
        process = subprocess.Popen(args.prefix + command, env=environment, stdout=log, stderr=log)
    while True:
        try:
            ended = process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            ended = None
        rows = read(lines)
        row |= summary(rows)
        if ended not in (None, 0, 1):
            fails(row, f"aot.py ended with {ended}")
        so_far = of if ended is not None else f"{of}; until now {len(rows)}"
        update(args.results, row, replaced=of, of=so_far)
        if ended is not None:
            break
    chosen_for = folder / f"tables-{TRITON[0]}-{args.capabilities}-{args.one_in}.jsonl"
    if version != TRITON[0] and chosen_for.exists():
        update_kernels(args.results, version, of, rows, read(chosen_for))
    print(f"Triton {version}: {row['passed']} kernels compiled well, {row['failed']} did not", flush=True)
    if not args.folder:
        shutil.rmtree(target)


def read(lines):
    return [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []


def summary(rows):
    """Cells of the row: what fails is named by kernel."""
    failed = [row for row in rows if row["faults"]]
    kinds = sorted({f"{row['kernel']} sm_{row['cc']}: {one_line(row['faults'][0])}" for row in failed})
    return {
        "passed": len(rows) - len(failed),
        "failed": len(failed),
        "skipped": 0,
        "seconds": round(sum(row["seconds"] for row in rows)),
        "what_failed": "; ".join(kinds),
    }


def one_line(text):
    return " ".join(text.split())[:80]


def differences(rows, chosen_for):
    """The kernels that are clearly different, each with the figures of both releases."""
    earlier = {kernel: row for kernel, row in identified(chosen_for)}
    for kernel, row in identified(rows):
        if kernel not in earlier:
            continue
        before = earlier[kernel]
        registers = abs((row.get("registers") or 0) - (before.get("registers") or 0))
        if bool(row["faults"]) != bool(before["faults"]) or registers >= CLEARLY:
            cells = {name: row[name] for name in KERNEL} | {name: figure(row, name) for name in FIGURES}
            yield cells | {f"{name} with {TRITON[0]}": figure(before, name) for name in FIGURES}


def figure(row, name):
    return one_line(row[name]) if name == "failure" and name in row else row.get(name, "")


def identified(rows):
    """(what tells it apart, row); of launches that are described alike, by their order of compiling."""
    seen = {}
    for row in rows:
        description = tuple(row[name] for name in KERNEL)
        seen[description] = seen.get(description, 0) + 1
        yield (*description, seen[description]), row


def update_kernels(results, version, of, rows, chosen_for):
    found = [{"triton": version, "of": of} | row for row in differences(rows, chosen_for)]

    def changed(rows):
        kept = [row for row in rows if (row["triton"], row["of"]) != (version, of)]
        names = ("operation", "kernel", "cc", "constants")
        return sorted(kept + found, key=lambda row: (ordered(row["triton"]), *(str(row[n]) for n in names)))

    change(results / "releases_kernels.csv", KERNEL_COLUMNS, changed)


def update(results, row, replaced=None, of=None):
    """Write the row in place of that of the same check of the same release, whole or not finished."""
    replaced = replaced or row["of"]
    compared = "triton" if row["check"] == "tables" else "torch"

    def same(other):
        begins = other["of"] == replaced or other["of"].startswith(f"{replaced}; until now")
        release = [each[compared].partition("+")[0] for each in (row, other)]  # without +cpu, +cu130
        return begins and other["check"] == row["check"] and release[0] == release[1]

    def place(row):
        return CHECKS.index(row["check"]), ordered(row["torch"]), ordered(row["triton"])

    def changed(rows):
        return sorted([r for r in rows if not same(r)] + [row | {"of": of or row["of"]}], key=place)

    change(results / "releases.csv", COLUMNS, changed)


def ordered(version):
    return [int(part) for part in (version or "0").partition("+")[0].split(".")]


def change(path, columns, changed):
    """Several runs may write a table: a lock on its folder lets them take turns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        rows, new = changed(table(path)), path.with_suffix(".new")
        with new.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        new.replace(path)
    finally:
        os.close(folder)


def table(path):
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
