"""The operators `pairwise_cosine_{fwd,bwd}`: schemas, fake kernels, derivative; maths in README.md."""

import functools

import torch

from ...._layout import accumulation_dtype, items, nothing, requires_grad, when
from ... import _flops, _sharding, _vmap
from ..._operators import define
from .gpu_saved import new_saved, signs_shape


def _saved(x, y, penalty, for_backward):
    """What the compiled backward needs beside x and y; on CPUs sums of unit rows, or signs, or nothing."""
    if x.device.type == "cuda":
        return new_saved(x, y, penalty) if for_backward else nothing(x)
    if penalty == "signed":
        return x.new_empty((1 if y is None else 2, items(x), x.shape[-1]), dtype=accumulation_dtype(x))
    signs = signs_shape(x, y, penalty) if for_backward else None
    return x.new_zeros(signs, dtype=torch.int32) if signs else nothing(x)


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


def _setup(ctx, inputs, outputs):
    x, y, *ctx.options, ctx.for_backward = inputs
    ctx.save_for_backward(x, y, outputs[1])
    ctx.mark_non_differentiable(outputs[1])


def _backward(ctx, operator, needs, dsums, _):
    x, y, saved = ctx.saved_tensors
    if not ctx.for_backward:  # an exported program, traced where nothing asked for gradients
        saved = operator("pairwise_cosine_fwd")(x, y, *ctx.options, True)[1]
    dx, dy = operator("pairwise_cosine_bwd")(dsums, x, y, saved, *ctx.options, *needs[:2])
    return when(needs[0], dx), when(needs[1], dy)


def _fwd_flops(x, y, penalty, *_, **__):
    return _flops.closed(x, y) if penalty == "signed" else _flops.pairs(x, y)


def _bwd_flops(dsums, x, y, saved, penalty, include_self, eps, needs_dx, needs_dy, **_):
    if penalty == "signed":
        return _flops.closed(x, y)
    again = penalty == "square"
    return (again + needs_dx + needs_dy) * _flops.pairs(x, y)


_fwd = define(
    "pairwise_cosine_fwd",
    "(Tensor x, Tensor? y, str penalty, bool include_self, float eps, bool for_backward)"
    " -> (Tensor sums, Tensor saved)",
    _fwd_fake,
    triton_fake=_fwd_triton_fake,
    setup=_setup,
    backward=_backward,
    folds=_vmap.sets_forward,
    shards=_sharding.sets_forward,
    flops=_fwd_flops,
)
_bwd = define(
    "pairwise_cosine_bwd",
    "(Tensor dsums, Tensor x, Tensor? y, Tensor saved, str penalty, bool include_self, float eps,"
    " bool needs_dx, bool needs_dy) -> (Tensor dx, Tensor dy)",
    _bwd_fake,
    folds=functools.partial(_vmap.sets_backward, first=1),
    shards=functools.partial(_sharding.sets_backward, first=1),
    flops=_bwd_flops,
)


def pairwise_cosine_sums(x, y, *, penalty, include_self, eps, backend):
    """Sum of the penalty over the ordered pairs of each leading index: [...], float32 or float64."""
    sums, _ = _fwd[backend](x, y, penalty, include_self, eps, requires_grad(x, y))
    return sums.reshape(x.shape[:-2])
