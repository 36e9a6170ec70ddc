"""Vectors brought near 1 by powers of two, which is exact: their squares and products stay within range.

For what is the same whatever the scale of the vectors.
"""

import torch

from ._autograd import transformed

# The first torch whose vmap takes view(dtype).
_VIEWS_IN_VMAP = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def power_of_two(size):
    """The largest power of two that `size` > 0 reaches, without gradient; 1 for Inf and NaN."""
    integer, exponent = (
        (torch.int64, 0x7FF0000000000000) if size.dtype == torch.float64 else (torch.int32, 0x7F800000)
    )
    power = _reinterpreted(_reinterpreted(size.detach(), integer) & exponent, size.dtype)
    return torch.where(power.isinf(), 1, power)


def _reinterpreted(x, dtype):
    if transformed() and not _VIEWS_IN_VMAP:
        return torch.view_copy(x, dtype=dtype)
    return x.view(dtype)


def near_one(x, eps):
    """`x / m` and `eps / m`, [..., 1], for m [..., 1] of about the largest entry of each vector; at least eps
    and the smallest normal number."""
    least = max(eps, torch.finfo(x.dtype).tiny)
    m = power_of_two(x.detach().abs().amax(-1, keepdim=True).clamp_min(least))
    return x / m, eps / m


def matrices_near_one(x):
    """`x / m` for one m of each matrix [..., N, D]."""
    size = x.detach().abs().amax((-2, -1), keepdim=True)
    return x / power_of_two(size.clamp_min(torch.finfo(x.dtype).tiny))
