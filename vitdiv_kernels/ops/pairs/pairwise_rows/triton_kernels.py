"""pairwise_rows on NVIDIA GPUs: the operators' functions, then the kernels; the maths is in README.md."""

import torch
import triton
import triton.language as tl

from ...._layout import nothing
from ..._launch import accumulator, capability, double, launch, split
from .._inverse_norms import inverse_norms_of, new_inverse_norms
from .._tiles import forward_row, row_for
from .._triton import cosines, dot_types, items_of, read_rows, slices, tile_of
from .._weighted import rows_of, store_along, store_weights, weighted_gradient
from . import triton_configs as configs

_JOINED_ROWS = 128  # of a program that joins tiles: one a thread

# Up to this scale exp(scale S) and the sums of it, exp(-rows) too, are far from both ends of float32.
_BOUNDED_SCALE = 32


def pairwise_logsumexp_fwd(x, y, scale, eps, for_backward):
    x, y = items_of(x), None if y is None else items_of(y)
    saved = new_inverse_norms(x, y)
    parts, _ = _tiles(x, y, saved, eps, scale)
    if parts.shape[1] > 1:
        rows = parts.new_empty(parts.shape[0], parts.shape[2])
        _join(_join_logarithms_kernel, parts, rows)
    else:
        rows = parts[:, 0]
    return rows, saved if for_backward else nothing(x)


def pairwise_nearest(x, y, eps):
    x, y = items_of(x), None if y is None else items_of(y)
    parts, indices = _tiles(x, y, new_inverse_norms(x, y), eps, None)
    nearest = indices.new_empty(parts.shape[0], parts.shape[2], dtype=torch.int64)
    _join(_join_nearest_kernel, parts, indices, nearest)
    return nearest


def pairwise_logsumexp_bwd(drows, rows, x, y, saved, scale, eps, needs_dx, needs_dy):
    shapes = x.shape, None if y is None else y.shape
    x, y = items_of(x), None if y is None else items_of(y)
    x_inverse_norms, y_inverse_norms = inverse_norms_of(saved, x, y)
    own, statistics = (x, x_inverse_norms), (drows.contiguous(), rows.contiguous())
    other = own if y is None else (y, y_inverse_norms)
    dx = dy = nothing(x)
    if needs_dx:
        dx = _gradient(*own, *other, statistics, "both" if y is None else "own", scale, eps).view(shapes[0])
    if needs_dy:
        dy = _gradient(*other, *own, statistics, "other", scale, eps).view(shapes[1])
    return dx, dy


