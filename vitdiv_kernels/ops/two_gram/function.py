"""The operators `two_gram_{fwd,bwd}` and their autograd.Function; maths in README.md."""

import torch

from .._autograd import once_differentiable
from .._layout import accumulation_dtype, items, nothing, when
from .._norms import new_norms
from .._operators import define


def new_saved(x, y, needs_dx, needs_dy):
    """The gradients for dsums = 1 that are wanted, x's before y's, flat."""
    widths = (x.shape[-1] if needs_dx else 0) + (y.shape[-1] if needs_dy else 0)
    if not (needs_dx or needs_dy):
        return nothing(x)
    return x.new_empty(items(x) * x.shape[-2] * widths, dtype=accumulation_dtype(x))


def _fwd_fake(x, y, penalty, margin, normalise, eps, needs_dx, needs_dy):
    sums = x.new_empty(items(x), dtype=accumulation_dtype(x))
    return sums, nothing(x) if x.device.type == "cuda" else new_saved(x, y, needs_dx, needs_dy)


def _fwd_triton_fake(x, y, penalty, margin, normalise, eps, needs_dx, needs_dy):
    sums = x.new_empty(items(x), dtype=accumulation_dtype(x))
    return sums, new_norms(x, y) if normalise and (needs_dx or needs_dy) else nothing(x)


def _bwd_fake(dsums, x, y, saved, penalty, margin, normalise, eps, needs_dx, needs_dy):
    dx = x.new_empty(x.shape) if needs_dx else nothing(x)
    dy = x.new_empty(y.shape) if needs_dy else nothing(x)
    return dx, dy


_fwd = define(
    "two_gram_fwd",
    "(Tensor x, Tensor? y, str penalty, float margin, bool normalise, float eps, bool needs_dx,"
    " bool needs_dy) -> (Tensor sums, Tensor saved)",
    _fwd_fake,
    _fwd_triton_fake,
)
_bwd = define(
    "two_gram_bwd",
    "(Tensor dsums, Tensor x, Tensor? y, Tensor saved, str penalty, float margin, bool normalise, float eps,"
    " bool needs_dx, bool needs_dy) -> (Tensor dx, Tensor dy)",
    _bwd_fake,
)


class TwoGramFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, penalty, margin, normalise, eps, backend):
        needs = ctx.needs_input_grad[:2]
        sums, saved = _fwd[backend](x, y, penalty, margin, normalise, eps, *needs)
        if any(needs):
            ctx.save_for_backward(x, y, saved)
            ctx.options = penalty, margin, normalise, eps
            ctx.backend = backend
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, dsums):
        needs_dx, needs_dy = ctx.needs_input_grad[:2]
        dx, dy = _bwd[ctx.backend](dsums, *ctx.saved_tensors, *ctx.options, needs_dx, needs_dy)
        return when(needs_dx, dx), when(needs_dy, dy), *(None,) * 5


def two_gram_sums(x, y, *, penalty, margin, normalise, eps, backend):
    """Sum of the penalty over the N^2 pairs of each leading index: [*leading], float32 or float64."""
    sums = TwoGramFunction.apply(x, y, penalty, float(margin), normalise, eps, backend)
    return sums.reshape(x.shape[:-2])
