"""The operators `pairwise_logsumexp_{fwd,bwd}` and `pairwise_nearest`: schemas, fake kernels, derivative;
maths in README.md."""

import functools

import torch

from ...._layout import accumulation_dtype, items, nothing, requires_grad, when
from ... import _flops, _sharding, _vmap
from ..._operators import define
from .._inverse_norms import new_inverse_norms


def _fwd_fake(x, y, scale, eps, for_backward):
    rows = x.new_empty((items(x), x.shape[-2]), dtype=accumulation_dtype(x))
    if x.device.type == "cpu" and for_backward and y is not None:  # the gradients for drows = 1
        vectors = x.shape[-2] + y.shape[-2]
        return rows, x.new_empty(items(x) * vectors * x.shape[-1], dtype=rows.dtype)
    return rows, nothing(x)


def _fwd_triton_fake(x, y, scale, eps, for_backward):
    rows = x.new_empty((items(x), x.shape[-2]), dtype=accumulation_dtype(x))
    return rows, new_inverse_norms(x, y) if for_backward else nothing(x)


def _bwd_fake(drows, rows, x, y, saved, scale, eps, needs_dx, needs_dy):
    dx = x.new_empty(x.shape) if needs_dx else nothing(x)
    dy = x.new_empty(y.shape) if needs_dy else nothing(x)
    return dx, dy


def _nearest_fake(x, y, eps):
    return x.new_empty((items(x), x.shape[-2]), dtype=torch.int64)


def _setup(ctx, inputs, outputs):
    x, y, *ctx.options, ctx.for_backward = inputs
    rows, saved = outputs
    ctx.save_for_backward(rows, x, y, saved)
    ctx.mark_non_differentiable(saved)


def _backward(ctx, operator, needs, drows, _):
    rows, x, y, saved = ctx.saved_tensors
    if not ctx.for_backward:  # an exported program, traced where nothing asked for gradients
        saved = operator("pairwise_logsumexp_fwd")(x, y, *ctx.options, True)[1]
    dx, dy = operator("pairwise_logsumexp_bwd")(drows, rows, x, y, saved, *ctx.options, *needs[:2])
    return when(needs[0], dx), when(needs[1], dy)


def _fwd_flops(x, y, *_, **__):
    return _flops.pairs(x, y)


def _bwd_flops(drows, rows, x, y, saved, scale, eps, needs_dx, needs_dy, **_):
    return (1 + needs_dx + needs_dy) * _flops.pairs(x, y)


def _nearest_shards(inputs):
    plan = _sharding.sets_forward(inputs)
    return plan and (plan[0], plan[1][:1])


_fwd = define(
    "pairwise_logsumexp_fwd",
    "(Tensor x, Tensor? y, float scale, float eps, bool for_backward) -> (Tensor rows, Tensor saved)",
    _fwd_fake,
    triton_fake=_fwd_triton_fake,
    setup=_setup,
    backward=_backward,
    folds=_vmap.sets_forward,
    shards=_sharding.sets_forward,
    flops=_fwd_flops,
)
_bwd = define(
    "pairwise_logsumexp_bwd",
    "(Tensor drows, Tensor rows, Tensor x, Tensor? y, Tensor saved, float scale, float eps, bool needs_dx,"
    " bool needs_dy) -> (Tensor dx, Tensor dy)",
    _bwd_fake,
    folds=functools.partial(_vmap.sets_backward, first=2),
    shards=functools.partial(_sharding.sets_backward, first=2),
    flops=_bwd_flops,
)
_nearest = define(
    "pairwise_nearest",
    "(Tensor x, Tensor? y, float eps) -> Tensor",
    _nearest_fake,
    folds=_vmap.nearest,
    shards=_nearest_shards,
    flops=_fwd_flops,
)


def logsumexp(x, y, *, scale, eps, backend):
    """log sum_j exp(scale S_ij), [*leading, N]; without j = i when y is None."""
    rows, _ = _fwd[backend](x, y, float(scale), eps, requires_grad(x, y))
    return rows.reshape(x.shape[:-1])


@torch.no_grad()
def nearest(x, y, *, eps, backend):
    """argmax_j S_ij, [*leading, N]; without j = i when y is None."""
    return _nearest[backend](x, y, eps).reshape(x.shape[:-1])
