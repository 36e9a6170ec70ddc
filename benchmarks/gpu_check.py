"""`make gpu-check`: on a machine with an NVIDIA GPU, build, test on it and measure, in a given time.

Installs nothing, needs no network: it uses the Python that runs it and what that has. Where there is an nvcc
it builds the CUDA kernels too, for the GPU that is here. All rows, test reports and logs go to the folder
--results as they come, so that nothing is lost whatever stops it. What takes too long is interrupted and is
"not finished", which is not a failure. benchmarks/results/README.md says what it leaves.
"""

import argparse
import concurrent.futures
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import rows
import torch
from stages import GRACE, Ended, Kept, Stage
from suites import FAILED, NOT_FINISHED, NOT_RUN, PASSED, Measurements, Result, Tests

ROOT = Path(__file__).resolve().parents[1]
SECONDS = {"tests": 330.0, "benchmarks": 400.0}
END = GRACE + 3  # seconds for what is interrupted, and for the summary
OPERATIONS = tuple(
    sorted(path.parent.name for path in (ROOT / "vitdiv_kernels/ops").glob("*/*/api.py"))
)  # the package itself is imported after the build only
TESTED = (
    *("gpu", *OPERATIONS, "triton_products", "triton_workspace"),
    *("plain_formulas", "determinism", "compile", "cuda_host"),
)
# What pytest selects, the backend first, by device; on a CPU to rehearse.
TRITON = "triton-gpu or triton_products or triton_workspace or plain_formulas"
SELECTED = {
    "Triton tests": {"cuda": TRITON, "cpu": TRITON.replace("triton-gpu", "triton-interpreter")},
    "CUDA tests": {"cuda": "native-cuda", "cpu": "native-cpu"},
}
EVERY = "Triton tests, every case"
SELECTED[EVERY] = SELECTED["Triton tests"]
STAGES = {"tests": ("build", "Triton tests", "CUDA tests", "memcheck", EVERY), "benchmarks": ("benchmarks",)}
SHORTEST = 20.0  # seconds for which a run of tests is worth its start
ASK_SECONDS = 60.0  # for a process that only imports torch and looks at the device
FOUND = re.compile(r"^=+ +(Invalid|Misaligned|Out-of-range|Program hit|Race|Uninitialized).*", re.M)
ASK_NATIVE = (
    "import json, sys; from vitdiv_kernels import _dispatch as d;"
    "print(json.dumps({o: d.missing('native', sys.argv[1], operation=o) for o in d.OPERATIONS}))"
)


