"""`make gpu-check` rehearsed without a GPU, in a small tree whose tests, build and tools do as is asked."""

import csv
import importlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import without_hypothesis
from places import ROOT

from vitdiv_kernels import _dispatch
from vitdiv_kernels.ops import _workspace

BENCHMARKS = ROOT / "benchmarks"
SETUP = """
import os, sys, time
print("compiling for", os.environ.get("TORCH_CUDA_ARCH_LIST"), flush=True)
if os.environ["FAKE"] == "slow build":
    time.sleep(60)
if os.environ["FAKE"] == "broken build" and os.environ.get("VITDIV_CUDA") != "0":
    sys.exit("nvcc: error: no such architecture")
"""
DISPATCH = """
import os
OPERATIONS = "two_gram", "reattention"
def missing(backend, device, operation):
    if os.environ["FAKE"] in ("no nvcc", "broken build"):
        return "the kernels were compiled for CPUs only: install the CUDA toolkit"
"""
TESTS = """
import os, sys, time
import pytest
import torch
FAKE = os.environ["FAKE"]

@pytest.mark.parametrize("backend", ["triton-gpu", "native-cuda"])
@pytest.mark.parametrize("case", range(4))
def test_it(case, backend):
    if case == 1 and FAKE == "slow":
        time.sleep(60)
    if case == 2 and FAKE == "failing" and "TRITON_PTXAS_PATH" not in os.environ:
        assert backend != "triton-gpu", "wrong by a half"
    if case == 3 and FAKE == "skips":
        pytest.skip("hypothesis is not installed")
    if case == 0 and FAKE == "illegal access":
        torch.lost = True
    assert not torch.lost
"""
TORCH = """
lost = False
class cuda:
    is_initialized = staticmethod(lambda: True)
    def synchronize():
        if lost:
            raise RuntimeError("an illegal memory access was encountered")
"""
ROWS = """
import json, os, sys, time
from pathlib import Path
FAKE = os.environ["FAKE"]
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
first, folder = int(options["--from"]), Path(options["--results"])
events = open(options["--events"], "a", buffering=1)
def tell(event, **more):
    print(json.dumps({"event": event, **more}), file=events)
names = ["headline", "gram", "last"][first:]
tell("entries", entries=dict(enumerate(names, first)))
for index, name in enumerate(names, first):
    tell("start", index=index, compiles=False)
    if name == "gram" and FAKE == "stuck":
        time.sleep(60)
    if name == "gram" and FAKE == "illegal access":
        sys.exit(75)
    if name == "last" and FAKE == "one too many":
        time.sleep(60)
    if index == 0:
        (folder / "rows.csv").write_text("op,variant,provider,mode,shape,dtype,ms\\n")
    with open(folder / "rows.csv", "a") as file:
        file.write(name + ",,triton,fwd,1x2,float32,0.5\\n")
    tell("rows", count=1)
    tell("finish", index=index)
"""
SANITIZER = """#!{python}
import os, sys, time
fake = os.environ["FAKE"]
if fake == "refused":
    sys.exit("========= Error: Target application terminated: Device not supported")
print("the device works", os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"], flush=True)
print("case 1 of 2: native two_gram", flush=True)
if fake == "out of bounds":
    print("========= Invalid __global__ read of size 4 bytes", flush=True)
    time.sleep(60)
print("========= ERROR SUMMARY: 0 errors")
"""


