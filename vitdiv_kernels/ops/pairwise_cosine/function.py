"""The operators `vitdiv::pairwise_cosine_{fwd,bwd}` and their autograd.Function; maths in README.md."""

import torch

from .._autograd import once_differentiable
from .._layout import accumulation_dtype, nothing, when

torch.library.define(
    "vitdiv::pairwise_cosine_fwd",
    "(Tensor x, Tensor? y, str penalty, bool include_self, float eps, bool for_backward)"
    " -> (Tensor sums, Tensor saved)",
)
torch.library.define(
    "vitdiv::pairwise_cosine_bwd",
    "(Tensor dsums, Tensor x, Tensor? y, Tensor saved, str penalty, bool include_self, float eps,"
    " bool needs_dx, bool needs_dy) -> (Tensor dx, Tensor dy)",
)


def _items(x):
    items = 1
    for size in x.shape[:-2]:
        items = items * size
    return items


def _saved(x, y, penalty, for_backward):
    """What the backward needs beside x and y: sums of unit rows, or two bits a pair, or nothing."""
    items, rows, columns = _items(x), x.shape[-2], (x if y is None else y).shape[-2]
    if penalty == "signed":
        return x.new_empty((1 if y is None else 2, items, x.shape[-1]), dtype=accumulation_dtype(x))
    if for_backward and penalty in ("abs", "relu"):
        planes = 2 if penalty == "abs" else 1
        return x.new_zeros((items, rows, planes, (columns + 31) // 32), dtype=torch.int32)
    return nothing(x)


@torch.library.register_fake("vitdiv::pairwise_cosine_fwd")
def _(x, y, penalty, include_self, eps, for_backward):
    sums = x.new_empty(_items(x), dtype=accumulation_dtype(x))
    return sums, _saved(x, y, penalty, for_backward)


@torch.library.register_fake("vitdiv::pairwise_cosine_bwd")
def _(dsums, x, y, saved, penalty, include_self, eps, needs_dx, needs_dy):
    dx = x.new_empty(x.shape) if needs_dx else nothing(x)
    dy = x.new_empty(y.shape) if needs_dy else nothing(x)
    return dx, dy


_fwd = torch.ops.vitdiv.pairwise_cosine_fwd.default
_bwd = torch.ops.vitdiv.pairwise_cosine_bwd.default


class PairwiseCosineFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, penalty, include_self, eps):
        for_backward = any(ctx.needs_input_grad)
        sums, saved = _fwd(x, y, penalty, include_self, eps, for_backward)
        if for_backward:
            ctx.save_for_backward(x, y, saved)
            ctx.options = penalty, include_self, eps
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, dsums):
        x, y, saved = ctx.saved_tensors
        needs_dx, needs_dy = ctx.needs_input_grad[:2]
        dx, dy = _bwd(dsums, x, y, saved, *ctx.options, needs_dx, needs_dy)
        return when(needs_dx, dx), when(needs_dy, dy), None, None, None


def pairwise_cosine_sums(x, y, *, penalty, include_self, eps):
    """Sum of the penalty over the ordered pairs of each leading index: [...], float32 or float64."""
    return PairwiseCosineFunction.apply(x, y, penalty, include_self, eps).reshape(x.shape[:-2])
