"""The operators attention_gram_{fwd,bwd} in Triton; the kernels are in ../_triton.

More heads, or wider ones, than their tiles hold go through the workspace of re-attention, without a mix.
"""

from ...._layout import accumulation_dtype, heads_like, nothing
from ..._launch import capability
from .._triton import workspace
from .._triton.sweeps import Maps
from .._triton.tiles import too_large


def attention_gram_fwd(q, k, scale, q2, k2, scale2):
    """As `vitdiv::attention_gram_fwd`: the centred Gram matrix of all heads, [B, H (+ H2), H (+ H2)]."""
    if _too_large(q, q2):
        q, k, scale, _ = _one_layer(q, k, scale, q2, k2, scale2)
        return workspace.forward(*_without_mix(q, k, scale, None), False, True)[1]
    return _maps(q, k, scale, q2, k2, scale2).softmax(gram=True, statistics=False)[3]


def attention_gram_bwd(coupling, q, k, scale, q2, k2, scale2, needs):
    """As `vitdiv::attention_gram_bwd`: dq, dk, dq2, dk2, an empty tensor for what is not needed."""
    needs_q, needs_k = needs[0] or needs[2], needs[1] or needs[3]
    dq = dk = None
    factors = 1, 1
    if _too_large(q, q2):
        joined_q, joined_k, factor, factors = _one_layer(q, k, scale, q2, k2, scale2)
        wanted = needs_q, needs_k, False, False, False, False
        coupling = coupling.contiguous()
        arguments = _without_mix(joined_q, joined_k, factor, coupling)
        dq, dk, *_ = workspace.backward(None, coupling, *arguments, wanted)
    elif needs_q or needs_k:
        maps = _maps(q, k, scale, q2, k2, scale2)
        row_max, row_scale, row_dot, _ = maps.softmax(coupling)
        dq, dk, _ = maps.gradients((row_max, row_scale), row_dot, coupling, None, needs_q, needs_k, False)
    heads = q.shape[1]
    return tuple(
        _part(gradient, x, slice(heads) if layer == 0 else slice(heads, None), q2 is None, factor)
        if need
        else nothing(q)
        for gradient, x, layer, need, factor in zip(
            (dq, dk, dq, dk), (q, k, q2, k2), (0, 0, 1, 1), needs, (factors[0], 1, factors[1], 1), strict=True
        )
    )


def _without_mix(q, k, scale, matrix):
    """Re-attention's arguments from q to eps, for its Gram matrix: v and mix have no part in it."""
    return q, k, k, scale, None, None, matrix, None, True, None, None, 0.0


def _too_large(q, q2):
    heads, width = q.shape[1], q.shape[3]
    if q2 is not None:
        heads, width = heads + q2.shape[1], max(width, q2.shape[3])
    return too_large(heads, width, q.dtype, False, capability(q))


def _one_layer(q, k, scale, q2, k2, scale2):
    """(q, k, scale of all heads, what q of each layer was multiplied by)"""
    if q2 is None:
        return q, k, scale, (1, 1)
    if scale == scale2:
        return _joined(q, q2), _joined(k, k2), scale, (1, 1)
    # more digits, for products with a scale are rounded
    dtype = accumulation_dtype(q)
    q, k, q2, k2 = (x.to(dtype) for x in (q, k, q2, k2))
    return _joined(q * scale, q2 * scale2), _joined(k, k2), 1.0, (scale, scale2)


def _maps(q, k, scale, q2, k2, scale2):
    if q2 is None:
        return Maps(q, k, scale)
    return Maps(_joined(q, q2), _joined(k, k2), scale, first_heads=q.shape[1], scale2=scale2)


def _joined(x, x2):
    """The heads of two layers in a row, the narrower padded with zeros: one copy, small beside the maps."""
    b, h, n, d = x.shape
    both = x.new_zeros(b, n, h + x2.shape[1], -(-max(d, x2.shape[3]) // 16) * 16).transpose(1, 2)
    both[:, :h, :, :d] = x
    both[:, h:, :, : x2.shape[3]] = x2
    return both


def _part(gradient, x, heads, whole, factor):
    if whole:
        return gradient
    result = heads_like(x)
    result.copy_(gradient[:, heads, :, : x.shape[3]] * factor)
    return result
