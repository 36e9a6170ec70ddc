"""The inverse norms that kernels of pairs keep for their backward: one flat tensor of a section for each set.

It is torch only, for the fake kernels have to know its size.
"""

from ._layout import accumulation_dtype, items

_ALIGN = 16  # every section starts where kernels may load 16 bytes at once, whatever N is


def _sizes(x, y):
    return [items(x) * rows.shape[-2] for rows in (x, y) if rows is not None]


def _padded(size):
    return (size + _ALIGN - 1) // _ALIGN * _ALIGN


def new_norms(x, y):
    """The flat tensor for x [.., N, D] and, unless None, y [.., M, D2]."""
    return x.new_empty(sum(map(_padded, _sizes(x, y))), dtype=accumulation_dtype(x))


def norms_of(saved, x, y):
    """Its sections, [items * N] of x and [items * M] of y, or None."""
    first, *second = _sizes(x, y)
    start = _padded(first)
    return saved[:first], saved[start : start + second[0]] if second else None