@pytest.fixture
def check(tmp_path, monkeypatch):
    """gpu_check for a tree in tmp_path/tree and an H200 that is not there."""
    tree = tmp_path / "tree"
    files = {
        "pytest.ini": "[pytest]\n",
        "conftest.py": "def pytest_addoption(parser): parser.addoption('--every-case', action='store_true')",
        "setup.py": SETUP,
        "torch.py": TORCH,
        "vitdiv_kernels/__init__.py": "",
        "vitdiv_kernels/_dispatch.py": DISPATCH,
        "vitdiv_kernels/info.py": "print('what runs where')",
        "tests/ops/test_two_gram.py": TESTS,
        "tests/ops/test_reattention.py": TESTS,
        "benchmarks/gpu_rows.py": ROWS,
        "bin/compute-sanitizer": SANITIZER.format(python=sys.executable),
        "bin/ptxas": "",
    }
    for name, text in files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in ("compute-sanitizer", "ptxas"):
        (tree / "bin" / name).chmod(0o755)
    for name in ("gpu_check.py", "stages.py", "suites.py", "rows.py", "report_events.py"):
        (tree / "benchmarks" / name).write_text((BENCHMARKS / name).read_text())
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    check, stages = importlib.import_module("gpu_check"), importlib.import_module("stages")
    suites = importlib.import_module("suites")
    monkeypatch.setattr(check, "ROOT", tree)
    monkeypatch.setattr(check, "TESTED", ("two_gram", "reattention"))
    monkeypatch.setattr(check, "END", 1.5)
    monkeypatch.setattr(check, "SHORTEST", 1.0)
    monkeypatch.setattr(stages, "GRACE", 1.0)
    monkeypatch.setattr(suites.Measurements, "ENTRY_SECONDS", 1.5)
    monkeypatch.setattr(check, "workers_here", list)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for name in ("PYTHONPATH", "TRITON_INTERPRET", "TORCH_CUDA_ARCH_LIST"):  # are as before afterwards
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they start twice as fast
    monkeypatch.setenv("PATH", f"{tree}/bin:{os.environ['PATH']}")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield check
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name in ("gpu_check", "stages", "suites", "rows", "report_events"):
        sys.modules.pop(name, None)


@pytest.fixture
def rehearse(check, tmp_path, monkeypatch, capsys):
    """Runs it with a fault and options; gives the exit status, what it said, and what is in the folder.

    The seconds are spent only where something hangs; a busy machine needs many.
    """

    def run(fake, *options, seconds=240):
        monkeypatch.setenv("FAKE", fake)
        folder = tmp_path / "results"
        argv = ["gpu_check.py", "--results", str(folder), "--seconds", str(seconds), *options]
        monkeypatch.setattr(sys, "argv", argv)
        status = check.main()
        kept = {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}
        return status, capsys.readouterr().out, kept

    return run


def states(summary):
    """By stage the line of the summary."""
    return dict(line[2:].split(": ", 1) for line in summary.splitlines() if line.startswith("- "))


def measured_entries(kept):
    return [line.split(",")[0] for line in kept["rows.csv"].splitlines()[1:]]


def test_all_is_well(rehearse):
    status, said, kept = rehearse("", "--tests", "--benchmarks")
    assert status == 0
    found = states(kept["summary.md"])
    assert found["build"].startswith("passed")
    assert found["Triton tests"] == found["CUDA tests"] == "passed: 8 of 8 passed"
    assert found["Triton tests, every case"] == "passed: 8 of 8 passed"
    assert found["memcheck"].startswith("passed: case 1 of 2")
    assert found["benchmarks"] == "passed: 3 rows"
    assert "compiling for 9.0" in kept["build.log"]
    assert "the device works 1" in kept["memcheck.log"]
    assert "what runs where" in kept["log.txt"]
    assert measured_entries(kept) == ["headline", "gram", "last"]
    assert "| gram | 1x2, float32 | triton | fwd | 0.5 |" in kept["summary.md"]
    runs = kept["tests.txt"].split("== ")[1:]
    assert [run.splitlines()[0] for run in runs] == ["Triton tests", "CUDA tests", "Triton tests, every case"]
    assert runs[0].count("passed    tests/ops/test_two_gram.py::test_it[0-triton-gpu]") == 1
    assert [run.count("--every-case") for run in kept["tests.log"].split("$ ")[1:]] == [0, 0, 1]
    assert kept["summary.md"].startswith("# NVIDIA H200\n")
    assert kept["log.txt"] in said
    assert len(kept) <= 11


