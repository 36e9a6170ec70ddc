"""The plain formulas in float32 are accurate: twice their error is what a kernel in float32 may make."""

import importlib

import conftest
import pytest
import torch
from comparing import gradients, largest_error
from torch.utils._python_dispatch import TorchDispatchMode

from vitdiv_kernels import _dispatch

LIMIT = 1e-4  # of the largest element of a tensor
# By operation: those of its file of tests.
FORMULAS = {name: importlib.import_module(f"test_{name}").FORMULAS for name in _dispatch.OPERATIONS}
CASES = [(operation, name) for operation, found in FORMULAS.items() for name in found]
DEVICES = ["cpu", "cuda"] if conftest.HAS_GPU else ["cpu"]


def worst(operation, name, device):
    """The largest error of a result or a gradient in float32, relative to the largest element."""
    formula, make = FORMULAS[operation][name]
    found = []
    inputs = make()
    for dtype in (torch.float64, torch.float32):
        leaves = {key: x.to(device, dtype).detach().requires_grad_() for key, x in inputs.items()}
        with torch.device(device):
            outputs = formula(**leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        cotangents = [
            torch.linspace(-1, 1, x.numel(), device=device, dtype=dtype).view(x.shape) for x in outputs
        ]
        found.append([*outputs, *gradients(outputs, cotangents, leaves).values()])
    return max(
        largest_error(got, truth) / max(truth.abs().max().item(), 1e-30)
        for truth, got in zip(*found, strict=True)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("operation", "name"), CASES)
def test_it_is_accurate(operation, name, device):
    assert worst(operation, name, device) < LIMIT


class TF32(TorchDispatchMode):
    """Products and convolutions of float32 with operands of 10 bits, as tensor cores take them."""

    PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "convolution", "convolution_backward")

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator._schema.name.removeprefix("aten::") in self.PRODUCTS:
            args = torch.utils._pytree.tree_map_only(torch.Tensor, self.rounded, args)
        return operator(*args, **(kwargs or {}))

    @staticmethod
    def rounded(x):
        if x.dtype != torch.float32:
            return x
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize(("operation", "name"), CASES)
def test_that_sees_tf32(operation, name):
    """On a GPU this is what torch's default for convolutions makes of the budgets."""
    with TF32():
        assert worst(operation, name, "cpu") > LIMIT
