"""The operators `attention_gram_{fwd,bwd}`: schemas, fake kernels, derivative; the maths is in README.md."""

from ...._layout import accumulation_dtype, heads_like, nothing, when
from ... import _flops
from ..._operators import define
from ..._sharding import BATCH, WHOLE, batch_where, by_items
from ..._vmap import JOIN


def _fwd_fake(q, k, scale, q2, k2, scale2):
    heads = q.shape[1] + (0 if q2 is None else q2.shape[1])
    return q.new_empty((q.shape[0], heads, heads), dtype=accumulation_dtype(q))


def _bwd_fake(coupling, q, k, scale, q2, k2, scale2, needs):
    inputs = q, k, q2, k2
    return tuple(heads_like(x) if need else nothing(q) for x, need in zip(inputs, needs, strict=True))


def _setup(ctx, inputs, output):
    q, k, scale, q2, k2, scale2 = inputs
    ctx.save_for_backward(q, k, q2, k2)
    ctx.scales = scale, scale2


def _backward(ctx, operator, needs, dgram):
    q, k, q2, k2 = ctx.saved_tensors
    scale, scale2 = ctx.scales
    needs = [needs[i] for i in (0, 1, 3, 4)]
    coupling = dgram + dgram.mT
    found = operator("attention_gram_bwd")(coupling, q, k, scale, q2, k2, scale2, needs)
    dq, dk, dq2, dk2 = (when(need, gradient) for need, gradient in zip(needs, found, strict=True))
    return dq, dk, None, dq2, dk2


def _fwd_folds(inputs, dims):
    return (JOIN, JOIN, None, JOIN, JOIN, None), (JOIN,)


def _bwd_folds(inputs, dims):
    return (JOIN, JOIN, JOIN, None, JOIN, JOIN, None, None), tuple(
        JOIN if need else None for need in inputs[-1]
    )


def _fwd_shards(inputs):
    if not by_items(inputs[0]):
        return None
    return (BATCH, BATCH, WHOLE, BATCH, BATCH, WHOLE), (BATCH,)


def _bwd_shards(inputs):
    if not by_items(inputs[1]):
        return None
    into = (BATCH, BATCH, BATCH, WHOLE, BATCH, BATCH, WHOLE, WHOLE)
    return into, tuple(map(batch_where, inputs[-1]))


def _all_heads(q, q2):
    return q[1] + (0 if q2 is None else q2[1])


def _fwd_flops(q, k, scale, q2, k2, *_, **__):
    return sum(
        _flops.maps(a, b) + _flops.mixed(a, b, _all_heads(q, q2))
        for a, b in ((q, k), (q2, k2))
        if a is not None
    )


def _bwd_flops(coupling, q, k, scale, q2, k2, scale2, needs, **_):
    layers = ((q, k, needs[:2]), (q2, k2, needs[2:]))
    return sum(
        (1 + sum(need)) * _flops.maps(a, b) + _flops.mixed(a, b, _all_heads(q, q2))
        for a, b, need in layers
        if a is not None
    )


_fwd = define(
    "attention_gram_fwd",
    "(Tensor q, Tensor k, float scale, Tensor? q2, Tensor? k2, float scale2) -> Tensor",
    _fwd_fake,
    setup=_setup,
    backward=_backward,
    folds=_fwd_folds,
    shards=_fwd_shards,
    flops=_fwd_flops,
)
_bwd = define(
    "attention_gram_bwd",
    "(Tensor coupling, Tensor q, Tensor k, float scale, Tensor? q2, Tensor? k2, float scale2, bool[] needs)"
    " -> (Tensor dq, Tensor dk, Tensor dq2, Tensor dk2)",
    _bwd_fake,
    folds=_bwd_folds,
    shards=_bwd_shards,
    flops=_bwd_flops,
)


def head_gram(q, k, q2=None, k2=None, *, scale, scale2=None, backend):
    """Centred Gram matrix of all heads' maps, both layers' in a row: [B, H (+ H2), H (+ H2)]."""
    return _fwd[backend](q, k, scale, q2, k2, scale if scale2 is None else scale2)