@pytest.mark.parametrize(
    ("options", "ran"),
    [
        (["--tests"], ["build", "Triton tests", "CUDA tests", "memcheck", "Triton tests, every case"]),
        (["--no-tests"], ["benchmarks"]),
        (["--benchmarks"], ["benchmarks"]),
    ],
)
def test_the_phases_apart(rehearse, options, ran):
    """Rows and reports go to the same folder whatever runs."""
    _, _, kept = rehearse("", *options)
    assert list(states(kept["summary.md"])) == ran
    assert ("rows.csv" in kept) == ("benchmarks" in ran)
    assert ("tests.txt" in kept) == ("build" in ran)


@pytest.mark.parametrize(
    ("events", "status", "state", "said"),
    [
        ([], None, "not finished", "interrupted before it knew its tests"),
        ([("b.py", "failed")], None, "FAILED", "0 of 0 passed, 1 failed"),
        (["one", ("one", "passed")], 0, "passed", "1 of 1 passed"),
        (["one", ("one", "passed")], None, "passed", "1 of 1 passed"),
        (["one", ("one", "passed"), ("one", "failed")], 1, "FAILED", "0 of 1 passed, 1 failed"),
        (["one", "two", ("one", "failed")], None, "FAILED", "0 of 2 passed, 1 not finished, 1 failed"),
        (["one", ("one", "passed")], 3, "FAILED", "pytest ended with status 3: tests.log"),
        (["one", ("one", "skipped")], 0, "FAILED", "no test ran"),
        ([], 5, "FAILED", "no test was selected"),
    ],
)
def test_what_a_run_of_the_tests_means(check, tmp_path, events, status, state, said):
    tests = sys.modules["suites"].Tests("tests", check.Kept(tmp_path))
    names = [event for event in events if isinstance(event, str)]
    if names:
        tests.take({"event": "collected", "at": 0.5, "tests": names})
    for name, outcome in (event for event in events if not isinstance(event, str)):
        report = {"test": name, "outcome": outcome, "seconds": 0.1, "text": "", "worker": None}
        tests.take({"event": "report", "at": 1.0, **report})
    result = tests.result(status)
    assert (result.state, result.why[0]) == (state, said)


@pytest.mark.parametrize(
    "workers", [[], ["-p", "xdist", "-n", "2", "--dist", "worksteal"]], ids=["one process", "xdist"]
)
def test_a_slow_suite_is_not_finished(rehearse, check, monkeypatch, workers):
    if workers:
        pytest.importorskip("xdist")
    monkeypatch.setattr(check, "workers_here", lambda: workers)
    begin = time.monotonic()
    status, said, kept = rehearse("slow", "--tests", seconds=16 if workers else 12)
    assert time.monotonic() - begin < 60
    assert status == 0
    assert "FAILED" not in said
    found = states(kept["summary.md"])
    assert found["Triton tests"].startswith("not finished: ")
    running = next(line for line in kept["summary.md"].splitlines() if "running when" in line)
    assert "test_it[1-triton-gpu]" in running
    assert "started   tests/ops/test_two_gram.py::test_it[1-triton-gpu]" in kept["tests.txt"]
    assert "passed    tests/ops/test_two_gram.py::test_it[0-triton-gpu]" in kept["tests.txt"]


def test_a_failing_test(rehearse):
    """Its traceback is kept, and it runs again with the toolkit's ptxas."""
    status, said, kept = rehearse("failing", "--tests")
    assert status == 1
    found = states(kept["summary.md"])
    assert found["Triton tests"] == "FAILED: 6 of 8 passed, 2 failed"
    assert found["CUDA tests"] == "passed: 8 of 8 passed"
    assert found["Triton tests with the toolkit's ptxas"] == "passed: 2 of 2 passed"
    assert "wrong by a half" in kept["failures.txt"]
    name = "tests/ops/test_two_gram.py::test_it[2-triton-gpu]"
    assert f"Triton tests: FAILED {name}" in said
    assert f"  - failed: {name}, " in kept["summary.md"]


