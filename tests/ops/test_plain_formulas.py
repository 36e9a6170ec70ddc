"""The plain formulas in float32 are accurate: twice their error is what a kernel in float32 may make."""

import conftest
import formulas
import pytest
import torch
from comparing import gradients, largest_error
from torch.utils._python_dispatch import TorchDispatchMode

from vitdiv_kernels import _dispatch

LIMIT = 1e-4  # of the largest element of a tensor
B, H, N, D = 2, 4, 65, 32


def heads(count):
    return dict(
        zip(("q", "k", "v"), torch.randn(count, B, H, N, D, dtype=torch.float64).unbind(), strict=False)
    )


def reattention(norm):
    def call(q, k, v, mix, pre_mix, norm_weight):
        options = {} if norm == "none" else {"norm": norm, "norm_weight": norm_weight, "training": True}
        return formulas.reattention(q, k, v, mix, pre_mix=pre_mix if norm == "none" else None, **options)

    return call


def reattention_inputs():
    mixes = {name: torch.randn(H, H, dtype=torch.float64) for name in ("mix", "pre_mix")}
    return heads(3) | mixes | {"norm_weight": 1 + 0.1 * torch.randn(H, dtype=torch.float64)}


def vectors(count=1):
    return dict(zip("xy", torch.randn(count, B, N, D, dtype=torch.float64).unbind(), strict=False))


# By operation: the formula and its inputs in float64.
FORMULAS = {
    "pairwise_cosine": {"two sets": (formulas.pairwise_cosine, lambda: vectors(2))},
    "pairwise_rows": {"logsumexp": (lambda x: formulas.pairwise_logsumexp(x, scale=10.0), vectors)},
    "two_gram": {"two sets": (formulas.two_gram, lambda: vectors(2))},
    "attention_gram": {
        "gram": (formulas.attention_gram, lambda: heads(2)),
        "cosine": (formulas.attention_cosine, lambda: heads(2)),
    },
    "reattention": {norm: (reattention(norm), reattention_inputs) for norm in ("none", "batch", "layer")},
}
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


def test_every_operation_has_one():
    assert set(FORMULAS) == set(_dispatch.OPERATIONS)


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