def _tiles(x, y, saved, eps, scale):
    """Log-sum-exp of each row of a tile of S, or with no scale its largest element and where that is.

    [items, tiles of columns, N] each, of which one program writes a slot.
    """
    one_set, other = y is None, x if y is None else y
    x_inverse_norms, y_inverse_norms = inverse_norms_of(saved, x, y)
    read_rows(x, x_inverse_norms, eps)
    if not one_set:
        read_rows(y, y_inverse_norms, eps)
    items, rows, width = x.shape
    columns = other.shape[1]
    config = forward_row(configs.FORWARD, x, columns, capability(x))
    row_tiles, column_tiles = triton.cdiv(rows, config.rows), triton.cdiv(columns, config.rows)
    # Products of float32 in three of TF32 are not the same to the bit when their factors change places: equal
    # vectors on both sides of the diagonal would not be equally near.
    triangle = one_set and (scale is not None or x.dtype != torch.float32)
    tiles = row_tiles * (row_tiles + 1) // 2 if triangle else row_tiles * column_tiles
    parts = saved.new_empty(items, column_tiles, rows)
    indices = None if scale is not None else parts.new_empty(parts.shape, dtype=torch.int32)
    launch(
        _tiles_kernel, (items * tiles,),
        x, x.stride(0), x.stride(1), other, other.stride(0), other.stride(1),
        x_inverse_norms, x_inverse_norms if one_set else y_inverse_norms, parts, indices,
        rows, columns, width, *split(1.0 if scale is None else scale),
        ONE_SET=one_set, TRIANGLE=triangle, BOUNDED=scale is not None and scale <= _BOUNDED_SCALE,
        BR=config.rows, BC=config.rows, **slices(config, x, other),
        **dot_types(x), num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return parts, indices


def _join(kernel, parts, *others):
    items, tiles, rows = parts.shape
    launch(
        kernel, (items * triton.cdiv(rows, _JOINED_ROWS),),
        parts, *others, rows, tiles, BN=_JOINED_ROWS, ACC=accumulator(parts.dtype), num_warps=4, num_stages=2,
    )  # fmt: skip


def _gradient(own, own_inverse_norms, other, other_inverse_norms, statistics, of, scale, eps):
    """The gradient of `own`; the statistics belong to its rows, to the other set's, or to both, one set."""
    items, rows, width = own.shape
    columns = other.shape[1]
    config = row_for(configs.WEIGHTS, own, capability(own))
    column_tiles = triton.cdiv(columns, config.rows)

    def write(chunk, weights):
        images, part = weights.shape[:2]
        row_tiles, triangle = triton.cdiv(part, config.rows), of == "both" and part == rows
        tiles = row_tiles * (row_tiles + 1) // 2 if triangle else row_tiles * column_tiles
        along = own_inverse_norms.new_empty(images, column_tiles, part)
        x, y = rows_of(own, chunk), other[chunk.first : chunk.last]
        launch(
            _weights_kernel, (images * tiles,),
            x, x.stride(0), x.stride(1), y, y.stride(0), y.stride(1),
            rows_of(own_inverse_norms.view(items, rows), chunk),
            other_inverse_norms.view(items, columns)[chunk.first : chunk.last],
            *(numbers[chunk.first : chunk.last] for numbers in statistics), weights, along,
            part, columns, width, weights.shape[2], chunk.top, *split(scale),
            OF=of, TRIANGLE=triangle, BOUNDED=scale <= _BOUNDED_SCALE, BR=config.rows, BC=config.rows,
            **slices(config, own, other),
            **dot_types(own), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        return along

    return weighted_gradient(write, own, own_inverse_norms, other, other_inverse_norms, eps, factor=scale)


# Numbers of rows help no load, so that one compiled kernel serves them all; strides and widths do.
_SPECIALIZATION = dict(
    do_not_specialize=["N", "M"], do_not_specialize_on_alignment=["X_INVERSE_NORMS", "Y_INVERSE_NORMS"]
)


@triton.jit
def _logarithms(s, AXIS: tl.constexpr, BOUNDED: tl.constexpr):
    """Log-sum-exp along an axis, -inf of nothing but -inf."""
    if BOUNDED:
        return tl.log(tl.sum(tl.exp(s), AXIS))
    else:
        largest = tl.max(s, AXIS)
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        return shift + tl.log(tl.sum(tl.exp(s - tl.expand_dims(shift, AXIS)), AXIS))


@triton.jit
def _largest(s, places, AXIS: tl.constexpr):
    """The largest element along an axis and the first of `places` that has it; NaN counts as infinite."""
    s = tl.where(s != s, float("inf"), s)
    largest = tl.max(s, AXIS)
    first = tl.min(tl.where(s == tl.expand_dims(largest, AXIS), places, 2147483647), AXIS)
    return largest, first


@triton.jit(**_SPECIALIZATION)
def _tiles_kernel(
    X, x_item, x_row,  # [L, N, D] and its strides
    Y, y_item, y_row,  # [L, M, D]
    X_INVERSE_NORMS,  # [L, N]
    Y_INVERSE_NORMS,  # [L, M]
    PARTS,  # [L, tiles of columns, N]
    INDICES,  # the same, for the nearest, or None
    N,
    M,
    D,
    scale_high, scale_low,  # see `double`
    ONE_SET: tl.constexpr, TRIANGLE: tl.constexpr, BOUNDED: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """S = x_hat y_hat^T,  log sum_j exp(scale S), or max_j S and its argument: of a tile of S, along its rows
    and, where it stands for two of one set, along its columns."""
    row_tiles = tl.cdiv(N, BR)
    column_tiles = tl.cdiv(M, BC)
    item, row_tile, column_tile = tile_of(row_tiles, column_tiles, TRIANGLE)
    i = row_tile * BR + tl.arange(0, BR)
    j = column_tile * BC + tl.arange(0, BC)
    x_rows = X + item * x_item + i.to(tl.int64)[:, None] * x_row
    y_rows = Y + item * y_item + j.to(tl.int64)[:, None] * y_row
    x_inverse_norm = tl.load(X_INVERSE_NORMS + item * N + i, mask=i < N, other=0.0)
    y_inverse_norm = tl.load(Y_INVERSE_NORMS + item * M + j, mask=j < M, other=0.0)
    s = cosines(x_rows, y_rows, i < N, j < M, D, x_inverse_norm, y_inverse_norm, BR, BC, BD, DT, PREC, ACC)
    counted = (i < N)[:, None] & (j < M)[None, :]
    if ONE_SET:
        counted = counted & (i[:, None] != j[None, :])
    place = (item * column_tiles + column_tile) * N + i
    turned_place = (item * column_tiles + row_tile) * M + j
    if INDICES is None:
        s = tl.where(counted, s * double(scale_high, scale_low, ACC), float("-inf"))
        tl.store(PARTS + place, _logarithms(s, 1, BOUNDED), mask=i < N)
        if TRIANGLE:
            if row_tile != column_tile:
                tl.store(PARTS + turned_place, _logarithms(s, 0, BOUNDED), mask=j < M)
    else:
        s = tl.where(counted, s, float("-inf"))
        largest, first = _largest(s, tl.broadcast_to(j[None, :], (BR, BC)), 1)
        tl.store(PARTS + place, largest, mask=i < N)
        tl.store(INDICES + place, first, mask=i < N)
        if TRIANGLE:
            if row_tile != column_tile:
                turned, turned_first = _largest(s, tl.broadcast_to(i[:, None], (BR, BC)), 0)
                tl.store(PARTS + turned_place, turned, mask=j < M)
                tl.store(INDICES + turned_place, turned_first, mask=j < M)


@triton.jit(do_not_specialize=["N", "tiles"])
def _join_logarithms_kernel(PARTS, ROWS, N, tiles, BN: tl.constexpr, ACC: tl.constexpr):
    """rows = log sum_tile exp(parts): of BN rows."""
    blocks = tl.cdiv(N, BN)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    mask = n < N
    place = item * tiles * N + n
    largest = tl.full((BN,), float("-inf"), ACC)
    for _ in tl.range(0, tiles):
        largest = tl.maximum(largest, tl.load(PARTS + place, mask=mask, other=0.0))
        place += N
    total = tl.zeros((BN,), ACC)
    place = item * tiles * N + n
    for _ in tl.range(0, tiles):
        total += tl.exp(tl.load(PARTS + place, mask=mask, other=0.0) - largest)
        place += N
    tl.store(ROWS + item * N + n, largest + tl.log(total), mask=mask)


@triton.jit(do_not_specialize=["N", "tiles"])
def _join_nearest_kernel(PARTS, INDICES, NEAREST, N, tiles, BN: tl.constexpr, ACC: tl.constexpr):
    """nearest = indices[argmax_tile parts], the first of the largest: of BN rows."""
    blocks = tl.cdiv(N, BN)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    mask = n < N
    place = item * tiles * N + n
    largest = tl.full((BN,), float("-inf"), ACC)
    nearest = tl.zeros((BN,), tl.int32)
    for _ in tl.range(0, tiles):
        candidate = tl.load(PARTS + place, mask=mask, other=0.0)
        index = tl.load(INDICES + place, mask=mask, other=0)
        nearest = tl.where(candidate > largest, index, nearest)
        largest = tl.maximum(largest, candidate)
        place += N
    tl.store(NEAREST + item * N + n, nearest.to(tl.int64), mask=mask)


@triton.jit(
    do_not_specialize=["N", "M", "top"],
    do_not_specialize_on_alignment=["X_INVERSE_NORMS", "Y_INVERSE_NORMS", "DROWS", "ROWS"],
)
def _weights_kernel(
    X, x_item, x_row,  # [L, N, D] and its strides
    Y, y_item, y_row,  # [L, M, D]
    X_INVERSE_NORMS,  # [L, N]
    Y_INVERSE_NORMS,  # [L, M]
    DROWS,  # [L, rows of x], of which N are from `top` on, or [L, M]
    ROWS,  # the same
    WEIGHTS,  # [L, N, padded M]
    ALONG,  # [L, tiles of columns, N]
    N,
    M,
    D,
    padded_columns,
    top,
    scale_high, scale_low,  # see `double`
    OF: tl.constexpr, TRIANGLE: tl.constexpr, BOUNDED: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """W = drows exp(scale S - rows),  along = sum_j W S: of a tile of S and, where it stands for two of one
    set, of that on the other side of the diagonal. Stored is W / |y|.

    The statistics are those of x's rows (OF "own"), of y's ("other", for which x are the vectors that the
    columns of S belong to), or, of one set, W the sum of both.
    """
    row_tiles = tl.cdiv(N, BR)
    column_tiles = tl.cdiv(M, BC)
    item, row_tile, column_tile = tile_of(row_tiles, column_tiles, TRIANGLE)
    i = row_tile * BR + tl.arange(0, BR)
    j = column_tile * BC + tl.arange(0, BC)
    x_rows = X + item * x_item + i.to(tl.int64)[:, None] * x_row
    y_rows = Y + item * y_item + j.to(tl.int64)[:, None] * y_row
    x_inverse_norm = tl.load(X_INVERSE_NORMS + item * N + i, mask=i < N, other=0.0)
    y_inverse_norm = tl.load(Y_INVERSE_NORMS + item * M + j, mask=j < M, other=0.0)
    s = cosines(x_rows, y_rows, i < N, j < M, D, x_inverse_norm, y_inverse_norm, BR, BC, BD, DT, PREC, ACC)
    scale = double(scale_high, scale_low, ACC)
    weights = tl.zeros((BR, BC), ACC)
    if OF != "own":
        drow = tl.load(DROWS + item * M + j, mask=j < M, other=0.0)
        row = tl.load(ROWS + item * M + j, mask=j < M, other=0.0)
        if BOUNDED:
            weights += (drow * tl.exp(-row))[None, :]
        else:
            weights += drow[None, :] * tl.exp(scale * s - row[None, :])
    if OF != "other":
        # with more than one item all rows are here: top is 0
        own_drow = tl.load(DROWS + item * N + top + i, mask=i < N, other=0.0)
        own_row = tl.load(ROWS + item * N + top + i, mask=i < N, other=0.0)
        if BOUNDED:
            weights += (own_drow * tl.exp(-own_row))[:, None]
        else:
            weights += own_drow[:, None] * tl.exp(scale * s - own_row[:, None])
    if BOUNDED:
        weights *= tl.exp(scale * s)
    counted = (i < N)[:, None] & (j < M)[None, :]
    if OF == "both":
        counted = counted & ((top + i)[:, None] != j[None, :])
    weights = tl.where(counted, weights, 0.0)
    store_along(weights * s, ALONG, item, i, j, row_tile, column_tile, column_tiles, N, TRIANGLE)
    store_weights(
        weights, WEIGHTS, x_inverse_norm, y_inverse_norm, item, i, j, N, padded_columns,
        row_tile != column_tile, True, TRIANGLE,
    )  # fmt: skip