class Check:
    """One run of gpu-check: its folder, its results by stage, what interrupts it."""

    def __init__(self, device: str, folder: Path, stages: list[str]):
        self.device, self.kept, self.stages = device, Kept(folder), stages
        self.results: dict[str, Result] = {}
        self.native: dict[str, str | None] | None = (
            None  # by operation, why it has no kernel; None: not asked
        )
        self.stop, self.table = threading.Event(), ""
        self.begin = time.monotonic()

    def conclude(self, stage: str, state: str, *why: str) -> None:
        """Say how a stage ended, and keep the summary so far."""
        self.results[stage] = Result(state, why)
        self.kept.say("\n  ".join([f"{stage}: {state}" + (f": {why[0]}" if why else ""), *why[1:]]))
        self.kept.replace("summary.md", self.summary())

    def summary(self) -> str:
        lines = [f"# {device_name(self.device)}", ""]
        for stage in self.stages:
            state, why = self.results.get(stage, Result(NOT_RUN, ("not yet",)))
            lines.append(f"- {stage}: {state}" + (f": {why[0]}" if why else ""))
            lines += [f"  - {line}" for line in why[1:]]
        return "\n".join(lines) + "\n" + (f"\n{self.table}" if self.table else "")

    def interrupted(self, stage: str) -> bool:
        """Whether gpu-check was, before this stage began, which then is not run."""
        if self.stop.is_set():
            self.conclude(stage, NOT_RUN, "gpu-check was interrupted")
        return self.stop.is_set()

    def stage(self, log: str) -> Stage:
        return Stage(self.kept, log, self.stop, ROOT)

    def python(self, log: str, *arguments: str, until, take=None, **environment: str) -> Ended:
        self.kept.say("$ python " + " ".join(arguments))
        return self.stage(log).run([sys.executable, *arguments], until, take, **environment)

    def build(self, end: float) -> None:
        """In place; the CUDA kernels for the GPU that is here, unless TORCH_CUDA_ARCH_LIST says otherwise."""
        absent = absent_build_tools()
        if absent:
            self.ask_native()
            why = f"{', '.join(absent)}; tested is what was compiled before, if anything"
            self.conclude("build", NOT_RUN, why)
            return
        begin, command = time.monotonic(), ("setup.py", "build_ext", "--inplace")
        status, text = self.python("build.log", *command, until=lambda: end, **build_environment(self.device))
        took = f"in {time.monotonic() - begin:.0f} s"
        if status == 0:
            self.ask_native()
            absent = {why for why in self.native.values() if why is not None}
            self.conclude("build", PASSED, took, *(f"kernels that are not here: {why}" for why in absent))
        elif status is None:
            self.conclude("build", NOT_FINISHED, f"still compiling when it was interrupted, {took}")
        else:
            self.kept.say("the kernels do not compile here: building without those for CUDA")
            again = self.python("build.log", *command, until=lambda: end, VITDIV_CUDA="0")
            without = {0: "built without CUDA", None: "the build without CUDA was not finished"}
            last = text.splitlines()[-15:]
            self.conclude("build", FAILED, without.get(again.status, "without CUDA, too"), *last)

    def ask_native(self) -> None:
        """In a process of its own, after the build."""
        end, command = time.monotonic() + ASK_SECONDS, [sys.executable, "-c", ASK_NATIVE, self.device]
        _, text = self.stage("build.log").run(command, lambda: end)
        answers = [line for line in text.splitlines() if line.startswith("{")]
        cannot = dict.fromkeys(OPERATIONS, f"importing them fails: {text[-300:]}")
        self.native = json.loads(answers[-1]) if answers else cannot

    def why_no_native(self) -> str | None:
        """Why there is no compiled kernel of any operation."""
        if self.native is None:
            return f"the build is {self.results.get('build', Result(NOT_RUN)).state}"
        absent = [why for why in self.native.values() if why is not None]
        return absent[0] if len(absent) == len(self.native) else None

    def suite(self, name: str, until, select: list[str] | None = None, **environment: str) -> Tests:
        """Run the tests of this name, or those that `select` lists."""
        tests = Tests(name, self.kept)
        if self.interrupted(name):
            return tests
        if importlib.util.find_spec("pytest") is None:
            self.conclude(name, NOT_RUN, "pytest is not installed")
            return tests
        workers = workers_here()
        if workers:
            # which share the cores: torch, and its compiler, would start a thread for each core in each
            environment |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        if select is None:
            environment["VITDIV_TEST_BACKENDS"] = SELECTED[name][self.device].split(" or ")[0]
            files = [path for test in TESTED for path in ROOT.glob(f"tests/*/test_{test}.py")]
            every = ["--every-case"] if name == EVERY else []
            files = [str(path.relative_to(ROOT)) for path in files]
            select = [*every, "-k", SELECTED[name][self.device], *files]
        status, text = self.python(
            "tests.log", "-m", "pytest", "-q", "-p", "report_events", "--report-events", Stage.EVENTS,
            "-p", "no:cacheprovider", "--continue-on-collection-errors", "-o", "faulthandler_timeout=100",
            *workers, *select, until=until, take=tests.take, **environment,
        )  # fmt: skip
        state, why = tests.result(status)
        said = text.splitlines()[-15:] if state == FAILED and not tests.failed() else []
        self.conclude(name, state, *why, *said)
        return tests

    def with_other_ptxas(self, failed: list[str], end: float) -> None:
        """The Triton tests that failed, again with the ptxas of the CUDA toolkit: that of CUDA 12.8, which
        Triton 3.6 brings, was reported to compile a kernel with wgmma wrongly.
        """
        ptxas, name = shutil.which("ptxas"), "Triton tests with the toolkit's ptxas"
        left = end - time.monotonic()
        if failed and ptxas is not None and left > SHORTEST and not self.stop.is_set():
            self.stages.append(name)
            select = ["--every-case", *failed[:40]]  # those that are named, not a sample of them
            self.suite(name, lambda: end, select, TRITON_PTXAS_PATH=ptxas)

    def memcheck(self, end: float) -> None:
        """The kernels of both families under compute-sanitizer's memcheck. Each tensor has memory of its own:
        else the tool would see one large block."""
        if self.interrupted("memcheck"):
            return
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            self.conclude("memcheck", NOT_RUN, "compute-sanitizer is not on PATH")
            return
        script = [sys.executable, "benchmarks/sanitize.py", "--device", self.device]
        options = ["--tool", "memcheck", "--error-exitcode", "1", "--report-api-errors", "no"]
        ended = self.stage("memcheck.log").run(
            [tool, *options, *script], lambda: end, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
        )
        state, why = judged(*ended)
        self.conclude("memcheck", state, *why)

    def tests(self, begin: float, seconds: float) -> None:
        """The build and memcheck beside the Triton tests, which mostly compile; then the CUDA tests.

        In the time that is left every case of the Triton tests, which compile three times as many kernels.
        """
        end, built = begin + seconds, threading.Event()

        def build_and_memcheck():
            try:
                self.build(begin + 0.6 * seconds)
                if not self.stop.is_set():
                    _, text = self.python("build.log", "-m", "vitdiv_kernels.info", until=lambda: end)
                    self.kept.say(text)
            finally:
                built.set()
            self.memcheck(end)

        def triton_until():
            cuda_tests_follow = not built.is_set() or self.why_no_native() is None
            return end - min(60.0, 0.2 * seconds) * cuda_tests_follow

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            beside = pool.submit(build_and_memcheck)
            try:
                triton = self.suite("Triton tests", triton_until)
                while not built.wait(0.2):
                    pass
                why_not = self.why_no_native()
                if why_not is None or self.stop.is_set():
                    self.suite("CUDA tests", lambda: end)
                else:
                    self.conclude("CUDA tests", NOT_RUN, why_not)
                self.with_other_ptxas(triton.failed(), end)
                if end - time.monotonic() > SHORTEST:
                    self.suite(EVERY, lambda: end)
                else:
                    self.conclude(EVERY, NOT_RUN, "no time was left")
                beside.result()
            except BaseException:
                self.stop.set()
                raise

    def benchmarks(self, end: float) -> None:
        if self.interrupted("benchmarks"):
            return
        measured = Measurements(self.kept)
        # a kernel that fails its tests may stop a benchmark
        failed = self.results.get("CUDA tests", Result(PASSED)).state == FAILED
        without = ["--without", "native"] if failed else []
        if failed:
            measured.absent.append("all entries of native: the CUDA tests failed")
        first, status, text, events = 0, None, "no time was left", ("--events", Stage.EVENTS)
        while first is not None and (left := end - time.monotonic()) > 0 and not self.stop.is_set():
            where = "--device", self.device, "--results", str(self.kept.folder), *events
            status, text = self.python(
                "benchmarks.log", "benchmarks/gpu_rows.py", *where, "--seconds", f"{left:.0f}",
                "--from", str(first), *without, until=lambda: measured.until(end), take=measured.take,
            )  # fmt: skip
            first = measured.next_after(status)
        state, why = measured.result()
        if not measured.rows and state == PASSED:
            state = FAILED if status else NOT_RUN
            why = (f"no row; the process ended with status {status}", *why[1:], *text.splitlines()[-15:])
        self.conclude("benchmarks", state, *why)


