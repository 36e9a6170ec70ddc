"""Values and gradients of every operation under each instruction set, each in a process of its own: the
choice is made once. The other tests run under the processor's best only."""

import os
import subprocess
import sys

import pytest
from places import ROOT, python_path

CHECKS = """
import sys

import torch
import test_attention_gram, test_pairwise_cosine, test_pairwise_rows, test_reattention, test_two_gram
from test_pairwise_cosine import draw
from test_reattention import Case

import formulas
from vitdiv_kernels import _native, attention_cosine, attention_gram

print(_native.library().cpu_capability(), flush=True)
if _native.library().cpu_capability() != sys.argv[1]:
    sys.exit()
torch.manual_seed(0)
torch.use_deterministic_algorithms(True)  # torch.empty gives NaN, as in the tests

# Odd, so that vectors, register blocks and tiles all have remainders; d is not a multiple of eight.
N, M, H, d = 33, 19, 7, 20
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    for penalty in ("abs", "square"):
        for width in (d, 37):  # below and above N
            test_pairwise_cosine.check("native", draw((2, N, width), dtype), None, dtype, penalty=penalty)
    y = draw((2, M, 37), dtype)
    test_pairwise_cosine.check("native", draw((2, N, 37), dtype, y), y, dtype, penalty="relu")

    for m in (None, M):
        x, y = test_pairwise_rows.draw_sets(((2,), N, m, d), dtype)
        for scale in (4.0, 50.0):
            test_pairwise_rows.check("native", x, y, dtype, scale=scale)
        got = test_pairwise_rows.pairwise_nearest(x, y, backend="native")
        assert torch.equal(got, test_pairwise_rows.cosines(x, y).argmax(-1))
    for penalty in test_two_gram.PENALTIES:
        x, y = test_two_gram.draw((2,), N, d, 37, dtype)
        test_two_gram.check("native", x, y, dtype, penalty=penalty, margin=test_two_gram.MARGIN)

    one, two = (test_attention_gram.draw((2, H, N, M, d), dtype, layers) for layers in (1, 2))
    test_attention_gram.check("native", attention_gram, formulas.attention_gram, one, dtype)
    test_attention_gram.check("native", attention_cosine, formulas.attention_cosine, two, dtype)

    test_reattention.check("native", Case((2, H, N, M, d), "batch"), dtype)
    test_reattention.check("native", Case((2, H, N, M, d), "layer", pre="mix and bias"), dtype)
print("all pass")
"""


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_values_and_gradients(capability):
    env = os.environ | {"VITDIV_CPU_CAPABILITY": capability, "PYTHONPATH": python_path()}
    run = subprocess.run(
        [sys.executable, "-c", CHECKS, capability], capture_output=True, text=True, env=env, cwd=ROOT
    )
    chosen = run.stdout.split()
    if chosen and chosen[0] != capability:
        pytest.skip(f"this machine runs {chosen[0]} when asked for {capability}")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "all pass" in run.stdout
