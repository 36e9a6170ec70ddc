"""The package's operators over emulated CUDA kernels: "native" as CUDA tensors have it, on CPU tensors.

All host code is that of csrc/cuda/operators.h; only device and stream are left out.
"""

import functools
from pathlib import Path

import pytest
import torch
from emulation_build import EMULATION, build, kernels

from vitdiv_kernels.ops import _operators

NAMESPACE = "vitdiv_emulated"


@functools.cache
def operators():
    """The package's operators by name, with emulated kernels; one that has no CUDA kernel raises."""
    folder = Path(torch.__file__).parent
    libraries = [kernels(), *(folder / f"lib/lib{name}.so" for name in ("c10", "torch_cpu", "torch"))]
    includes = [folder / "include", folder / "include/torch/csrc/api/include"]
    headers = sorted(EMULATION.glob("memory/*.h"))
    library = build(EMULATION / "operators.cpp", libraries=libraries, includes=includes, headers=headers)
    found = {
        name: _operators.declare(NAMESPACE, operator, "native")
        for name, (operator, _) in with_kernels().items()
    }
    torch.ops.load_library(library)
    return found


def take_the_place_of_native(monkeypatch):
    """backend="native" means the emulated kernels, as long as the monkeypatch lasts."""
    emulated = operators()
    for name, (_, table) in with_kernels().items():
        monkeypatch.setitem(table, "native", emulated[name])


def need(operation):
    """Skip the tests of an operation that has no CUDA kernels."""
    names = [name for name in operators() if operation_of(name) == operation]
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    if not names or not all(registered(f"{NAMESPACE}::{name}", "CPU") for name in names):
        pytest.skip(f"there is no CUDA kernel for {operation}")


def operation_of(name):
    """The operation whose folder declares this operator."""
    operator, _ = _operators.DECLARED[name]
    return operator.fakes["native"].__module__.split(".")[-2]


def with_kernels():
    """What is declared of the operators that have kernels of each backend, by name."""
    return {name: entry for name, entry in _operators.DECLARED.items() if "triton" in entry[1]}
