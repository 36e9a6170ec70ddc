"""The operators attention_gram_{fwd,bwd} in Triton; the kernels are in ../_triton_maps.py."""

from .._layout import heads_like, nothing
from .._triton_sweeps import Maps


def attention_gram_fwd(q, k, scale, q2, k2, scale2):
    """As `vitdiv::attention_gram_fwd`: the centred Gram matrix of all heads, [B, H (+ H2), H (+ H2)]."""
    return _maps(q, k, scale, q2, k2, scale2).softmax(gram=True, statistics=False)[3]


def attention_gram_bwd(coupling, q, k, scale, q2, k2, scale2, needs):
    """As `vitdiv::attention_gram_bwd`: dq, dk, dq2, dk2, an empty tensor for what is not needed."""
    maps = _maps(q, k, scale, q2, k2, scale2)
    needs_q, needs_k = needs[0] or needs[2], needs[1] or needs[3]
    dq = dk = None
    if needs_q or needs_k:
        shift, rate, delta, _ = maps.softmax(coupling)
        dq, dk, _ = maps.gradients((shift, rate), delta, coupling, None, needs_q, needs_k, False)
    heads = q.shape[1]
    whole = dq, dk, dq, dk
    return tuple(
        _part(gradient, x, slice(heads) if layer == 0 else slice(heads, None), q2 is None)
        if need
        else nothing(q)
        for gradient, x, layer, need in zip(whole, (q, k, q2, k2), (0, 0, 1, 1), needs, strict=True)
    )


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


def _part(gradient, x, heads, whole):
    if whole:
        return gradient
    result = heads_like(x)
    result.copy_(gradient[:, heads, :, : x.shape[3]])
    return result
