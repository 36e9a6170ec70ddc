"""The operators attention_gram_{fwd,bwd} in Triton: re-attention's workspace, without a mix and an output."""

from ...._layout import nothing
from .._triton import workspace


def attention_gram_fwd(q, k, scale, q2, k2, scale2):
    """As `vitdiv::attention_gram_fwd`: the centred Gram matrix of all heads, [B, H (+ H2), H (+ H2)]."""
    second = None if q2 is None else (q2, k2, scale2)
    return workspace.forward(*_without_mix(q, k, scale), False, True, second)[1]


def attention_gram_bwd(coupling, q, k, scale, q2, k2, scale2, needs):
    """As `vitdiv::attention_gram_bwd`: dq, dk, dq2, dk2, an empty tensor for what is not needed."""
    second = None if q2 is None else (q2, k2, scale2, needs[2], needs[3])
    wanted = needs[0], needs[1], False, False, False, False
    dq, dk, *others = workspace.backward(None, coupling, *_without_mix(q, k, scale), wanted, second)
    return dq, dk, *(others[-2:] if second else (nothing(q), nothing(q)))


def _without_mix(q, k, scale):
    """Re-attention's arguments from q to eps, for its Gram matrix: v has no part in it."""
    return q, k, k, scale, None, None, None, None, True, None, None, 0.0
