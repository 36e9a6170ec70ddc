"""Gradients of vectors from weights of all pairs, in Triton: the weights of some items, or of some rows of
one item, in a workspace of constant size, then one product with the other vectors.

Kernels that made the weights again for every few columns of the gradient were bound by L2:
docs/kernels/two_gram.md.
"""

import torch
import triton
import triton.language as tl

from .._launch import accumulator, capability, double, launch, split
from .._workspace import Chunk, chunks, padded, plan, workspace_bytes
from ._tiles import gradient_row
from ._triton import add_rows, gradient_columns, inverse_eps, through_norm, weight_types


def weighted_gradient(write, x, x_inverse_norms, y, y_inverse_norms, eps, *, dsums=None, factor=1.0):
    """dx = factor dsums (sum_j W y_hat - along x_hat) / |x|,  [items, N, D].

    write(chunk, weights) has a kernel write W times the inverse norms of y into `weights` [images, rows,
    padded M] and returns `along` [images, slots, rows], whose sum over the slots is
    that of W S, or None: x are no unit vectors.
    """
    items, rows, _ = x.shape
    columns = y.shape[1]
    # more than float16 holds
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    size = plan(items, 1, rows, columns, dtype.itemsize, 1, workspace_bytes(capability(x)))
    memory = x.new_empty(size.images * size.rows * padded(columns), dtype=dtype)
    gradient = x.new_empty(x.shape)
    for chunk in chunks(size, items, rows):
        images, part = chunk.last - chunk.first, chunk.bottom - chunk.top
        weights = memory[: images * part * padded(columns)].view(images, part, -1)
        along = write(chunk, weights)
        _multiply(
            weights, y[chunk.first : chunk.last], rows_of(x, chunk),
            None if along is None else rows_of(x_inverse_norms.view(items, rows), chunk),
            along, None if dsums is None else dsums[chunk.first : chunk.last], rows_of(gradient, chunk),
            factor, eps,
        )  # fmt: skip
    return gradient


def rows_of(tensor, chunk: Chunk):
    """Those of a chunk, of x or what has as many rows."""
    return tensor[chunk.first : chunk.last, chunk.top : chunk.bottom]


