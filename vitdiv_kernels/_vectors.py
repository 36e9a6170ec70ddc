"""Unit vectors and penalties of their cosines, of vectors of any length.

Vectors are brought near 1 by powers of two, which is exact: their squares and products stay within range.
"""

import torch

from . import _checks
from ._autograd import transformed
from ._layout import accumulation_dtype

PENALTIES = {
    "signed": lambda s: s,
    "abs": torch.abs,
    "square": torch.square,
    "relu": torch.relu,
}

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


def normalise(x, eps):
    """Unit vectors along the last axis; a vector no longer than eps is divided by eps."""
    x, eps = near_one(x, eps)
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(eps)


def full_precision(*tensors):
    """The tensors in float32, or in float64 where they are."""
    return [tensor.to(accumulation_dtype(tensor)) for tensor in tensors]


def unit(x, eps):
    """`x / max(|x|, eps)` in float32 or float64."""
    (x,) = full_precision(x)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.clamp_min(eps) if within_range(x, norm, eps) else normalise(x, eps)


def scaled(x, eps):
    """(x, scale, radial), for gradients by hand: `x * scale`, scale [..., 1], are the unit vectors, or x with
    an eps of None. radial is the scale of the part along x that the normalisation takes out of a gradient:
    none, 0, where eps stands for the norm. The vectors are divided by powers of two where that is needed.
    """
    if eps is None:
        scale = x.new_ones(()).expand(*x.shape[:-1], 1)
        return x, scale, torch.zeros_like(scale)
    norm = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True)
    if not within_range(x, norm, eps):
        x, eps = near_one(x, eps)
        norm = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True)
    scale = norm.clamp_min(eps).reciprocal()
    return x, scale, scale.masked_fill(norm <= eps, 0)


def within_range(x, norm, eps):
    """Whether the norms of x, or eps for shorter ones, are known to be such that squares of x and of its
    products stay within range."""
    if not _checks.values_at_hand(x):
        return False
    if norm.numel() == 0:
        return True
    least, most = torch.aminmax(norm.detach().clamp_min(eps))
    # a third of the exponents on both sides of 1: scale^2 and what it multiplies keep their digits, too
    bound = 2.0**340 if x.dtype == torch.float64 else 2.0**42
    return bool((least > 1 / bound) & (most < bound))
