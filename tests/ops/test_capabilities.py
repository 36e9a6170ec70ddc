"""Values and gradients of every operation under each instruction set, each in a process of its own: the
choice is made once. The other tests run under the processor's best only."""

import os
import subprocess
import sys

import pytest
from places import ROOT, python_path

CHECKS = """
import importlib
import sys

import torch

from vitdiv_kernels import _dispatch, _native

print(_native.library().cpu_capability(), flush=True)
if _native.library().cpu_capability() != sys.argv[1]:
    sys.exit()
torch.manual_seed(0)
torch.use_deterministic_algorithms(True)  # torch.empty gives NaN, as in the tests
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    for operation in _dispatch.OPERATIONS:
        importlib.import_module(f"test_{operation}").check_instructions(dtype)
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