def test_skipped_tests_are_named(rehearse):
    status, _, kept = rehearse("skips", "--tests")
    assert status == 0
    skipped = "skipped, hypothesis is not installed: tests/ops/test_two_gram.py::test_it[3-triton-gpu]"
    assert skipped in kept["summary.md"]
    assert states(kept["summary.md"])["Triton tests"] == "passed: 6 of 8 passed"


def test_after_an_illegal_access_others_are_judged(rehearse, check, monkeypatch):
    """The worker whose GPU is lost ends, and so does a process of measurements: another goes on."""
    pytest.importorskip("xdist")
    monkeypatch.setattr(check, "workers_here", lambda: ["-p", "xdist", "-n", "1"])
    monkeypatch.setattr(check, "TESTED", ("two_gram",))
    status, _, kept = rehearse("illegal access", "--tests", "--benchmarks")
    assert status == 1
    assert states(kept["summary.md"])["Triton tests"] == "FAILED: 3 of 4 passed, 1 failed"
    assert measured_entries(kept) == ["headline", "last"]
    assert "failed: gram: the process ended with status 75" in kept["summary.md"]


def test_the_build(rehearse):
    status, _, kept = rehearse("broken build", "--tests")
    assert status == 1
    found = states(kept["summary.md"])
    assert found["build"] == "FAILED: built without CUDA"
    assert "nvcc: error: no such architecture" in kept["summary.md"]
    assert found["Triton tests"].startswith("passed")
    assert found["CUDA tests"] == "not run: the build is FAILED"


def test_a_slow_build_is_not_a_failure(rehearse):
    status, said, kept = rehearse("slow build", "--tests", seconds=7)
    assert status == 0
    found = states(kept["summary.md"])
    assert found["build"].startswith("not finished: still compiling")
    assert found["CUDA tests"] == "not run: the build is not finished"
    assert "do not compile" not in said


def test_build_tools_that_are_not_here(rehearse, check, monkeypatch):
    """Not a failure of the kernels; those that were compiled before are tested."""
    monkeypatch.setattr(check, "absent_build_tools", lambda: ["cmake is not installed"])
    status, _, kept = rehearse("", "--tests")
    assert status == 0
    found = states(kept["summary.md"])
    assert found["build"].startswith("not run: cmake is not installed; tested is what was compiled before")
    assert found["CUDA tests"] == "passed: 8 of 8 passed"
    _, _, kept = rehearse("no nvcc", "--tests")
    sentence = "the kernels were compiled for CPUs only: install the CUDA toolkit"
    assert states(kept["summary.md"])["CUDA tests"] == f"not run: {sentence}"


def test_each_build_tool_is_looked_for(check, monkeypatch):
    assert check.absent_build_tools() == []
    monkeypatch.setattr(check.shutil, "which", lambda name, path=None: None)
    monkeypatch.setattr(check, "version", lambda name: "70.3.0")
    assert check.absent_build_tools() == [
        "cmake is not installed",
        "ninja is not installed",
        "setuptools is 70.3.0, and the build needs 77 or newer",
    ]


def test_a_toolkit_that_is_not_on_path_is_found(check, monkeypatch, tmp_path):
    """Its nvcc may be on PATH, by another name or in a script, and the other tools not."""
    (tmp_path / "cuda/bin").mkdir(parents=True)
    for path in ("cuda/bin/nvcc", "cuda/bin/compute-sanitizer", "nvcc"):
        (tmp_path / path).write_text("#!/bin/sh")
        (tmp_path / path).chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("PATH", str(tmp_path))
    check.find_cuda_toolkit()
    assert check.shutil.which("nvcc") == str(tmp_path / "nvcc")
    assert check.shutil.which("compute-sanitizer") == str(tmp_path / "cuda/bin/compute-sanitizer")
    found = os.environ["PATH"]
    check.find_cuda_toolkit()
    assert os.environ["PATH"] == found


