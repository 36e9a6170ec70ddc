"""The benchmarks run, write what they promise, and measure what they say. Speed itself is not judged here."""

import csv
import importlib.util
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import vitdiv_kernels
from vitdiv_kernels import DiversityObjective, _dispatch
from vitdiv_kernels.ops.pairwise_cosine import triton_configs as configs
from vitdiv_kernels.vit import CONFIGS, ViT

pytest.importorskip("tqdm")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = {
    "bench_pairwise_cosine.py": ["--shapes", "2x6x4", "--penalty", "signed"],
    "bench_attn_diversity.py": ["--shapes", "1x2x5x8"],
    "bench_reattention.py": ["--shapes", "1x2x5x8", "--norm", "batch"],
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
    """A workload whose forward sleeps 20 ms and holds 64 MB for a while; its backward does neither."""
    harness = module("harness")

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
    options = [
        "--shapes",
        "4x1024x16",
        "--penalty",
        "square",
        "--providers",
        "eager,closed",
        "--modes",
        "fwd",
    ]
    monkeypatch.setattr(
        sys, "argv", ["bench", *options, "--repeats", "2", "--threads", "1", "--out", str(out)]
    )
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


@pytest.mark.parametrize(
    ("heads", "options", "here"),
    [
        (16, {}, True),
        (17, {}, False),
        (12, {"norm": "batch"}, True),
        (12, {"norm": "layer"}, False),
        (12, {"pre_mix": "yes"}, False),
        (8, {"pre_mix": "yes"}, True),
        (1, {"dtype": "float64"}, False),
    ],
)
def test_streaming_is_timed_where_its_tiles_hold_the_heads(module, heads, options, here):
    pytest.importorskip("triton")
    maker = module("bench_reattention").workload((2, heads, 9, 8), **options).providers["triton-s1"]
    if here:
        maker()
    else:
        with pytest.raises(module("harness").Unavailable, match="streaming holds"):
            maker()


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory needs Linux's /proc")
def test_peak_memory_sees_what_is_freed_again(module, fake):
    peak = module("harness").peak_extra_mb(fake, "eager", "fwd", dtype="float32", device="cpu", threads=1)
    assert 60 < peak < 80


def test_red_tests_give_no_speed(module, monkeypatch, tmp_path):
    cli = module("cli")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_fake.py").write_text("def test_red():\n    assert False\n")
    monkeypatch.setattr(cli, "HERE", tmp_path / "benchmarks")
    with pytest.raises(SystemExit, match="tests of fake fail: no speed reported"):
        cli._check(["fake"])


def test_the_summary_of_a_gpu_check(module):
    gpu_check = module("gpu_check")
    shared = {
        "op": "reattention",
        "variant": "norm=none",
        "shape": "1x2x3x4",
        "dtype": "bfloat16",
        "mode": "fwd",
    }
    numbers = {
        "ms": "0.5",
        "ratio_eager": "2.5",
        "ratio_compile": "1.51234",
        "ratio_floor": "",
        "peak_extra_mb": "3",
    }
    rows = [
        shared | numbers | {"provider": "eager", "peak_extra_mb": "40"},
        shared | numbers | {"provider": "triton-s1"},
    ]
    head, _, row = gpu_check.summary_of(rows).splitlines()
    assert row.count("|") == head.count("|")
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "reattention norm=none",
        "1x2x3x4, bfloat16",
        "triton-s1",
        "fwd",
        "0.5",
        "2.5",
        "1.51",
        "-",
        "3 (40)",
    ]


def test_gpu_check_without_a_gpu_is_one_sentence(module, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        module("gpu_check").main()


@pytest.fixture
def gpu_check(module, monkeypatch, tmp_path):
    check = module("gpu_check")
    (tmp_path / "build").mkdir()
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    for name in ("PYTHONPATH", "TRITON_INTERPRET", "TORCH_CUDA_ARCH_LIST"):  # are as before afterwards
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    return check


@pytest.mark.parametrize("absent", ["pytest", "hypothesis", "tqdm"])
def test_gpu_check_says_which_packages_it_needs(gpu_check, monkeypatch, absent):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else find(name))
    monkeypatch.setattr(gpu_check, "build", lambda: pytest.fail("it went on"))
    with pytest.raises(SystemExit, match=f"gpu-check needs {absent}, which this Python does not have"):
        gpu_check.main()


def test_gpu_check_names_what_did_not_run(gpu_check, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "build", lambda: True)
    monkeypatch.setattr(gpu_check, "run", lambda *arguments, **options: 0)
    monkeypatch.setattr(gpu_check, "native_operations", list)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--no-tests", "--no-benchmarks"])
    assert gpu_check.main() == 0
    said = capsys.readouterr().out
    assert all(f"{name}: not run" in said for name in ("Triton tests", "CUDA tests", "benchmarks"))


