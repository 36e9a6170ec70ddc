"""The benchmarks run, write what they promise, and measure what they say. Speed itself is not judged here."""

import csv
import importlib.util
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch
from places import BENCHMARKS, ROOT

import vitdiv_kernels
from vitdiv_kernels import DiversityObjective, _dispatch
from vitdiv_kernels.ops.pairs.pairwise_cosine import triton_configs as configs
from vitdiv_kernels.vit import CONFIGS, ViT

TINY = {
    "bench_pairwise_cosine.py": ["--shapes", "2x6x4", "--penalty", "signed"],
    "bench_attention_gram.py": ["--shapes", "1x2x5x8"],
    "bench_reattention.py": ["--shapes", "1x2x5x8", "--norm", "batch", "--packed", "no,yes"],
    "bench_losses.py": ["--suite", "tiny"],
    "bench_objective.py": ["--suite", "tiny"],
    "bench_models.py": ["--suite", "tiny"],
    "bench_scaling.py": ["--tokens", "8"],
}

POSITIVE = ("ms", "p20", "p80", "ratio_eager", "ratio_floor", "floor_ms", "copy_gb_s", "gemm_gflop_s")
ORIGIN = ("torch", "vitdiv_kernels", "python", "machine", "cpu_capability", "commit", "date")