def test_without_nvcc(rehearse):
    status, _, kept = rehearse("no nvcc", "--tests")
    assert status == 0
    sentence = "the kernels were compiled for CPUs only: install the CUDA toolkit"
    assert states(kept["summary.md"])["CUDA tests"] == f"not run: {sentence}"


@pytest.mark.parametrize(
    ("fake", "state", "exit_status"),
    [
        ("refused", "not run: compute-sanitizer refuses this device", 0),
        ("out of bounds", "FAILED: 1 errors, the first at case 1 of 2: native two_gram", 1),
    ],
)
def test_memcheck(rehearse, fake, state, exit_status):
    status, _, kept = rehearse(fake, "--tests", **({"seconds": 12} if fake == "out of bounds" else {}))
    assert status == exit_status
    assert states(kept["summary.md"])["memcheck"] == state
    line = {"refused": "Device not supported", "out of bounds": "Invalid __global__ read"}[fake]
    assert line in kept["summary.md"]


@pytest.mark.parametrize(
    ("status", "log", "state"),
    [
        (0, "the device works\n===== ERROR SUMMARY: 0 errors\n", "passed"),
        (None, "the device works\ncase 3 of 9: x\n", "not finished"),
        (None, "the device works\n========= Invalid __shared__ write of size 2 bytes\n", "FAILED"),
        (1, "the device works\ncase 3 of 9: x\nTraceback\n", "FAILED"),
        (1, "Error: Device not supported\n", "not run"),
    ],
)
def test_what_memcheck_means(check, status, log, state):
    assert check.judged(status, log).state == state


def test_an_entry_that_hangs_costs_no_other(rehearse):
    status, _, kept = rehearse("stuck", "--benchmarks")
    assert status == 0
    assert states(kept["summary.md"])["benchmarks"] == "not finished: 2 rows"
    assert "not finished: gram" in kept["summary.md"]
    assert measured_entries(kept) == ["headline", "last"]


def test_rows_are_kept_when_the_time_is_spent(rehearse, check, monkeypatch):
    monkeypatch.setattr(sys.modules["suites"].Measurements, "ENTRY_SECONDS", 60)
    status, _, kept = rehearse("one too many", "--no-tests", seconds=4)
    assert status == 0
    assert "not finished: last" in kept["summary.md"]
    assert measured_entries(kept) == ["headline", "gram"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a full disk is /dev/full here, which Linux has")
def test_a_full_disk(rehearse, tmp_path):
    """What cannot be kept is told; nothing stops, and the exit status says that something is missing."""
    folder = tmp_path / "results"
    folder.mkdir()
    for name in ("tests.txt", "failures.txt", "tests.log"):
        (folder / name).symlink_to("/dev/full")
    status, said, kept = rehearse("failing", "--tests")
    assert status == 1
    assert "tests.txt cannot be written: No space left on device" in said
    assert "failures.txt: FAILED: No space left on device" in said
    assert "Triton tests: FAILED tests/ops/test_two_gram.py::test_it[2-triton-gpu]" in said
    assert states(kept["summary.md"])["CUDA tests"] == "passed: 8 of 8 passed"
    for name in ("tests.txt", "failures.txt", "tests.log"):
        (folder / name).unlink()
    (folder / ".probe").symlink_to("/dev/full")
    with pytest.raises(SystemExit, match="No space left on device; name a folder that can be written"):
        rehearse("", "--tests")


@pytest.mark.parametrize("absent", ["pytest", "xdist", "hypothesis"])
def test_packages_that_are_not_here(rehearse, check, monkeypatch, absent):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else find(name))
    status, said, kept = rehearse("", "--tests", "--benchmarks")
    assert status == 0
    assert f"{absent} is not installed: " in said
    found = states(kept["summary.md"])
    without = "not run: pytest is not installed"
    assert (
        found["Triton tests"] == without if absent == "pytest" else found["Triton tests"].startswith("passed")
    )
    assert found["benchmarks"] == "passed: 3 rows"


