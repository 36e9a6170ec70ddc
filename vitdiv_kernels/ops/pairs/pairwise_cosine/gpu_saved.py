"""What the forward of pairwise_cosine keeps for its backward on GPUs: one flat tensor, cut into sections.

The Triton and the CUDA kernels have the same. It is torch only, for the fake kernel has to know its size.
"""

import math

import torch

from ...._layout import accumulation_dtype, items

_ALIGN = 16  # words of 4 bytes, so that every section starts where the kernels may load 16 bytes at once


def is_closed(x, y, penalty):
    """Whether the penalty has a closed form that is cheaper than all pairs.

    The Gram matrix of the square one is made by a library product, both halves of it, while tiles make S once
    forward and again for each part of the width backward.
    """
    if penalty != "square":
        return penalty == "signed"
    rows, columns, width = x.shape[-2], (x if y is None else y).shape[-2], x.shape[-1]
    # x_hat^T x_hat sums as many products as there are rows, of up to 1: float16 ends at 65504
    fits = x.dtype != torch.float16 or max(rows, columns) <= 2**15
    return fits and (rows + columns) * width < rows * columns


def signs_shape(x, y, penalty):
    """Of words of 32 bits: bit j % 32 of word [i, plane, j // 32], planes S > 0 and, for abs, S < 0; None
    where the backward has no use for them."""
    columns = (x if y is None else y).shape[-2]
    planes = {"abs": 2, "relu": 1}.get(penalty)
    return planes and (items(x), x.shape[-2], planes, (columns + 31) // 32)


def _shapes(x, y, penalty):
    """Name, shape and element type (None: the accumulation dtype) of each section.

    inverse_norms: 1 / max(|row|, eps).  unit_sum: the sum of unit rows.  penalties: sums of the penalty along
    rows of S and along its columns.  signs: with one set of rows only for j >= i.
    """
    sets = [("x", x)] if y is None else [("x", x), ("y", y)]
    shapes = [(f"{name}_inverse_norms", (items(x), rows.shape[-2]), None) for name, rows in sets]
    if penalty == "signed":
        shapes += [(f"{name}_unit_sum", (items(x), x.shape[-1]), None) for name, _ in sets]
    else:  # the closed form of square leaves them as they are
        shapes += [(f"{name}_penalties", (items(x), rows.shape[-2]), None) for name, rows in sets]
    signs = signs_shape(x, y, penalty)
    return [*shapes, ("signs", signs, torch.int32)] if signs else shapes


def _places(x, y, penalty):
    """Sections by name: start and length in the flat tensor, shape, element type; and the tensor's length."""
    places, end = {}, 0
    for name, shape, dtype in _shapes(x, y, penalty):
        dtype = dtype or accumulation_dtype(x)
        length = math.prod(shape) * (dtype.itemsize // 4)
        places[name] = end, length, shape, dtype
        end = end + (length + _ALIGN - 1) // _ALIGN * _ALIGN
    return places, end


def new_saved(x, y, penalty):
    """The flat tensor, of int32: zeros, for the signs below the diagonal and the gaps are not written."""
    return x.new_zeros(_places(x, y, penalty)[1], dtype=torch.int32)


def sections(saved, x, y, penalty):
    """Views of the flat tensor by name."""
    return {
        name: saved[start : start + length].view(dtype).view(shape)
        for name, (start, length, shape, dtype) in _places(x, y, penalty)[0].items()
    }
