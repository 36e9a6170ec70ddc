"""pairwise_cosine on NVIDIA GPUs: the operators' functions, then the kernels; the maths is in README.md."""

import torch
import triton
import triton.language as tl

from ...._checks import autocast_off
from ...._layout import accumulation_dtype, nothing
from ..._launch import accumulator, capability, launch
from .._tiles import forward_row, row_for
from .._triton import (
    BLOCK_ROWS,
    BLOCK_WIDTH,
    cosines,
    dot_types,
    gradient_columns,
    inverse_eps,
    items_of,
    read_rows,
    slices,
    through_norm,
    tile_of,
)
from .._weighted import rows_of, store_weights, weighted_gradient
from . import triton_configs as configs
from .gpu_saved import is_closed, new_saved, sections


def pairwise_cosine_fwd(x, y, penalty, include_self, eps, for_backward):
    x, y = items_of(x), None if y is None else items_of(y)
    saved = new_saved(x, y, penalty)
    parts = sections(saved, x, y, penalty)
    if not is_closed(x, y, penalty):
        sums = _tiles_forward(x, y, parts, penalty, include_self, eps, for_backward)
    elif penalty == "signed":
        sums = _signed_forward(x, y, parts, include_self, eps)
    else:
        sums = _square_forward(x, y, parts, include_self, eps)
    return sums, saved if for_backward else nothing(x)


def pairwise_cosine_bwd(dsums, x, y, saved, penalty, include_self, eps, needs_dx, needs_dy):
    x_shape, y_shape = x.shape, None if y is None else y.shape
    x, y, dsums = items_of(x), None if y is None else items_of(y), dsums.contiguous()
    parts = sections(saved, x, y, penalty)
    backward = _tiles_backward
    if is_closed(x, y, penalty):
        backward = _signed_backward if penalty == "signed" else _square_backward
    arguments = dsums, x, y, parts, penalty, include_self, eps
    dx = backward("x", *arguments).view(x_shape) if needs_dx else nothing(x)
    dy = backward("y", *arguments).view(y_shape) if needs_dy else nothing(x)
    return dx, dy