def test_tests_that_draw_their_cases_are_skipped_by_name(monkeypatch):
    for name in ("hypothesis", "hypothesis.strategies"):
        monkeypatch.setitem(sys.modules, name, None)
    without_hypothesis.install()
    from hypothesis import given, settings
    from hypothesis import strategies as st

    @settings(max_examples=3, deadline=None)
    @given(st.lists(st.integers(1, 3), max_size=2).map(tuple))
    def holds(drawn):
        raise AssertionError("it ran")

    with pytest.raises(pytest.skip.Exception, match="hypothesis is not installed"):
        holds()


def test_it_is_interrupted(check, tmp_path, monkeypatch):
    """As a process of its own, on its way through the tests, by a parent that ignores SIGINT."""
    folder, tree = tmp_path / "results", tmp_path / "tree"
    command = [sys.executable, "benchmarks/gpu_check.py", "--device", "cpu", "--results", str(folder)]
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")  # it takes xdist where that is installed
    script = tree / "benchmarks/gpu_check.py"
    text = script.read_text().replace("TESTED = (", 'TESTED = ("two_gram",)\nALL = (')
    text = text.replace('"triton-interpreter"', '"triton-gpu"')
    script.write_text(text)
    process = subprocess.Popen(
        command, cwd=tree, env=os.environ | {"FAKE": "slow"}, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    tests, slow = folder / "tests.txt", "started   tests/ops/test_two_gram.py::test_it[1-triton-gpu]"
    for _ in range(600):
        if tests.exists() and slow in tests.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    summary = (folder / "summary.md").read_text()
    assert summary in said
    found = states(summary)
    assert found["Triton tests"].startswith("not finished: ")
    assert slow.removeprefix("started   ") in summary
    assert found["CUDA tests"] == found["benchmarks"] == "not run: gpu-check was interrupted"
    assert "passed    tests/ops/test_two_gram.py::test_it[0-triton-gpu]" in tests.read_text()


def test_without_a_gpu_it_is_one_sentence(check, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        check.main()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--no-tests", "--no-benchmarks"], "together leave nothing to do"),
        (["--seconds", "2", "--tests"], "--seconds must be at least 3 for --tests, got 2"),
        (["--seconds", "5"], "--seconds must be at least 7 for --tests and --benchmarks, got 5"),
        (["--seconds", "0"], "at least 7 for --tests and --benchmarks, got 0"),
        (["--seconds", "nan"], "at least 7 for --tests and --benchmarks, got nan"),
    ],
)
def test_bad_options(check, monkeypatch, capsys, options, sentence):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *options])
    with pytest.raises(SystemExit):
        check.main()
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rows.csv", "micro.csv"])
def test_results_of_another_shape_are_refused_at_once(rehearse, tmp_path, name):
    """Not when they have been measured, and could not be added."""
    path = tmp_path / "results" / name
    path.parent.mkdir()
    path.write_text("op,ms,colour\nx,1,red\n")
    with pytest.raises(SystemExit, match=f"{name} has other columns than this version writes; name a new"):
        rehearse("", "--tests")
    assert path.read_text() == "op,ms,colour\nx,1,red\n"


def test_results_in_a_place_that_is_no_folder(rehearse, tmp_path):
    (tmp_path / "results").write_text("")
    with pytest.raises(SystemExit, match="File exists; name a folder that can be written"):
        rehearse("", "--tests")


