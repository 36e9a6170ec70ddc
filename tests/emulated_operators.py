"""The package's operators over emulated CUDA kernels: "native" as CUDA tensors have it, on CPU tensors.

All host code is that of csrc/cuda/operators.h; only device and stream are left out.
"""

import functools
import importlib
from pathlib import Path

import pytest
import torch
from emulation_build import EMULATION, build, kernels

from vitdiv_kernels import _dispatch, _native

NAMESPACE = "vitdiv_emulated"


@functools.cache
def operators():
    """The package's operators by name, with emulated kernels; one that has no CUDA kernel raises."""
    folder = Path(torch.__file__).parent
    libraries = [kernels(), *(folder / f"lib/lib{name}.so" for name in ("c10", "torch_cpu", "torch"))]
    includes = [folder / "include", folder / "include/torch/csrc/api/include"]
    library = build(EMULATION / "operators.cpp", libraries=libraries, includes=includes)
    found = {}
    for table in operator_tables():
        name = table["native"]._schema.name.partition("::")[2]
        torch.library.define(f"{NAMESPACE}::{name}", str(table["native"]._schema).partition(f"::{name}")[2])
        found[name] = getattr(getattr(torch.ops, NAMESPACE), name).default
    torch.ops.load_library(library)
    return found


def take_the_place_of_native(monkeypatch):
    """backend="native" means the emulated kernels, as long as the monkeypatch lasts."""
    emulated = operators()
    for table in operator_tables():
        monkeypatch.setitem(table, "native", emulated[table["native"]._schema.name.partition("::")[2]])


def need(operation):
    """Skip the tests of an operation that has no CUDA kernels."""
    operators()
    if not _native.has_kernels(operation, NAMESPACE, "CPU"):
        pytest.skip(f"there is no CUDA kernel for {operation}")


def operator_tables():
    """What the package looks its operators up in, by backend."""
    for operation in _dispatch.OPERATIONS:
        module = importlib.import_module(f"vitdiv_kernels.ops.{operation}.function")
        yield from (table for table in vars(module).values() if isinstance(table, dict) and "native" in table)
