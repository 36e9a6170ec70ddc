"""The operators `pairwise_logsumexp_{fwd,bwd}`, with their autograd.Function, and `pairwise_nearest`; maths
in README.md."""

import torch

from .._autograd import once_differentiable
from .._layout import accumulation_dtype, items, nothing, when
from .._norms import new_norms
from .._operators import define


def _fwd_fake(x, y, scale, eps, for_backward):
    rows = x.new_empty((items(x), x.shape[-2]), dtype=accumulation_dtype(x))
    if x.device.type == "cpu" and for_backward and y is not None:  # the gradients for drows = 1
        vectors = x.shape[-2] + y.shape[-2]
        return rows, x.new_empty(items(x) * vectors * x.shape[-1], dtype=rows.dtype)
    return rows, nothing(x)


def _fwd_triton_fake(x, y, scale, eps, for_backward):
    rows = x.new_empty((items(x), x.shape[-2]), dtype=accumulation_dtype(x))
    return rows, new_norms(x, y) if for_backward else nothing(x)


def _bwd_fake(drows, rows, x, y, saved, scale, eps, needs_dx, needs_dy):
    dx = x.new_empty(x.shape) if needs_dx else nothing(x)
    dy = x.new_empty(y.shape) if needs_dy else nothing(x)
    return dx, dy


def _nearest_fake(x, y, eps):
    return x.new_empty((items(x), x.shape[-2]), dtype=torch.int64)


_fwd = define(
    "pairwise_logsumexp_fwd",
    "(Tensor x, Tensor? y, float scale, float eps, bool for_backward) -> (Tensor rows, Tensor saved)",
    _fwd_fake,
    _fwd_triton_fake,
)
_bwd = define(
    "pairwise_logsumexp_bwd",
    "(Tensor drows, Tensor rows, Tensor x, Tensor? y, Tensor saved, float scale, float eps, bool needs_dx,"
    " bool needs_dy) -> (Tensor dx, Tensor dy)",
    _bwd_fake,
)
_nearest = define("pairwise_nearest", "(Tensor x, Tensor? y, float eps) -> Tensor", _nearest_fake)


class PairwiseLogSumExpFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, scale, eps, backend):
        for_backward = any(ctx.needs_input_grad)
        rows, saved = _fwd[backend](x, y, scale, eps, for_backward)
        if for_backward:
            ctx.save_for_backward(rows, x, y, saved)
            ctx.options = scale, eps
            ctx.backend = backend
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx, drows):
        needs_dx, needs_dy = ctx.needs_input_grad[:2]
        dx, dy = _bwd[ctx.backend](drows, *ctx.saved_tensors, *ctx.options, needs_dx, needs_dy)
        return when(needs_dx, dx), when(needs_dy, dy), *(None,) * 3


def logsumexp(x, y, *, scale, eps, backend):
    """log sum_j exp(scale S_ij), [*leading, N]; without j = i when y is None."""
    rows = PairwiseLogSumExpFunction.apply(x, y, float(scale), eps, backend)
    return rows.reshape(x.shape[:-1])


@torch.no_grad()
def nearest(x, y, *, eps, backend):
    """argmax_j S_ij, [*leading, N]; without j = i when y is None."""
    return _nearest[backend](x, y, eps).reshape(x.shape[:-1])