def test_a_row_that_was_not_written_to_its_end(rehearse, check, tmp_path):
    """By a process that was killed, or on a full disk: it costs no other row, nor the summary."""
    folder, rows = tmp_path / "results", check.rows
    folder.mkdir()
    path = folder / "rows.csv"
    whole = {"op": "reattention", "provider": "triton", "mode": "fwd", "ms": 0.25}
    rows.append(path, [whole])
    path.write_text(path.read_text() + "reattention,,triton,fwd+b")
    rows.append(path, [whole | {"mode": "fwd+bwd"}])
    assert [row["mode"] for row in rows.read(path)] == ["fwd", "fwd+bwd"]
    status, _, kept = rehearse("", "--tests")
    assert status == 0
    assert kept["summary.md"].count("| triton |") == 2


def test_every_operation_is_tested_and_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    check = importlib.import_module("gpu_check")
    assert set(check.OPERATIONS) == set(_dispatch.OPERATIONS)
    assert set(check.OPERATIONS) <= set(check.TESTED)
    assert {"triton_products", "triton_workspace"} <= set(check.TESTED)
    for name in check.TESTED:
        assert len(list(ROOT.glob(f"tests/*/test_{name}.py"))) == 1
    for name in ("gpu_check", "stages", "suites"):
        sys.modules.pop(name, None)


@pytest.fixture
def gpu_rows(monkeypatch):
    """gpu_rows, with floors that take no time; its modules are imported by name, as a script's are."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("gpu_rows")
    monkeypatch.setattr(module, "copy_bytes_per_second", lambda device: 1e9)
    monkeypatch.setattr(module, "gemm_flops_per_second", lambda device, dtype: 1e9)
    yield module
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def measured(module, monkeypatch, folder, entries, *options):
    """Exit status, events and rows of a run of these entries on the CPU."""
    monkeypatch.setattr(module, "ENTRIES", entries)
    events = folder / "events"
    argv = f"gpu_rows.py --results {folder} --device cpu --repeats 1 --events {events}".split()
    monkeypatch.setattr(sys, "argv", [*argv, *options])
    status = module.main()
    rows = {}
    for name in ("rows.csv", "micro.csv"):
        if (folder / name).is_file():
            with (folder / name).open(newline="") as file:
                rows[name] = list(csv.DictReader(file))
    return status, [json.loads(line) for line in events.read_text().splitlines()], rows


def test_the_measurements(gpu_rows, monkeypatch, tmp_path, one_thread):
    entry = gpu_rows.Entry
    entries = (
        entry("reattention", (1, 2, 5, 8), {"packed": "yes"}, ("eager", "reference"), "float32"),
        entry("micro", (1, 2, 5, 8), {}, (), "float32"),
        entry("pairwise_cosine", (2, 6, 4), {}, ("eager", "closed"), "float32"),
        entry("attention_gram", (1, 2, 5, 8), {"function": "nonsense"}, ("eager",), "float32"),
        entry("attention_gram", (1, 2, 5, 8), {}, ("eager", "reference"), "float32"),
    )
    monkeypatch.setenv("VITDIV_COMMIT", "abc1234")
    status, events, rows = measured(gpu_rows, monkeypatch, tmp_path, entries)
    assert status == 1
    found = [(row["op"], row["variant"], row["mode"], row["provider"]) for row in rows["rows.csv"]]
    both = [(mode, provider) for mode in ("fwd", "fwd+bwd") for provider in ("eager", "reference")]
    assert found == [
        *(("reattention", "norm=none packed", *pair) for pair in both),
        *(("attention_gram", "gram", *pair) for pair in both),
    ]
    assert {row["commit"] for row in [*rows["rows.csv"], *rows["micro.csv"]]} == {"abc1234"}
    assert [row["section"] for row in rows["micro.csv"]] == ["ceiling"] * 2 + ["copy"] * 6 + ["product"] * 6
    assert all(float(row["ms"]) > 0 for row in rows["micro.csv"])
    kinds = [event["event"] for event in events if event["event"] != "rows"]
    pair = ["start", "finish"]
    assert kinds == [
        *("entries", *pair, *pair, "start", "absent", "finish", "start", "failed", "finish", *pair),
    ]
    assert "penalty abs has no closed form" in events[[e["event"] for e in events].index("absent")]["text"]
    assert "KeyError" in next(event["text"] for event in events if event["event"] == "failed")


def test_the_triton_providers_and_workspaces(gpu_rows, monkeypatch, tmp_path, one_thread):
    """In the interpreter, where the times mean nothing."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is not on here")
    monkeypatch.setattr(_dispatch, "_INTERPRETED", True)
    monkeypatch.setattr(gpu_rows.micro, "WORKSPACES", (1 << 20,))
    sections = {name: lambda *arguments: iter(()) for name in ("ceilings", "copies", "products")}
    for name, section in sections.items():
        monkeypatch.setattr(gpu_rows.micro, name, section)
    shape = (1, 2, 5, 8)
    entries = (
        gpu_rows.Entry("reattention", shape, {}, ("eager", "triton"), "float32"),
        gpu_rows.Entry("micro", shape, {}, (), "float32"),
    )
    before = _workspace.WORKSPACE_BYTES
    status, _, rows = measured(gpu_rows, monkeypatch, tmp_path, entries)
    assert status == 0
    assert [row["provider"] for row in rows["rows.csv"]] == ["eager", "triton"] * 2
    assert [row["case"] for row in rows["micro.csv"]] == ["1 MB, fwd", "1 MB, fwd+bwd"]
    assert before == _workspace.WORKSPACE_BYTES


