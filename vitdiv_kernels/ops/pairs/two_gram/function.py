"""The operators `two_gram_{fwd,bwd}`: schemas, fake kernels, derivative; maths in README.md."""

import functools

from ...._layout import accumulation_dtype, items, nothing, requires_grad, when
from ... import _flops, _sharding, _vmap
from ..._operators import define
from .._inverse_norms import new_inverse_norms


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
    return sums, new_inverse_norms(x, y) if normalise and (needs_dx or needs_dy) else nothing(x)


def _bwd_fake(dsums, x, y, saved, penalty, margin, normalise, eps, needs_dx, needs_dy):
    dx = x.new_empty(x.shape) if needs_dx else nothing(x)
    dy = x.new_empty(y.shape) if needs_dy else nothing(x)
    return dx, dy


def _setup(ctx, inputs, outputs):
    x, y, *ctx.options, needs_dx, needs_dy = inputs
    ctx.saved_for = needs_dx, needs_dy
    ctx.save_for_backward(x, y, outputs[1])
    ctx.mark_non_differentiable(outputs[1])


def _backward(ctx, operator, needs, dsums, _):
    x, y, saved = ctx.saved_tensors
    needs = tuple(needs[:2])
    if needs != ctx.saved_for:  # an exported program, traced where other gradients were asked for
        saved = operator("two_gram_fwd")(x, y, *ctx.options, *needs)[1]
    dx, dy = operator("two_gram_bwd")(dsums, x, y, saved, *ctx.options, *needs)
    return when(needs[0], dx), when(needs[1], dy)


def _fwd_flops(x, y, *_, **__):
    return _flops.pairs(x) + (0 if y is None else _flops.pairs(y))


def _bwd_flops(dsums, x, y, saved, penalty, margin, normalise, eps, needs_dx, needs_dy, **_):
    return needs_dx * _flops.pairs(x) + (_flops.pairs(y) if needs_dy else 0)


_fwd = define(
    "two_gram_fwd",
    "(Tensor x, Tensor? y, str penalty, float margin, bool normalise, float eps, bool needs_dx,"
    " bool needs_dy) -> (Tensor sums, Tensor saved)",
    _fwd_fake,
    triton_fake=_fwd_triton_fake,
    setup=_setup,
    backward=_backward,
    folds=_vmap.sets_forward,
    shards=_sharding.sets_forward,
    flops=_fwd_flops,
)
_bwd = define(
    "two_gram_bwd",
    "(Tensor dsums, Tensor x, Tensor? y, Tensor saved, str penalty, float margin, bool normalise, float eps,"
    " bool needs_dx, bool needs_dy) -> (Tensor dx, Tensor dy)",
    _bwd_fake,
    folds=functools.partial(_vmap.sets_backward, first=1),
    shards=functools.partial(_sharding.sets_backward, first=1),
    flops=_bwd_flops,
)


def two_gram_sums(x, y, *, penalty, margin, normalise, eps, backend):
    """Sum of the penalty over the N^2 pairs of each leading index: [*leading], float32 or float64."""
    needs = requires_grad(x), requires_grad(y)
    sums, _ = _fwd[backend](x, y, penalty, float(margin), normalise, eps, *needs)
    return sums.reshape(x.shape[:-2])
