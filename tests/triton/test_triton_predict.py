"""Machine code is read and counted, and launches are timed by it, as benchmarks/predict.py says."""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from places import ROOT, python_path

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import sass

from vitdiv_kernels.ops import _launch

CODE = """
.text.kernel:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0010*/                   STS.128 [R8], R4 ;
.L_x_0:
        /*0020*/              @!P0 LDS.U16 R9, [R8] ;
        /*0030*/                   MUFU.EX2 R9, R9 ;
        /*0040*/               @P1 BRA `(.L_x_0) ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0070*/               @P0 BRA `(.L_x_1) ;
        /*0080*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*0090*/                   EXIT ;
.L_x_2:
        /*00a0*/                   BRA `(.L_x_2);
"""


def test_loops_and_what_is_in_them():
    code = sass.parsed(CODE)
    outer, inner = code.loops
    assert (outer.first, outer.last, outer.depth) == (1, 7, 0)
    assert (inner.first, inner.last, inner.depth) == (2, 4, 1)
    assert code.counts(inner) == {"issued": 3, "shared": 1, "LDS.16": 1, "mufu": 1}
    assert code.counts(outer) == {
        "issued": 7, "shared": 2, "STS.128": 1, "LDS.16": 1, "mufu": 1, "tensor": 1, "multiply-adds": 2048,
        "barrier": 1,
    }  # fmt: skip
    whole = code.counts()
    assert (whole["issued"], whole["LDG.128"], whole["STG.64"]) == (11, 1, 1)


@pytest.mark.parametrize(
    ("name", "width"),
    [("LDSM.16.M88.4", 128), ("LDSM.16.MT88.2", 64), ("STSM.16.M88", 32), ("LDGSTS.E.BYPASS.128", 128)],
)
def test_moves_of_matrices_and_from_memory_to_shared_memory(name, width):
    code = sass.parsed(f"        /*0000*/                   {name} R4, [R8] ;")
    counts = code.counts()
    assert counts[f"{name.split('.')[0]}.{width}"] == 1
    assert counts["global" if name.startswith("LDGSTS") else "shared"] == 1


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("HMMA.16816.F32.BF16", 16 * 8 * 16), ("HMMA.1688.F32.TF32", 16 * 8 * 8), ("DMMA.8x8x4", 8 * 8 * 4),
        ("HGMMA.64x128x16.F32.BF16", 16 * 128 * 16), ("UTCHMMA", 0),
    ],
)  # fmt: skip
def test_multiply_adds_of_a_warp(name, number):
    assert sass.multiply_adds(name) == number


@pytest.fixture
def predict_calls(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import predict_calls

    return predict_calls


@pytest.mark.usefixtures("predict_calls")
def test_a_launch_takes_what_its_slowest_part_takes():
    """Of each kind the clocks by hand: 132 programs of a warp on 132 processors at 1 GHz."""
    import predict

    gpu = predict.GPUS["H200"]._replace(
        clock=1e9, products=1024, of_warpgroups=2048, bytes_a_second=1e12, of_l2=24
    )
    kernel = SimpleNamespace(__name__="dot_rows")
    result = {"registers": 32, "shared": 0, "loops": []}

    def took(bytes=0, **counts):
        x = torch.empty(bytes, dtype=torch.int8, device="meta")
        launch = _launch.Launch(kernel, (132,), {"x": x}, 1, 1, None)
        return predict.seconds(launch, result | {"usual": counts}, gpu)

    assert took(issued=400) == (pytest.approx(100e-9), "issue")
    assert took(issued=4, mufu=10) == (pytest.approx(20e-9), "special functions")
    counts = {"LDS.32": 1, "STS.64": 1, "LDSM.128": 2, "STSM.32": 1, "LDGSTS.128": 1}
    assert took(**counts) == (pytest.approx(16e-9), "shared memory")
    assert took(**{"multiply-adds": 20480}) == (pytest.approx(20e-9), "products")
    assert took(**{"of warpgroups": 20480}) == (pytest.approx(10e-9), "products")
    assert took(bytes=10**6) == (pytest.approx(1e-6), "memory")
    gpu = gpu._replace(bytes_a_second=1e13)
    assert took(bytes=24 * 132000) == (pytest.approx(1e-6), "L2")


# On its own: what Triton compiles is known where TRITON_INTERPRET is unset.
PREDICTED = """
import sys
from types import SimpleNamespace
sys.path[:0] = ["benchmarks"]
import predict

gpu, shape = predict.GPUS["H200"], (128, 12, 197, 64)
for mode in ("fwd", "bwd"):
    launches, _ = predict.predict_calls.launches_of("reattention", shape, mode, gpu.capability, packed=True)
    for launch, result in predict.compiled(launches, gpu.capability):
        took, binds = predict.seconds(launch, result, gpu)
        loop = result["loops"][0]["issued"] if result["loops"] else 0
        print(mode, launch.kernel.__name__, loop, took * 1e3)
for operation, penalty in ("pairwise_cosine", "square"), ("pairwise_rows", ""), ("two_gram", "square"):
    launches, _ = predict.predict_calls.launches_of(operation, (64, 1024, 768), "bwd", 90, penalty=penalty)
    for launch, result in predict.compiled(launches, gpu.capability):
        print(operation, launch.kernel.__name__, 0, predict.seconds(launch, result, gpu)[0] * 1e3)
"""


def test_predictions_are_those_of_the_docs():
    """Instructions of the row kernels' loops, for a query row of all heads and four warps, and milliseconds
    of calls."""
    pytest.importorskip("triton", "3.6.0")
    import triton

    if triton.__version__ != "3.6.0":
        pytest.skip(f"counted with triton 3.6.0, here is {triton.__version__}")
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", PREDICTED], env=kept | {"PYTHONPATH": python_path()}, cwd=ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [line.split() for line in run.stdout.splitlines()]
    loops = {name: int(loop) for _, name, loop, _ in rows if int(loop)}
    assert loops["forward_rows"] <= 390
    assert loops["backward_rows"] <= 750
    total = {of: 0.0 for of, *_ in rows}
    for of, *_, ms in rows:
        total[of] += float(ms)
    assert total["fwd"] <= 0.17
    assert total["bwd"] <= 0.40
    # that made S again for every few columns they were 3.8, 2.1 and 3.8
    assert total["pairwise_cosine"] <= 0.46
    assert total["pairwise_rows"] <= 0.61
    assert total["two_gram"] <= 0.93


@pytest.mark.parametrize("packed", [False, True])
def test_a_call_launches_few_kernels(packed, predict_calls):
    launched = 0
    for mode, count in (("fwd", 3), ("bwd", 6)):
        launches, of_torch = predict_calls.launches_of(
            "reattention", (128, 12, 197, 64), mode, 90, packed=packed
        )
        assert len(launches) == count
        launched += count + len(of_torch)
    assert launched <= 20, of_torch