def _multiply(weights, y, x, x_inverse_norms, along, dsums, gradient, factor, eps):
    items, rows, width = x.shape
    config = gradient_row(x, capability(x))
    columns = gradient_columns(config.out, width, x, y, maxnreg=config.maxnreg)
    launch(
        weighted_rows_kernel,
        (items * triton.cdiv(rows, config.rows) * triton.cdiv(width, columns["BO"]),),
        weights, y, y.stride(0), y.stride(1), x, x.stride(0), x.stride(1), x_inverse_norms, along,
        1 if along is None else along.shape[1], dsums, gradient, gradient.stride(0), rows, y.shape[1], width,
        weights.shape[2], *split(factor),
        INVERSE_EPS=inverse_eps(eps), BR=config.rows, BC=config.inner, ACC=accumulator(x.dtype),
        **columns, **weight_types(x), num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


@triton.jit
def store_along(
    products, ALONG, item, i, j, row_tile, column_tile, column_tiles, rows, TRIANGLE: tl.constexpr
):
    """Writes the sums of a tile of W S along its rows and, where it stands for two, along its columns, each
    into a slot of its own."""
    # before the weights are written: S need not be kept any longer
    place = ALONG + (item * column_tiles + column_tile) * rows + i
    tl.store(place, tl.sum(products, 1), mask=i < rows)
    if TRIANGLE:
        if row_tile != column_tile:
            turned = ALONG + (item * column_tiles + row_tile) * rows + j
            tl.store(turned, tl.sum(products, 0), mask=j < rows)


@triton.jit
def store_weights(
    weights, WEIGHTS, i_inverse_norm, j_inverse_norm, item, i, j, rows, padded_columns, twice,
    HAS_NORM: tl.constexpr, TRIANGLE: tl.constexpr,
):  # fmt: skip
    """Writes a tile of weights, times the inverse norms of its columns, and `twice` of one set the same on
    the other side of the diagonal."""
    stored = weights
    if HAS_NORM:
        stored = weights * j_inverse_norm[None, :]
    places = WEIGHTS + (item * rows + i)[:, None] * padded_columns + j[None, :]
    mask = (i < rows)[:, None] & (j < padded_columns)[None, :]
    tl.store(places, stored.to(WEIGHTS.dtype.element_ty), mask=mask)
    if TRIANGLE:
        if twice:
            if HAS_NORM:
                weights *= i_inverse_norm[:, None]
            turned = tl.trans(weights.to(WEIGHTS.dtype.element_ty))
            turned_places = WEIGHTS + (item * rows + j)[:, None] * padded_columns + i[None, :]
            turned_mask = (j < rows)[:, None] & (i < padded_columns)[None, :]
            tl.store(turned_places, turned, mask=turned_mask)


# Numbers of rows help no load, so that one compiled kernel serves them all; strides and widths do.
@triton.jit(
    do_not_specialize=["slots", "N", "M"],
    do_not_specialize_on_alignment=["X_INVERSE_NORMS", "ALONG", "DSUMS"],
)
def weighted_rows_kernel(
    WEIGHTS,  # [L, N, padded M]
    Y, y_item, y_row,  # [L, M, D] and its strides
    X, x_item, x_row,  # [L, N, D]
    X_INVERSE_NORMS,  # [L, N], or None
    ALONG,  # [L, slots, N], or None
    slots,
    DSUMS,  # [L], or None
    DX, dx_item,  # [L, N, D] and its stride
    N,
    M,
    D,
    padded_columns,
    factor_high, factor_low,  # see `double`
    INVERSE_EPS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr, ACC: tl.constexpr,
    WT: tl.constexpr, WPREC: tl.constexpr,
):  # fmt: skip
    """dx = factor dsum (sum_j weights y - along x_hat) / |x|,  along = sum over the slots: BR x BO of it."""
    row_tiles = tl.cdiv(N, BR)
    out_tiles = tl.cdiv(D, BO)
    item = (tl.program_id(0) // (row_tiles * out_tiles)).to(tl.int64)
    i = tl.program_id(0) // out_tiles % row_tiles * BR + tl.arange(0, BR)
    o = tl.program_id(0) % out_tiles * BO + tl.arange(0, BO)
    out_mask = (o < D)[None, :]
    weights_rows = WEIGHTS + (item * N + i)[:, None] * padded_columns
    y_columns = Y + item * y_item + o[None, :]
    dx = tl.zeros((BR, BO), ACC)
    for j0 in tl.range(0, M, BC):
        j = j0 + tl.arange(0, BC)
        # whole rows, padding too, for loads of 16 bytes
        mask = (i < N)[:, None] & (j < padded_columns)[None, :]
        weights = tl.load(weights_rows + j[None, :], mask=mask, other=0.0)
        places = y_columns + j.to(tl.int64)[:, None] * y_row
        dx = add_rows(dx, weights, places, (j < M)[:, None] & out_mask, WT, WPREC, ACC)
    mask = (i < N)[:, None] & out_mask
    if X_INVERSE_NORMS is not None:
        along = tl.zeros((BR,), ACC)
        for slot in tl.range(0, slots):
            along += tl.load(ALONG + (item * slots + slot) * N + i, mask=i < N, other=0.0)
        x_inverse_norm = tl.load(X_INVERSE_NORMS + item * N + i, mask=i < N, other=0.0)
        places = X + item * x_item + i.to(tl.int64)[:, None] * x_row + o[None, :]
        x = tl.load(places, mask=mask, other=0.0).to(ACC)
        dx = through_norm(dx, x, x_inverse_norm, along, INVERSE_EPS, BR, ACC)
    factor = double(factor_high, factor_low, ACC)
    if DSUMS is not None:
        factor *= tl.load(DSUMS + item)
    place = DX + item * dx_item + i.to(tl.int64)[:, None] * D + o[None, :]
    tl.store(place, (factor * dx).to(DX.dtype.element_ty), mask=mask)
