"""Triton kernels of re-attention: the operators of ../function.py, for `backend="triton"`.

Two schedules, docs/kernels/reattention.md has both: `streaming` walks the keys with a tile of all heads,
`workspace` holds the maps of a few images and lets library products and one row kernel work on them.
"""

from ..._triton import workspace
from . import streaming
from .dots import head_dots
from .schedule import chosen, schedule

__all__ = ["chosen", "head_dots", "reattention_bwd", "reattention_fwd", "schedule"]


def _module(direction, q, k, pre_mix, norm_weight):
    extras = pre_mix is not None or norm_weight is not None
    return streaming if chosen(direction, q, k, extras) == "streaming" else workspace


def reattention_fwd(q, k, v, scale, pre_mix, pre_bias, mix, bias, centred, norm_weight, *arguments):
    """As `vitdiv::reattention_fwd`: (out, centred Gram), an empty tensor for what is not needed."""
    return _module("forward", q, k, pre_mix, norm_weight).forward(
        q, k, v, scale, pre_mix, pre_bias, mix, bias, centred, norm_weight, *arguments
    )


def reattention_bwd(
    dout, coupling, q, k, v, scale, pre_mix, pre_bias, mix, bias, centred, norm_weight, *arguments
):
    """As `vitdiv::reattention_bwd`: dq, dk, dv, dpre_mix, dmix, dbias, dnorm_weight, dnorm_bias."""
    return _module("backward", q, k, pre_mix, norm_weight).backward(
        dout, coupling, q, k, v, scale, pre_mix, pre_bias, mix, bias, centred, norm_weight, *arguments
    )
