"""The operators `pairwise_cosine_{fwd,bwd}` and their autograd.Function; maths in README.md."""

import torch

from .._autograd import once_differentiable
from .._layout import accumulation_dtype, items, nothing, when
from .._operators import define
from .gpu_saved import new_saved


def _saved(x, y, penalty, for_backward):
    """What the compiled backward needs beside x and y; on CPUs sums of unit rows, or signs, or nothing."""
    if x.device.type == "cuda":
        return new_saved(x, y, penalty) if for_backward else nothing(x)
    rows, columns = x.shape[-2], (x if y is None else y).shape[-2]
    if penalty == "signed":
        return x.new_empty((1 if y is None else 2, items(x), x.shape[-1]), dtype=accumulation_dtype(x))
    if for_backward and penalty in ("abs", "relu"):
        planes = 2 if penalty == "abs" else 1
        return x.new_zeros((items(x), rows, planes, (columns + 31) // 32), dtype=torch.int32)
    return nothing(x)


def _fwd_fake(x, y, penalty, include_self, eps, for_backward):
    sums = x.new_empty(items(x), dtype=accumulation_dtype(x))
    return sums, _saved(x, y, penalty, for_backward)


def _fwd_triton_fake(x, y, penalty, include_self, eps, for_backward):
    sums = x.new_empty(items(x), dtype=accumulation_dtype(x))
    return sums, new_saved(x, y, penalty) if for_backward else nothing(x)


def _bwd_fake(dsums, x, y, saved, penalty, include_self, eps, needs_dx, needs_dy):
    dx = x.new_empty(x.shape) if needs_dx else nothing(x)
    dy = x.new_empty(y.shape) if needs_dy else nothing(x)
    return dx, dy


_fwd = define(
    "pairwise_cosine_fwd",
    "(Tensor x, Tensor? y, str penalty, bool include_self, float eps, bool for_backward)"
    " -> (Tensor sums, Tensor saved)",
    _fwd_fake,
    _fwd_triton_fake,
)
_bwd = define(
    "pairwise_cosine_bwd",
    "(Tensor dsums, Tensor x, Tensor? y, Tensor saved, str penalty, bool include_self, float eps,"
    " bool needs_dx, bool needs_dy) -> (Tensor dx, Tensor dy)",
    _bwd_fake,
)


class PairwiseCosineFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, penalty, include_self, eps, backend):
        for_backward = any(ctx.needs_input_grad)
        sums, saved = _fwd[backend](x, y, penalty, include_self, eps, for_backward)
        if for_backward:
            ctx.save_for_backward(x, y, saved)
            ctx.options = penalty, include_self, eps
            ctx.backend = backend
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, dsums):
        x, y, saved = ctx.saved_tensors
        needs_dx, needs_dy = ctx.needs_input_grad[:2]
        dx, dy = _bwd[ctx.backend](dsums, x, y, saved, *ctx.options, needs_dx, needs_dy)
        return when(needs_dx, dx), when(needs_dy, dy), *(None,) * 4


def pairwise_cosine_sums(x, y, *, penalty, include_self, eps, backend):
    """Sum of the penalty over the ordered pairs of each leading index: [...], float32 or float64."""
    return PairwiseCosineFunction.apply(x, y, penalty, include_self, eps, backend).reshape(x.shape[:-2])