def _tiles_forward(x, y, parts, penalty, include_self, eps, for_backward):
    items, rows, width = x.shape
    one_set, other = y is None, x if y is None else y
    columns = other.shape[1]
    read_rows(x, parts["x_inverse_norms"], eps)
    if not one_set:
        read_rows(y, parts["y_inverse_norms"], eps)
    config = forward_row(configs.FORWARD, x, columns, capability(x))
    row_tiles, column_tiles = triton.cdiv(rows, config.rows), triton.cdiv(columns, config.rows)
    tiles = row_tiles * (row_tiles + 1) // 2 if one_set else row_tiles * column_tiles
    # a slot for each tile of columns (rows), which one program writes
    x_penalties = parts["x_inverse_norms"].new_empty(items, column_tiles, rows)
    y_penalties = x_penalties.new_empty(items, row_tiles, columns) if for_backward and not one_set else None
    launch(
        _tiles_kernel, (items * tiles,),
        x, x.stride(0), x.stride(1), other, other.stride(0), other.stride(1),
        parts["x_inverse_norms"], parts["x_inverse_norms" if one_set else "y_inverse_norms"],
        x_penalties, y_penalties, parts.get("signs") if for_backward else None, rows, columns, width,
        PENALTY=penalty, ONE_SET=one_set, SELF=include_self, BR=config.rows, BC=config.rows,
        **slices(config, x, other),
        **dot_types(x), num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if not for_backward:
        return x_penalties.sum((1, 2))
    if not one_set:
        torch.sum(y_penalties, 1, out=parts["y_penalties"])
    return torch.sum(x_penalties, 1, out=parts["x_penalties"]).sum(1)


def _tiles_backward(of, dsums, x, y, parts, penalty, include_self, eps):
    """dx (`of` "x") or dy."""
    one_set = y is None
    this, other = (x, x if one_set else y) if of == "x" else (y, x)
    other_name = "x" if one_set or of == "y" else "y"
    norms = parts[f"{of}_inverse_norms"], parts[f"{other_name}_inverse_norms"]
    penalties = parts[f"{of}_penalties"]
    if penalty == "square":
        return _tiles_backward_of_square(this, other, *norms, penalties, dsums, one_set, include_self, eps)
    items, rows, width = this.shape
    config = row_for(configs.FROM_SIGNS, x, capability(x))
    sizes = gradient_columns(config.out, width, this, other)
    gradient = this.new_empty(this.shape)
    launch(
        _from_signs_kernel,
        (items * triton.cdiv(rows, config.rows) * triton.cdiv(width, sizes["BO"]),),
        this, this.stride(0), this.stride(1), other, other.stride(0), other.stride(1), *norms, penalties,
        parts["signs"], dsums, gradient, rows, other.shape[1], width,
        PENALTY=penalty, ONE_SET=one_set, BY_COLUMN=of == "y",
        INVERSE_EPS=inverse_eps(eps), BR=config.rows, BC=config.columns, **sizes,
        **dot_types(x), num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return gradient


def _tiles_backward_of_square(
    this, other, inverse_norms, other_inverse_norms, penalties, dsums, one_set, include_self, eps
):
    """The slope is 2 S: W = S, and its sum times S, along a row, the penalty's."""
    _, rows, width = this.shape
    columns = other.shape[1]
    config = forward_row(configs.FORWARD, this, columns, capability(this))
    column_tiles = triton.cdiv(columns, config.rows)

    def write(chunk, weights):
        images, part = weights.shape[:2]
        row_tiles, triangle = triton.cdiv(part, config.rows), one_set and part == rows
        tiles = row_tiles * (row_tiles + 1) // 2 if triangle else row_tiles * column_tiles
        x, y = rows_of(this, chunk), other[chunk.first : chunk.last]
        launch(
            _weights_kernel, (images * tiles,),
            x, x.stride(0), x.stride(1), y, y.stride(0), y.stride(1),
            rows_of(inverse_norms, chunk), other_inverse_norms[chunk.first : chunk.last], weights,
            part, columns, width, weights.shape[2], chunk.top,
            TRIANGLE=triangle, WITHOUT_SELF=one_set and not include_self, BR=config.rows, BC=config.rows,
            **slices(config, this, other),
            **dot_types(this), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        return rows_of(penalties, chunk)[:, None]

    factor = 4.0 if one_set else 2.0
    return weighted_gradient(
        write, this, inverse_norms, other, other_inverse_norms, eps, dsums=dsums, factor=factor
    )


def _signed_forward(x, y, parts, include_self, eps):
    sums = []
    for name, rows in (("x", x), ("y", y)):
        if rows is None:
            continue
        items, n, width = rows.shape
        blocks = parts["x_inverse_norms"].new_empty(items, triton.cdiv(n, BLOCK_ROWS), width)
        squares = parts["x_inverse_norms"].new_empty(items, n) if y is None and not include_self else None
        read_rows(rows, parts[f"{name}_inverse_norms"], eps, squares=squares, sums=blocks)
        sums.append(torch.sum(blocks, 1, out=parts[f"{name}_unit_sum"]))
    total = (sums[0] * sums[-1]).sum(1)
    return total if squares is None else total - squares.sum(1)


def _signed_backward(of, dsums, x, y, parts, penalty, include_self, eps):
    this = x if of == "x" else y
    other_name = "x" if y is None or of == "y" else "y"
    factor, less = (1, "nothing") if y is not None else (2, "nothing" if include_self else "itself")
    dunit = parts[f"{other_name}_unit_sum"].unsqueeze(1)
    return _closed_backward(dsums, this, parts[f"{of}_inverse_norms"], dunit, factor, less, eps)


def _square_forward(x, y, parts, include_self, eps):
    grams = []
    for name, rows in (("x", x), ("y", y)):
        if rows is None:
            continue
        inverse_norms = parts[f"{name}_inverse_norms"]
        squares = torch.empty_like(inverse_norms) if y is None and not include_self else None
        grams.append(_gram(_unit_rows(rows, inverse_norms, eps, squares)))
    total = torch.linalg.vecdot(grams[0].flatten(1), grams[-1].flatten(1))
    return total if squares is None else total - torch.linalg.vecdot(squares, squares)


def _square_backward(of, dsums, x, y, parts, penalty, include_self, eps):
    this, other = (x, y) if of == "x" else (y, x)
    other_name = "x" if of == "y" else "y"
    unit = _unit_rows(this, parts[f"{of}_inverse_norms"], eps)
    gram = _gram(unit if y is None else _unit_rows(other, parts[f"{other_name}_inverse_norms"], eps))
    with autocast_off(unit):
        products = torch.bmm(unit, gram.to(unit.dtype))
    factor, less = (2, "nothing") if y is not None else (4, "nothing" if include_self else "its square")
    return _closed_backward(dsums, this, parts[f"{of}_inverse_norms"], products, factor, less, eps)


def _unit_rows(x, inverse_norms, eps, squares=None):
    unit = torch.empty_like(x, memory_format=torch.contiguous_format)
    read_rows(x, inverse_norms, eps, squares=squares, unit=unit)
    return unit


def _gram(unit):
    """x_hat^T x_hat, [items, D, D], in the accumulation dtype."""
    dtype = accumulation_dtype(unit)
    with autocast_off(unit):
        if unit.is_cuda and unit.dtype != dtype:
            return torch.bmm(unit.mT, unit, out_dtype=dtype)
        return torch.bmm(unit.mT.to(dtype), unit.to(dtype))


def _closed_backward(dsums, x, inverse_norms, dunit, factor, less, eps):
    """dx from `dunit` [items, N or 1, D]: factor (dunit - less) through the normalisation."""
    items, rows, width = x.shape
    dunit_row = dunit.stride(1) if dunit.shape[1] > 1 else 0
    gradient = x.new_empty(x.shape)
    launch(
        _closed_backward_kernel, (items * triton.cdiv(rows, BLOCK_ROWS),),
        x, x.stride(0), x.stride(1), inverse_norms, dunit, dunit.stride(0), dunit_row, dsums, gradient,
        rows, width,
        FACTOR=factor, LESS=less, INVERSE_EPS=inverse_eps(eps), BN=BLOCK_ROWS, BD=BLOCK_WIDTH,
        ACC=accumulator(x.dtype), num_warps=4, num_stages=2,
    )  # fmt: skip
    return gradient


@triton.jit(do_not_specialize=["N", "M"])
def _tiles_kernel(
    X, x_item, x_row,  # [L, N, D] and its strides
    Y, y_item, y_row,  # [L, M, D]
    X_INVERSE_NORMS,  # [L, N]
    Y_INVERSE_NORMS,  # [L, M]
    X_PENALTIES,  # [L, tiles of columns, N]
    Y_PENALTIES,  # [L, tiles of rows, M], or None
    SIGNS,  # see gpu_saved.py, or None
    N,
    M,
    D,
    PENALTY: tl.constexpr, ONE_SET: tl.constexpr, SELF: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """S = x_hat y_hat^T,  sum_j penalty(S),  sum_i penalty(S): of a tile of S, and its signs."""
    row_tiles = tl.cdiv(N, BR)
    column_tiles = tl.cdiv(M, BC)
    item, row_tile, column_tile = tile_of(row_tiles, column_tiles, ONE_SET)
    i = row_tile * BR + tl.arange(0, BR)
    j = column_tile * BC + tl.arange(0, BC)
    x_rows = X + item * x_item + i.to(tl.int64)[:, None] * x_row
    y_rows = Y + item * y_item + j.to(tl.int64)[:, None] * y_row
    x_inverse_norm = tl.load(X_INVERSE_NORMS + item * N + i, mask=i < N, other=0.0)
    y_inverse_norm = tl.load(Y_INVERSE_NORMS + item * M + j, mask=j < M, other=0.0)
    s = cosines(x_rows, y_rows, i < N, j < M, D, x_inverse_norm, y_inverse_norm, BR, BC, BD, DT, PREC, ACC)
    if ONE_SET and not SELF:
        s = tl.where(i[:, None] == j[None, :], 0.0, s)
    if PENALTY == "abs":
        penalties = tl.abs(s)
    elif PENALTY == "square":
        penalties = s * s
    else:
        penalties = tl.where(s < 0, 0.0, s)  # a NaN stays
    tl.store(X_PENALTIES + (item * column_tiles + column_tile) * N + i, tl.sum(penalties, 1), mask=i < N)
    if ONE_SET:
        if row_tile != column_tile:
            tl.store(X_PENALTIES + (item * row_tiles + row_tile) * N + j, tl.sum(penalties, 0), mask=j < N)
    elif Y_PENALTIES is not None:
        tl.store(Y_PENALTIES + (item * row_tiles + row_tile) * M + j, tl.sum(penalties, 0), mask=j < M)
    if SIGNS is not None:
        words = tl.cdiv(M, 32)
        planes: tl.constexpr = 2 if PENALTY == "abs" else 1
        w = column_tile * (BC // 32) + tl.arange(0, BC // 32)
        place = SIGNS + ((item * N + i) * planes * words)[:, None] + w[None, :]
        mask = (i < N)[:, None] & (w < words)[None, :]
        bit = (j % 32)[None, :]
        positive = tl.reshape((s > 0).to(tl.int32) << bit, (BR, BC // 32, 32))
        tl.store(place, tl.sum(positive, 2), mask=mask)
        if PENALTY == "abs":
            negative = tl.reshape((s < 0).to(tl.int32) << bit, (BR, BC // 32, 32))
            tl.store(place + words, tl.sum(negative, 2), mask=mask)


@triton.jit
def _signs(
    SIGNS, rows, row_mask, first, words, PENALTY: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The penalty's slope, 1, -1 or 0, at R rows of S, from column `first` on C columns."""
    planes: tl.constexpr = 2 if PENALTY == "abs" else 1
    w = first // 32 + tl.arange(0, C // 32)
    place = SIGNS + (rows * planes * words)[:, None] + w[None, :]
    mask = row_mask[:, None] & (w < words)[None, :]
    bit = (1 << tl.arange(0, C) % 32)[None, :]
    word = tl.load(place, mask=mask, other=0)
    positive = tl.reshape(tl.broadcast_to(word[:, :, None], (R, C // 32, 32)), (R, C))
    slope = tl.where((positive & bit) != 0, tl.full((R, C), 1.0, ACC), 0.0)
    if PENALTY == "abs":
        below = tl.load(place + words, mask=mask, other=0)
        negative = tl.reshape(tl.broadcast_to(below[:, :, None], (R, C // 32, 32)), (R, C))
        slope = tl.where((negative & bit) != 0, -1.0, slope)
    return slope


@triton.jit
def _add_unit_rows(
    dx, slope, y_places, y_mask, y_inverse_norm, DT: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr
):
    """dx + slope y_hat, the rows of y being scaled in the slope, of which there are fewer."""
    y = tl.load(y_places, mask=y_mask, other=0.0).to(DT)
    if y.dtype == tl.float16:  # which 1 / |y| may not fit into
        y = (y.to(ACC) * y_inverse_norm[:, None]).to(DT)
        weight = slope.to(DT)
    else:
        weight = (slope * y_inverse_norm[None, :]).to(DT)
    return tl.dot(weight, y, dx, input_precision=PREC, out_dtype=ACC)


@triton.jit(
    do_not_specialize=["N", "M", "top"],
    do_not_specialize_on_alignment=["X_INVERSE_NORMS", "Y_INVERSE_NORMS"],
)
def _weights_kernel(
    X, x_item, x_row,  # [L, N, D] and its strides
    Y, y_item, y_row,  # [L, M, D]
    X_INVERSE_NORMS,  # [L, N]
    Y_INVERSE_NORMS,  # [L, M]
    WEIGHTS,  # [L, N, padded M]
    N,
    M,
    D,
    padded_columns,
    top,
    TRIANGLE: tl.constexpr, WITHOUT_SELF: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """W = S = x_hat y_hat^T: of a tile of S and, where it stands for two of one set, of that on the other
    side of the diagonal. Stored is W / |y|. x are N rows from `top` on."""
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
    if WITHOUT_SELF:
        s = tl.where((top + i)[:, None] == j[None, :], 0.0, s)
    store_weights(
        s, WEIGHTS, x_inverse_norm, y_inverse_norm, item, i, j, N, padded_columns, row_tile != column_tile,
        True, TRIANGLE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "M"])
def _from_signs_kernel(
    X, x_item, x_row,  # [L, N, D] and its strides
    Y, y_item, y_row,  # [L, M, D]
    X_INVERSE_NORMS,  # [L, N]
    Y_INVERSE_NORMS,  # [L, M]
    X_PENALTIES,  # [L, N]: sum_j penalty(S)
    SIGNS,  # see gpu_saved.py
    DSUMS,  # [L]
    DX,  # [L, N, D]
    N,
    M,
    D,
    PENALTY: tl.constexpr, ONE_SET: tl.constexpr, BY_COLUMN: tl.constexpr,
    INVERSE_EPS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx = dsum (sum_j sign(S) y_hat - along x_hat) / |x|,  along = sum_j penalty(S): BR x BO of it.

    With BY_COLUMN X is the set that the columns of S belong to.
    """
    row_tiles = tl.cdiv(N, BR)
    out_tiles = tl.cdiv(D, BO)
    item = (tl.program_id(0) // (row_tiles * out_tiles)).to(tl.int64)
    first_row = tl.program_id(0) // out_tiles % row_tiles * BR
    i = first_row + tl.arange(0, BR)
    o = tl.program_id(0) % out_tiles * BO + tl.arange(0, BO)
    columns = tl.arange(0, BC)
    out_mask = (o < D)[None, :]
    x_rows = X + item * x_item + i.to(tl.int64)[:, None] * x_row
    inverse_norm = tl.load(X_INVERSE_NORMS + item * N + i, mask=i < N, other=0.0)
    dx = tl.zeros((BR, BO), ACC)
    # Signs of y's rows against x's: of one set where j < i, for only the upper triangle of S was written.
    turned = first_row if ONE_SET else M
    if ONE_SET or BY_COLUMN:
        for j1 in tl.range(0, turned, BC):
            j = j1 + columns
            y_places = Y + item * y_item + j.to(tl.int64)[:, None] * y_row + o[None, :]
            y_inverse_norm = tl.load(Y_INVERSE_NORMS + item * M + j, mask=j < M, other=0.0)
            words = tl.cdiv(N, 32)
            slope = tl.trans(_signs(SIGNS, item * M + j, j < M, first_row, words, PENALTY, BC, BR, ACC))
            y_mask = (j < M)[:, None] & out_mask
            dx = _add_unit_rows(dx, slope, y_places, y_mask, y_inverse_norm, DT, PREC, ACC)
    if not BY_COLUMN:
        for j2 in tl.range(first_row if ONE_SET else 0, M, BC):
            j = j2 + columns
            y_places = Y + item * y_item + j.to(tl.int64)[:, None] * y_row + o[None, :]
            y_inverse_norm = tl.load(Y_INVERSE_NORMS + item * M + j, mask=j < M, other=0.0)
            slope = _signs(SIGNS, item * N + i, i < N, j2, tl.cdiv(M, 32), PENALTY, BR, BC, ACC)
            y_mask = (j < M)[:, None] & out_mask
            dx = _add_unit_rows(dx, slope, y_places, y_mask, y_inverse_norm, DT, PREC, ACC)
    along = tl.load(X_PENALTIES + item * N + i, mask=i < N, other=0.0)
    out = tl.load(x_rows + o[None, :], mask=(i < N)[:, None] & out_mask, other=0.0).to(ACC)
    dsum = tl.load(DSUMS + item)
    if ONE_SET:
        dsum = 2.0 * dsum
    out = dsum * through_norm(dx, out, inverse_norm, along, INVERSE_EPS, BR, ACC)
    place_out = DX + (item * N + i)[:, None] * D + o[None, :]
    tl.store(place_out, out.to(DX.dtype.element_ty), mask=(i < N)[:, None] & out_mask)


@triton.jit(do_not_specialize=["N"])
def _closed_backward_kernel(
    X, x_item, x_row,  # [L, N, D] and its strides
    INVERSE_NORMS,  # [L, N]
    DUNIT, dunit_item, dunit_row,  # [L, N or 1, D] and its strides
    DSUMS,  # [L]
    DX,  # [L, N, D]
    N,
    D,
    FACTOR: tl.constexpr, LESS: tl.constexpr, INVERSE_EPS: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx_hat = dunit - less x_hat,  dx = FACTOR dsum (dx_hat - x_hat (x_hat . dx_hat)) / |x|: of BN rows."""
    blocks = tl.cdiv(N, BN)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    d = tl.arange(0, BD)
    row_mask = (n < N)[:, None]
    rows = X + item * x_item + n.to(tl.int64)[:, None] * x_row
    dunit_rows = DUNIT + item * dunit_item + n.to(tl.int64)[:, None] * dunit_row
    inverse_norm = tl.load(INVERSE_NORMS + item * N + n, mask=n < N, other=0.0)
    products = tl.zeros((BN, BD), ACC)
    squares = tl.zeros((BN, BD), ACC)
    for d0 in tl.range(0, D, BD):
        mask = row_mask & (d0 + d < D)[None, :]
        unit = tl.load(rows + (d0 + d)[None, :], mask=mask, other=0.0).to(ACC) * inverse_norm[:, None]
        products += unit * tl.load(dunit_rows + (d0 + d)[None, :], mask=mask, other=0.0).to(ACC)
        squares += unit * unit
    square = tl.sum(squares, 1)
    if LESS == "its square":
        less = square
    elif LESS == "itself":
        less = tl.full((BN,), 1.0, ACC)
    else:
        less = tl.zeros((BN,), ACC)
    # a row that was divided by eps has no part taken out
    along = tl.sum(products, 1) - less * square
    along = tl.where(inverse_norm < tl.full((BN,), INVERSE_EPS, ACC), along, 0.0)
    dsum = FACTOR * tl.load(DSUMS + item)
    for e0 in tl.range(0, D, BD):
        e_mask = row_mask & (e0 + d < D)[None, :]
        row = tl.load(rows + (e0 + d)[None, :], mask=e_mask, other=0.0).to(ACC) * inverse_norm[:, None]
        dunit = tl.load(dunit_rows + (e0 + d)[None, :], mask=e_mask, other=0.0).to(ACC)
        dx = dsum * inverse_norm[:, None] * (dunit - row * (less + along)[:, None])
        place = DX + (item * N + n)[:, None] * D + (e0 + d)[None, :]
        tl.store(place, dx.to(DX.dtype.element_ty), mask=e_mask)
