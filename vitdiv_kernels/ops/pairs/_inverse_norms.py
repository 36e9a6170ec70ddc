"""The inverse norms that the Triton kernels of pairs keep for their backward: one flat tensor, x first.

It is torch only, for the fake kernels have to know its size.
"""

from ..._layout import accumulation_dtype, items


def new_inverse_norms(x, y):
    """For x [.., N, D] and y [.., M, D2] or None."""
    vectors = x.shape[-2] + (0 if y is None else y.shape[-2])
    return x.new_empty(items(x) * vectors, dtype=accumulation_dtype(x))


def inverse_norms_of(saved, x, y):
    """Its sections, [items * N] of x and [items * M] of y, or None."""
    end = items(x) * x.shape[-2]
    return saved[:end], None if y is None else saved[end:]
