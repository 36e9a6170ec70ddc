"""A pytest plugin: which Triton kernels the tests of a GPU would compile there, found out without one.

The tests run on CPU tensors, as if on a GPU, and every launch is recorded instead of run. What a kernel
should have written stays unwritten, so nothing that compares values may run: `python -O` takes the `assert`s
out, and what follows takes out the rest, so that what comes after a comparison is recorded all the same.
test_gpu.py, which needs CUDA itself, is left out: it calls tests/support/calls.py, as test_compile.py does.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import gpu_cases
import pytest
import torch
from places import ROOT, python_path, test_file

LAUNCHES = {}
# Tests on meta tensors, which record for themselves.
WITHOUT = "not memory_does_not_grow and not meta_tensors_record"


def record(capability=90, *options):
    """{case: set of launches} of the tests of `make gpu-check`; see `fake_driver.record` for a launch."""
    import gpu_check

    from vitdiv_kernels import _dispatch

    names = {*_dispatch.OPERATIONS, *gpu_check.TESTED} - {"gpu"}
    files = [test_file(name) for name in sorted(names)]
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    environment["VITDIV_TEST_BACKENDS"] = "triton-gpu"
    environment["PYTHONPATH"] = python_path()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "launches.json"
        command = [sys.executable, "-O", "-m", "pytest", "--assert=plain", "-q", "-p", "launch_recorder"]
        command += ["-p", "no:cacheprovider", "--launches", str(path), "--capability", str(capability)]
        command += ["-k", f"({gpu_check.TRITON}) and {WITHOUT}", *options, *files]
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if run.returncode:
            said = f"{run.stdout[-6000:]}{run.stderr[-2000:]}"
            raise RuntimeError(f"tests cannot be recorded:\n{said}")
        found = json.loads(path.read_text())
    return {test: set(map(tuple, launches)) for test, launches in found.items()}


def pytest_addoption(parser):
    parser.addoption("--launches", type=Path, required=True)
    parser.addoption("--capability", type=int, default=90)
    parser.addoption("--candidates", action="store_true", help="what gpu_cases.json is chosen from")
    _pretend.is_available, torch.cuda.is_available = torch.cuda.is_available, _pretend


def _pretend():
    """What test modules see on import."""
    return True


@pytest.hookimpl(trylast=True)  # after conftest's
def pytest_configure(config):
    import conftest

    conftest.BACKENDS["triton-gpu"] = "triton", "cpu"
    conftest.need = lambda *arguments, **options: None
    conftest._dispatch._INTERPRETED = True  # CPU tensors are taken
    if config.getoption("--candidates"):
        conftest.GPU_CASES.clear()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    import fake_driver

    torch.cuda.is_available = _pretend.is_available
    for module in {item.module for item in items}:
        if getattr(module, "DEVICE", None) == "cuda":
            module.DEVICE = "cpu"
    _compare_nothing()
    fake_driver.install(config.getoption("--capability"))
    fake_driver.record(lambda *launch: LAUNCHES[None].add(launch))


def _compare_nothing():
    """Nor compile what is around the operators."""
    from vitdiv_kernels.ops.pairs.pairwise_rows import triton_kernels as rows

    nearest = rows.pairwise_nearest
    rows.pairwise_nearest = lambda *arguments: nearest(*arguments).zero_()  # they are taken as indices
    torch.testing.assert_close = torch.library.opcheck = lambda *arguments, **options: None
    torch.autograd.gradcheck = _forward_and_backward
    torch.compile = lambda function, **options: function


def _forward_and_backward(function, inputs, **options):
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = [x for x in outputs if x is not None and x.requires_grad]
    leaves = [x for x in inputs if x is not None and x.requires_grad]
    torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs], allow_unused=True)


def pytest_runtest_setup(item):
    LAUNCHES[None] = LAUNCHES.setdefault(gpu_cases.case_of(item), set())


def pytest_sessionfinish(session):
    LAUNCHES.pop(None, None)
    found = {test: sorted(launches) for test, launches in LAUNCHES.items()}
    session.config.getoption("--launches").write_text(json.dumps(found))