def test_entries_that_are_left(gpu_rows, monkeypatch, tmp_path):
    entry = gpu_rows.Entry("attention_gram", (1, 2, 5, 8), {}, ("eager", "native"), "float32")
    status, events, rows = measured(
        gpu_rows, monkeypatch, tmp_path, (entry,) * 3, "--from", "1", "--seconds", "-1"
    )
    assert (status, rows) == (0, {})
    assert [list(event["entries"]) for event in events] == [["1", "2"]]
    (tmp_path / "events").unlink()
    _, events, _ = measured(gpu_rows, monkeypatch, tmp_path, (entry,), "--without", "native")
    assert events == [{"event": "entries", "entries": {}}]


@pytest.mark.parametrize("fault", ["full disk", "other columns"])
def test_rows_that_cannot_be_written_are_printed(gpu_rows, monkeypatch, tmp_path, capsys, one_thread, fault):
    if fault == "other columns":
        (tmp_path / "micro.csv").write_text("case,colour\n")
    elif os.path.exists("/dev/full"):
        (tmp_path / "micro.csv").symlink_to("/dev/full")
    else:
        pytest.skip("a full disk is /dev/full here, which Linux has")
    entries = (gpu_rows.Entry("micro", (1, 2, 5, 8), {}, (), "float32"),)
    status, _, _ = measured(gpu_rows, monkeypatch, tmp_path, entries)
    assert status == 1
    said = capsys.readouterr().out
    assert "micro.csv could not be written" in said
    assert '"case": "to packed"' in said


def test_the_first_entries_are_what_matters_most(gpu_rows):
    """Those of which the README speaks come before the rest, and no compilation before them."""
    first = [(entry.op, *entry.options.values()) for entry in gpu_rows.ENTRIES[:4]]
    assert first == [("reattention",), ("attention_gram",), ("pairwise_cosine",), ("reattention", "batch")]
    slow = [index for index, entry in enumerate(gpu_rows.ENTRIES) if "compile" in entry.providers]
    assert min(slow) >= 10
    assert all(set(entry.providers) <= {"eager", "sdpa", "triton"} for entry in gpu_rows.ENTRIES[:10])
    for entry in gpu_rows.ENTRIES:
        if entry.op != "micro":
            assert set(entry.providers) <= set(gpu_rows.workload_of(entry).providers)