def judged(status: int | None, log: str) -> Result:
    """What memcheck's status and output mean. None: it was interrupted."""
    found = [match.group(0) for match in FOUND.finditer(log)]
    cases = [line for line in log.splitlines() if line.startswith("case ")]
    last = cases[-1:] or ["no case began"]
    if found:
        return Result(FAILED, (f"{len(found)} errors, the first at {last[0]}", *dict.fromkeys(found)))
    if status is None:
        return Result(NOT_FINISHED, (f"reached {last[0]}",))
    if status == 0:
        return Result(PASSED, tuple(log.splitlines()[-2:]))
    if "the device works" not in log:
        said = [line for line in log.splitlines() if "rror" in line or "not supported" in line]
        return Result(NOT_RUN, ("compute-sanitizer refuses this device", *said[:5]))
    return Result(FAILED, (f"ended with status {status} at {last[0]}", *log.splitlines()[-15:]))


def workers_here() -> list[str]:
    """Options for a worker a core: most of the time goes to compiling, which they share by Triton's cache."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(min(16, os.cpu_count() or 1)), "--dist", "worksteal"]


def absent_packages() -> list[str]:
    without = {
        "pytest": "no tests run",
        "xdist": "the tests run one after the other, in one process",
        "hypothesis": "the tests that need it are skipped, and named in tests.txt",
    }
    return [
        f"{name} is not installed: {what}"
        for name, what in without.items()
        if importlib.util.find_spec(name) is None
    ]


def absent_build_tools() -> list[str]:
    """What setup.py needs and is not here; of a compiler, of nvcc and of Python.h it speaks itself."""
    here = sysconfig.get_path("scripts")
    absent = [
        f"{name} is not installed"
        for name in ("cmake", "ninja")
        if shutil.which(name, path=here) is None and shutil.which(name) is None
    ]
    try:
        found = version("setuptools")
        if int(found.split(".")[0]) < 77:
            absent.append(f"setuptools is {found}, and the build needs 77 or newer")
    except PackageNotFoundError:
        absent.append("setuptools is not installed")
    return absent


def find_cuda_toolkit() -> None:
    """Put its folder at the end of PATH: images have it in the usual place, and on PATH not all of its tools,
    or none."""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(place) / "bin" for place in places if place]
    found = [str(folder) for folder in folders if (folder / "nvcc").is_file()][:1]
    path = os.environ.get("PATH", "").split(os.pathsep)
    os.environ["PATH"] = os.pathsep.join(path + [folder for folder in found if folder not in path])


def why_no_device(device: str) -> str | None:
    if device == "cuda" and not torch.cuda.is_available():
        return "gpu-check needs an NVIDIA GPU, and torch sees no CUDA device here"
    return None


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def build_environment(device: str) -> dict[str, str]:
    if device != "cuda":
        return {"VITDIV_CUDA": "0"}
    architecture = "{}.{}".format(*torch.cuda.get_device_capability())
    return {"TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", architecture)}


def summary_of_file(path: Path) -> str:
    return summary_of(rows.read(path)) if path.is_file() else ""


def summary_of(measured: list[dict]) -> str:
    """A Markdown table of the kernels' rows: speed over eager and compile, share of the floor, memory.

    What was measured twice has the later numbers, and ratio_compile from where it was measured.
    """
    titles = (
        *("operation", "shape, dtype", "provider", "mode", "ms", "device ms", "wall ms"),
        *("× eager", "× compile", "of floor", "MB (eager)"),
    )
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    same = ("op", "variant", "shape", "dtype", "mode")
    merged = {}
    for row in measured:
        key = tuple(row[k] for k in (*same, "provider"))
        merged[key] = merged.get(key, {}) | {name: cell for name, cell in row.items() if cell}
    eager = {key[:-1]: row for key, row in merged.items() if key[-1] == "eager"}
    for key, row in merged.items():
        if not key[-1].startswith(("native", "triton")):
            continue
        name = " ".join(filter(None, (row.get("op"), row.get("variant"))))
        of = ", ".join(filter(None, (row.get("shape"), row.get("dtype"))))
        names = ("ms", "device_ms", "wall_ms", "ratio_eager", "ratio_compile", "ratio_floor")
        numbers = [_rounded(row.get(k)) for k in names]
        plain = eager.get(key[:-1], {})
        memory = f"{_rounded(row.get('peak_extra_mb'))} ({_rounded(plain.get('peak_extra_mb'))})"
        cells = [name, of, *key[-2:][::-1], *numbers, memory]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _rounded(text: str | None) -> str:
    return f"{float(text):.3g}" if text else "-"


def asked(args: argparse.Namespace) -> list[str]:
    """The phases of the command line: those that are named, or all but those that are refused."""
    named = [phase for phase in SECONDS if getattr(args, phase)]
    return named or [phase for phase in SECONDS if getattr(args, phase) is None]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--tests", action=flag, help="build and test; alone, unless --benchmarks is given, too")
    add("--benchmarks", action=flag, help="measure; alone, unless --tests is given, too")
    add("--results", type=Path, default=ROOT / "build/gpu-check", help="folder; default: build/gpu-check")
    both = " and ".join(f"{seconds:.0f} for --{phase}" for phase, seconds in SECONDS.items())
    add("--seconds", type=float, help=f"in all; default: {both}")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal without a GPU")
    args = parser.parse_args()
    phases = asked(args)
    if not phases:
        parser.error("--no-tests and --no-benchmarks together leave nothing to do")
    whole = sum(SECONDS[phase] for phase in phases)
    seconds = whole if args.seconds is None else args.seconds
    least = 2 * END * whole / min(SECONDS[phase] for phase in phases)
    if not seconds >= least:
        of = " and ".join(f"--{phase}" for phase in phases)
        parser.error(f"--seconds must be at least {least:.0f} for {of}, got {seconds:g}")
    why_not = why_no_device(args.device)
    if why_not is not None:
        sys.exit(why_not)
    stages = [stage for phase in phases for stage in STAGES[phase]]
    check = Check(args.device, args.results.absolute(), stages)
    try:
        check.kept.probe()
        for name, columns in rows.FILES.items():
            rows.check_columns(check.kept.folder / name, columns)
    except OSError as error:
        sys.exit(f"--results {args.results}: {error.strerror}; name a folder that can be written")
    except ValueError as error:
        sys.exit(f"--results: {error}")
    # A handler also for what it starts: where SIGINT is ignored, as in the background of a script, children
    # would ignore it, too.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: check.stop.set())
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if args.device == "cuda":
        os.environ.pop("TRITON_INTERPRET", None)
        find_cuda_toolkit()
    return run(check, phases, seconds)


def run(check: Check, phases: list[str], seconds: float) -> int:
    end = check.begin + seconds - END
    check.kept.say(f"{device_name(check.device)}, torch {torch.__version__}, {os.cpu_count()} cores")
    for sentence in absent_packages():
        check.kept.say(sentence)
    try:
        if "tests" in phases:
            share = SECONDS["tests"] / sum(SECONDS[phase] for phase in phases)
            check.tests(check.begin, seconds * share - END)
        if "benchmarks" in phases:
            check.benchmarks(end)
        check.table = summary_of_file(check.kept.folder / "rows.csv")
    except Exception:
        check.stages.append("gpu-check itself")
        check.conclude("gpu-check itself", FAILED, *traceback.format_exc().splitlines())
    check.kept.replace("summary.md", check.summary())
    check.kept.say("\n" + check.summary())
    for name, why in check.kept.lost.items():
        print(f"{name}: FAILED: {why}: what it lacks was only printed, if at all", flush=True)
    check.kept.say(f"{time.monotonic() - check.begin:.0f} s; everything is in {check.kept.folder}")
    if check.stop.is_set():
        return 130
    return int(bool(check.kept.lost) or any(r.state == FAILED for r in check.results.values()))


if __name__ == "__main__":
    sys.exit(main())