@pytest.fixture
def module(monkeypatch):
    """A module of benchmarks/ by name; its scripts find each other as the interpreter would let them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = [path.stem for path in BENCHMARKS.glob("*.py")]
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def fake(module):
    return fake_workload(module("harness"))


def fake_workload(harness):
    """Its forward sleeps 20 ms and holds 64 MB for a while; its backward does neither."""

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            time.sleep(0.02)
            return x + torch.ones(2**24)[: x.numel()]

        @staticmethod
        def backward(ctx, grad):
            return grad

    def other(x):
        return x + 2

    return harness.Workload(
        op="fake",
        variant="",
        shape=(8,),
        arguments=(),
        inputs=lambda device, dtype: {"x": torch.ones(8, device=device, dtype=dtype).requires_grad_()},
        providers={"eager": lambda: Slow.apply, "twice": lambda: Slow.apply, "other": lambda: other},
        flops={"fwd": 8, "bwd": 8},
    )


@pytest.fixture
def settings(module):
    floors = {1: (1e9, 1e9)}
    return module("harness").Settings("float32", "cpu", repeats=3, memory=False, floors=floors)


@pytest.mark.parametrize("script", TINY)
def test_rows_are_complete_and_positive(script, tmp_path, module, monkeypatch, capsys):
    out, modes = tmp_path / "rows.csv", "fwd,bwd,fwd+bwd"
    options = ["--providers", "eager", "--modes", modes, "--repeats", "1", "--no-memory", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [script, *TINY[script], *options, "--out", str(out)])
    module(Path(script).stem).main()
    assert "of floor" in capsys.readouterr().out
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == module("rows").COLUMNS
    assert {row["mode"] for row in rows} == set(modes.split(","))
    for row in rows:
        assert all(0 < float(row[name]) < math.inf for name in POSITIVE)
        assert all(row[name] for name in ORIGIN)
        assert row["ratio_compile"] == row["peak_extra_mb"] == ""
        assert not row["ratio_gemm"] or 0 < float(row["ratio_gemm"]) < math.inf
        assert bool(row["ratio_gemm"]) == (row["op"] == "reattention")


def test_the_published_formulas_are_what_the_objective_computes(module):
    """A loss is too small a part of the measured step's to show in its output."""
    bench = module("bench_objective")
    model = ViT(replace(CONFIGS["deit_small"], image_size=32, dim=24, depth=3))
    starts = {"patches": torch.rand(2, 4), "heads": torch.rand(2, 6), "weights": torch.rand(2, 24)}
    labels = torch.tensor([3, 5])
    images, parts = torch.randn(2, 3, 32, 32), []
    for kind in (bench.PlainTerm, bench.Term):
        with DiversityObjective(bench.terms("every", starts, kind)).attach(model) as objective:
            model(images)
            parts.append(objective(mixing=(labels, labels.flip(0), torch.full((4,), 0.25)))[1])
    plain, ours = parts
    assert set(ours) == set(bench.CHEN)
    for name, value in plain.items():
        assert ours[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory needs Linux's /proc")
def test_closed_form_memory_and_plot(tmp_path, module, monkeypatch, capsys):
    out, png = tmp_path / "rows.csv", tmp_path / "rows.png"
    options = (
        "--shapes 4x1024x16 --penalty square --providers eager,closed --modes fwd --repeats 2 --threads 1"
    )
    monkeypatch.setattr(sys, "argv", ["bench", *options.split(), "--out", str(out)])
    # Memory is measured in processes of their own, which have to find the package that these tests run on.
    monkeypatch.setenv("PYTHONPATH", str(Path(vitdiv_kernels.__file__).parents[1]))
    module("bench_pairwise_cosine").main()
    with out.open() as file:
        peaks = {row["provider"]: float(row["peak_extra_mb"]) for row in csv.DictReader(file)}
    assert peaks["eager"] > 16  # one map of all pairs is 16 MB
    assert 0 <= peaks["closed"] < 8
    pytest.importorskip("matplotlib")
    plot = module("plot")
    monkeypatch.setattr(sys, "argv", ["plot.py", str(out), "--out", str(png), "--provider", "closed"])
    plot.main()
    assert png.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(sys, "argv", ["plot.py", str(out), "--provider", "native"])
    with pytest.raises(SystemExit):
        plot.main()
    assert "has no rows of provider 'native'; it has closed, eager" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--providers", "eager,tpu"], "'tpu' is unknown here; known are eager, compile, closed"),
        (["--shapes", "2x3"], "'2x3' is not a shape BxNxD of 3 positive numbers"),
        (["--penalty", "abs"], "--penalty goes with --shapes; a suite fixes its own"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--threads", "two"], "'two' is not a list of positive thread counts"),
        (
            ["--providers", "closed", "--shapes", "1x4x8"],
            "'closed' is not available: penalty abs has no closed",
        ),
        (["--out", str(Path(__file__))], "has other columns than this version writes; name a new file"),
    ],
)
def test_bad_arguments_get_a_sentence(arguments, sentence, module, monkeypatch, capsys):
    bench = module("bench_pairwise_cosine")
    monkeypatch.setattr(sys, "argv", ["bench_pairwise_cosine.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert stop.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_backward_excludes_the_forward(module, fake, settings):
    rows, _ = module("harness").measure(fake, ["eager"], ["fwd", "bwd", "fwd+bwd"], settings)
    ms = {row["mode"]: row["ms"] for row in rows}
    assert ms["fwd"] > 20
    assert ms["bwd"] < 10
    assert ms["fwd+bwd"] > 20


def test_ratios_are_the_other_time_over_this(module, fake, settings):
    rows, failures = module("harness").measure(fake, ["eager", "twice"], ["fwd"], settings)
    assert failures == []
    eager, twice = rows
    assert twice["ratio_eager"] == eager["ms"] / twice["ms"]
    assert twice["ratio_compile"] is None
    assert "fake 8 float32 cpu" in module("rows").table(rows)


def test_a_provider_that_fails_has_no_row_and_the_others_have(module, fake, settings):
    """One computes something else, one raises."""

    def broken(x):
        raise ValueError("takes at most\n  8 heads")

    fake.providers["broken"] = lambda: broken
    names = ["broken", "eager", "other", "twice"]
    rows, (first, second) = module("harness").measure(fake, names, ["fwd"], settings)
    assert [row["provider"] for row in rows] == ["eager", "twice"]
    assert first == "fake 8 fwd: broken fails: ValueError: takes at most 8 heads"
    assert second.startswith("fake 8 fwd: other is ")
    assert "away from the output of eager, relative: no speed reported" in second


def test_failures_are_named_and_end_in_an_exit_status(module, fake, monkeypatch, tmp_path, capsys):
    cli, out = module("cli"), tmp_path / "rows.csv"
    parser = cli.parser("", providers=("eager", "other"), threads=(1,))
    args = parser.parse_args(["--modes", "fwd", "--repeats", "1", "--no-memory", "--out", str(out)])
    monkeypatch.setattr(cli, "_floors", lambda args: {1: (1e9, 1e9)})
    with pytest.raises(SystemExit, match="what failed, 1 in all"):
        cli.run(parser, args, [fake])
    assert "other is " in capsys.readouterr().err
    with out.open() as file:
        assert [row["provider"] for row in csv.DictReader(file)] == ["eager"]


class SimulatedGpu:
    """Two clocks: of the host, and of when the device has done all that was queued."""

    class Event:
        def __init__(self, gpu):
            self.gpu = gpu

        def record(self):
            self.time = max(self.gpu.host, self.gpu.device)

        def query(self):
            return self.gpu.host >= self.time

        def synchronize(self):
            self.gpu.host = max(self.gpu.host, self.time)

        def elapsed_time(self, end):
            return (end.time - self.time) * 1e3

    def __init__(self):
        self.host = self.device = 0.0

    def queue(self, seconds, host=1e-5):
        self.host += host
        self.device = max(self.host, self.device) + seconds

    def now(self):
        return self.host

    def event(self):
        return self.Event(self)

    def flush(self):
        self.queue(3e-4)

    def sleep(self, seconds):
        self.queue(seconds)

    def synchronize(self):
        self.host = max(self.host, self.device)

    def capture(self, call):
        self.synchronize()
        begin = self.device
        call()
        seconds = 10 * 1e-4
        self.device = begin
        return lambda: self.queue(seconds)


@pytest.fixture
def gpu(module, monkeypatch):
    measure, gpu = module("measure"), SimulatedGpu()
    monkeypatch.setattr(measure, "clock_of", lambda device: measure.GpuClock(gpu))
    return gpu


def test_times_of_the_device_and_by_the_wall(module, fake, settings, gpu, capsys):
    """Ten kernels of 0.1 ms, each of which the host takes 0.5 ms to queue: longer than the flush of L2."""

    def of_ten_kernels(x):
        for _ in range(10):
            gpu.queue(1e-4, host=5e-4)
        return x + 0

    def that_waits(x):
        gpu.synchronize()
        return of_ten_kernels(x)

    fake.providers.update(eager=lambda: of_ten_kernels, waits=lambda: that_waits)
    rows, failures = module("harness").measure(fake, ["eager", "waits"], ["fwd"], settings)
    assert failures == []
    eager, waits = rows
    assert eager["ms"] == pytest.approx(1)
    assert eager["device_ms"] == pytest.approx(1)
    assert eager["wall_ms"] == pytest.approx(5, rel=0.05)
    assert waits["ms"] > 4
    said = capsys.readouterr().err
    assert "fake 8 fwd: waits waits for the device: its ms hold time of the host" in said
    assert "eager waits" not in said
    assert "   device     wall" in module("rows").table(rows)


def test_what_the_clock_asks_of_torch_is_there(module, monkeypatch):
    """Names and arguments, which no other test without a GPU would see to be wrong."""
    measure, calls, zeros = module("measure"), [], torch.zeros(1)
    cuda = create_autospec(torch.cuda)
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype, device: zeros)
    gpu = measure.Gpu()
    gpu.event().record()
    gpu.flush()
    gpu.sleep(1e-3)
    gpu.synchronize()
    gpu.capture(lambda: calls.append(None))()
    assert len(calls) == 3  # two to warm up, one that is captured
    cuda._sleep.assert_called_once_with(2_000_000)
    cuda.CUDAGraph.return_value.replay.assert_called_once_with()
    meter = measure._CudaMeter(torch.device("cuda"))
    meter.reset_peak()
    assert [meter.current(), meter.peak()] == [
        cuda.memory_allocated.return_value,
        cuda.max_memory_allocated.return_value,
    ]
    assert isinstance(measure.clock_of(torch.device("cuda")).gpu, measure.Gpu)


def test_cuda_without_a_gpu_is_a_sentence(module, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cuda"])
    with pytest.raises(SystemExit):
        module("bench_attention_gram").main()
    assert "--device cuda: torch sees no CUDA device here" in capsys.readouterr().err


def test_what_cannot_be_captured_has_no_device_time(module, fake, settings, gpu, monkeypatch, capsys):
    def refuse(call):
        raise RuntimeError("operation not permitted\n when stream is capturing")

    def quick(x):
        gpu.queue(1e-4)
        return x + 0

    monkeypatch.setattr(gpu, "capture", refuse)
    fake.providers["other"] = lambda: quick
    (row,), failures = module("harness").measure(fake, ["other"], ["fwd"], settings)
    assert failures == []
    assert row["device_ms"] is None
    said = "other is not captured as a CUDA graph: operation not permitted when stream is capturing"
    assert said in capsys.readouterr().err


OLD_COLUMNS = (
    "op,variant,provider,mode,shape,dtype,device,threads,repeats,ms,p20,p80,ratio_eager,ratio_compile"
)
OLD_ROW = "reattention,norm=none,native,fwd,1x2x3x4,float32,cpu,2,11,15.2,15.1,18,2.5,1.5"


def test_files_of_earlier_versions(module, tmp_path):
    """They have fewer columns; rows that are added have all, and the earlier ones empty cells."""
    rows, path = module("rows"), tmp_path / "cpu.csv"
    path.write_text(f"{OLD_COLUMNS}\n{OLD_ROW}\n")
    before = rows.read(path)
    assert (before[0]["ms"], before[0]["device_ms"]) == ("15.2", "")
    rows.append(path, [{"op": "reattention", "provider": "triton", "ms": 0.25, "device_ms": 0.2}])
    earlier, added = rows.read(path)
    assert earlier == before[0]
    assert (added["ms"], added["device_ms"], added["ratio_eager"]) == ("0.25", "0.2", "")
    assert path.read_text().splitlines()[0] == ",".join(rows.COLUMNS)
    other = tmp_path / "other.csv"
    other.write_text("op,speed\n")
    with pytest.raises(ValueError, match="has other columns than this version writes"):
        rows.append(other, [])


def test_the_committed_files_are_read(module):
    rows = module("rows")
    others = {"micro.csv", "releases.csv", "releases_kernels.csv"}  # with columns of their own
    paths = sorted(path for path in (BENCHMARKS / "results").glob("*.csv") if path.name not in others)
    assert paths
    for path in paths:
        rows.check_columns(path)
        assert all(set(row) == set(rows.COLUMNS) and float(row["ms"]) > 0 for row in rows.read(path))


def test_the_commit(module, monkeypatch, tmp_path):
    """Of the environment where there is no git."""
    rows = module("rows")
    monkeypatch.delenv("VITDIV_COMMIT", raising=False)
    monkeypatch.setattr(rows, "__file__", str(tmp_path / "rows.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert rows._commit() == "unknown"
    monkeypatch.setenv("VITDIV_COMMIT", "abc1234")
    assert rows._commit() == "abc1234"


def test_packed_is_what_a_layer_computes(module):
    """Of qkv as one linear layer writes it, with its gradient in one tensor."""
    bench = module("bench_reattention")
    shape = (2, 3, 7, 4)
    packed, apart = (bench.workload(shape, norm="batch", packed=option) for option in ("yes", "no"))
    inputs = packed.inputs(torch.device("cpu"), torch.float32)
    qkv = inputs.pop("qkv")
    assert qkv.shape == (2, 7, 3, 3, 4)
    b, h, n, d = shape
    for name in ("eager", "reference", "native"):
        if name == "native" and _dispatch.missing("native", "cpu"):
            continue
        out = packed.providers[name]()(qkv=qkv, **inputs)
        q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
        expected = apart.providers["eager"]()(q=q, k=k, v=v, **inputs)
        torch.testing.assert_close(out, expected.transpose(1, 2).reshape(b, n, h * d), rtol=1e-4, atol=1e-5)
        grad = torch.autograd.grad(out.sum(), qkv)[0]
        assert grad.shape == qkv.shape


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory needs Linux's /proc")
def test_peak_memory_sees_what_is_freed_again():
    """In a process of its own, the highest of three: of a large process the kernel may take pages away
    meanwhile, which hides the peak."""
    paths = [str(BENCHMARKS), str(Path(__file__).parent), *sys.path]
    program = (
        f"import sys; sys.path[:0] = {paths}"
        + """
import harness, test_benchmarks
workload = test_benchmarks.fake_workload(harness)
for _ in range(3):
    print(harness.peak_extra_mb(workload, "eager", "fwd", dtype="float32", device="cpu", threads=1))
"""
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 60 < max(map(float, run.stdout.split())) < 80


def test_red_tests_give_no_speed(module, monkeypatch, tmp_path):
    cli = module("cli")
    (tmp_path / "tests/ops").mkdir(parents=True)
    (tmp_path / "tests/ops/test_fake.py").write_text("def test_red():\n    assert False\n")
    monkeypatch.setattr(cli, "HERE", tmp_path / "benchmarks")
    with pytest.raises(SystemExit, match="tests of fake fail: no speed reported"):
        cli._check(["fake"])
    with pytest.raises(SystemExit, match=r"have no test_missing\*.py: no speed reported"):
        cli._check(["fake", "missing"])  # pytest without a file would run all tests


def test_workloads_have_tests(module):
    found = {
        op for path in BENCHMARKS.glob("bench_*.py") for op in re.findall(r' op="(\w+)"', path.read_text())
    }
    assert {"losses", "models", "reattention"} < found
    for op in found:
        assert list(ROOT.glob(f"tests/*/test_{module('cli').TESTS.get(op, op)}*.py")), op


def test_every_operator_goes_through_the_sanitizers_script(module, monkeypatch, capsys):
    """On the CPU, where the same operators take the same arguments."""
    if _dispatch.missing("native", "cpu"):
        pytest.skip("the compiled kernels are not here")
    sanitize = module("sanitize")
    monkeypatch.setattr(sys, "argv", ["sanitize.py", "--device", "cpu"])
    sanitize.main()
    cases = len(_dispatch.OPERATIONS) * len(sanitize.DTYPES) * len(sanitize.SHAPES)
    assert f"{cases} cases ran on cpu" in capsys.readouterr().out


def test_and_through_the_triton_operators(module, monkeypatch, capsys):
    """In the interpreter, on the smallest tensors."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is not on here")
    monkeypatch.setattr(_dispatch, "_INTERPRETED", True)
    sanitize = module("sanitize")
    monkeypatch.setattr(
        sanitize,
        "cases",
        lambda backends: [("triton", op, torch.float32, sanitize.SHAPES[0]) for op in sanitize.RUN],
    )
    monkeypatch.setattr(sys, "argv", ["sanitize.py", "--device", "cpu"])
    sanitize.main()
    said = capsys.readouterr().out
    assert said.startswith("the device works")
    assert f"{len(_dispatch.OPERATIONS)} cases ran on cpu" in said


def test_a_tuned_row_says_where_it_was_measured(module, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert module("tune").source("cuda") == "measured on NVIDIA H200"


def test_the_tuner_writes_a_row(module, monkeypatch, tmp_path, capsys):
    """In the interpreter, where the times mean nothing."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is not on here")
    monkeypatch.setattr(_dispatch, "_INTERPRETED", True)
    tune, table = module("tune"), Path(configs.__file__)
    copy = tmp_path / "triton_configs.py"
    copy.write_text(table.read_text())
    before = dict(configs.FROM_SIGNS)
    options = f"--device cpu --dtype float32 --shapes 1x5x8 --limit 2 --write {copy}".split()
    monkeypatch.setattr(sys, "argv", ["tune.py", "pairwise_cosine.FROM_SIGNS", *options])
    tune.main()
    assert "of the present row's time" in capsys.readouterr().out
    assert before == configs.FROM_SIGNS
    written = {"__package__": configs.__package__}
    exec(copy.read_text(), written)
    assert written["FROM_SIGNS"].keys() == before.keys()
    assert written["FORWARD"].keys() == configs.FORWARD.keys()
    row = tune.rewritten(copy.read_text(), "FORWARD", (2, 12), configs.Forward(32, 32, 4, 2, "a GPU"))
    exec(row, written)
    assert written["FORWARD"][2, 12] == (32, 32, 4, 2, "a GPU")