def test_both_schedules_are_tested_before_they_are_timed(gpu_check):
    names = gpu_check.TRITON.split(" or ")
    assert {"triton_streaming", "triton_workspace"} <= set(gpu_check.TESTED) & set(names)
    for name in gpu_check.TESTED:
        assert (BENCHMARKS.parent / f"tests/test_{name}.py").exists()


@pytest.mark.parametrize(
    "broken", [None, "build", "native-cuda", "triton-gpu", "racecheck", "benchmarks/bench_reattention.py"]
)
def test_gpu_check_measures_what_passed(gpu_check, monkeypatch, tmp_path, capsys, broken):
    ran = []

    def run(*arguments, timeout=None, **environment):
        ran.append((arguments, environment, os.environ["TORCH_CUDA_ARCH_LIST"]))
        if arguments[0] == "setup.py":
            return int(broken == "build" and not environment)
        return int((gpu_check.TRITON if broken == "triton-gpu" else broken) in arguments)

    operations = [] if broken == "build" else ["attn_diversity"]
    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check, "native_operations", lambda: operations)
    monkeypatch.setattr(gpu_check, "sanitized", lambda limit: {"racecheck": broken != "racecheck"})
    assert gpu_check.main() == (broken is not None)
    builds = [environment for arguments, environment, _ in ran if arguments[0] == "setup.py"]
    assert builds == [{}] + [{"VITDIV_CUDA": "0"}] * (broken == "build")
    assert {architecture for _, _, architecture in ran} == {"9.0"}
    tested = [arguments[arguments.index("-k") + 1] for arguments, _, _ in ran if "-k" in arguments]
    assert tested == [gpu_check.TRITON] + ["native-cuda"] * len(operations)
    providers = {
        arguments[0]: arguments[arguments.index("--providers") + 1].split(",")
        for arguments, _, _ in ran
        if "--providers" in arguments
    }
    assert len(providers) == 3
    assert all("triton" in names for names in providers.values())
    with_native = {Path(script).stem for script, names in providers.items() if "native" in names}
    assert with_native == (set() if broken in ("build", "native-cuda") else {"bench_attn_diversity"})
    rows = {arguments[arguments.index("--out") + 1] for arguments, _, _ in ran if "--out" in arguments}
    only_timing = broken is None or "bench" in broken
    folder = tmp_path / ("benchmarks/results" if only_timing else "build")
    assert {Path(path).parent for path in rows} == {folder}
    said = capsys.readouterr().out
    assert said.count("FAILED") == (broken is not None)
    assert ("CUDA tests: passed" in said) == (broken not in ("build", "native-cuda"))


def test_gpu_check_names_what_was_not_finished(gpu_check, monkeypatch, tmp_path, capsys):
    """Slow is not wrong: it spoils neither the exit status nor the place of the rows."""

    def run(*arguments, timeout=None, **environment):
        return 124 if "benchmarks/bench_reattention.py" in arguments and "float16" in arguments else 0

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check, "native_operations", lambda: ["attn_diversity"])
    monkeypatch.setattr(gpu_check, "sanitized", lambda limit: {"memcheck": True, "racecheck": None})
    assert gpu_check.main() == 0
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "not finished" in line] == [
        "racecheck: not finished",
        "benchmark of reattention, float16: not finished",
    ]
    assert {"memcheck: passed", "benchmarks: passed"} <= set(said)
    assert list((tmp_path / "benchmarks/results").iterdir())


def test_gpu_check_under_sanitizers(gpu_check, monkeypatch, tmp_path, capsys):
    """With a stand-in for compute-sanitizer: one check passes, one finds something, one does not end."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_check.sanitized(60) == {}
    assert "compute-sanitizer is not on PATH" in capsys.readouterr().out
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f"#!{sys.executable}\n"
        "import os, sys, time\n"
        "check = sys.argv[sys.argv.index('--tool') + 1]\n"
        "if check == 'initcheck': time.sleep(60)\n"
        "print('ERROR SUMMARY of', check, os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'], sys.argv[-1])\n"
        "sys.exit(int(check == 'racecheck'))\n"
    )
    tool.chmod(0o755)
    assert gpu_check.sanitized(3) == {"memcheck": True, "racecheck": False, "initcheck": None}
    said = capsys.readouterr().out
    assert "memcheck: ERROR SUMMARY of memcheck 1 benchmarks/sanitize.py" in said
    assert "not finished after" in said


def test_every_operator_goes_through_the_sanitizers_script(module, monkeypatch, capsys):
    """On the CPU, where the same operators take the same arguments."""
    if _dispatch.missing("native", "cpu"):
        pytest.skip("the compiled kernels are not here")
    sanitize = module("sanitize")
    monkeypatch.setattr(sys, "argv", ["sanitize.py", "--device", "cpu"])
    sanitize.main()
    cases = len(_dispatch.OPERATIONS) * len(sanitize.DTYPES) * len(sanitize.SHAPES)
    assert f"{cases} cases ran on cpu" in capsys.readouterr().out


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
    options = [
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--shapes",
        "1x5x8",
        "--limit",
        "2",
        "--write",
        str(copy),
    ]
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
