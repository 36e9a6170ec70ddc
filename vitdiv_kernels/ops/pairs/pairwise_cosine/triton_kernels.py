"""pairwise_cosine on NVIDIA GPUs: the operators' functions, then the kernels; the maths is in README.md."""

import torch
import triton
import triton.language as tl

from ...._checks import autocast_off
from ...._layout import accumulation_dtype, nothing
from ..._launch import accumulator, capability, launch
from .._tiles import row_for
from .._triton import (
    BLOCK_ROWS,
    BLOCK_WIDTH,
    cosines,
    dot_types,
    gradient_slices,
    inverse,
    items_of,
    read_rows,
    slices,
    through_norm,
    tile_of,
)
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
    read_rows(x, parts["rx"], eps)
    if not one_set:
        read_rows(y, parts["ry"], eps)
    config = row_for(configs.FORWARD, x, capability(x))
    row_tiles, column_tiles = triton.cdiv(rows, config.rows), triton.cdiv(columns, config.rows)
    tiles = row_tiles * (row_tiles + 1) // 2 if one_set else row_tiles * column_tiles
    # a slot for each tile of columns (rows), which one program writes
    px = parts["rx"].new_empty(items, column_tiles, rows)
    py = px.new_empty(items, row_tiles, columns) if for_backward and not one_set else None
    launch(
        _tiles_kernel, (items * tiles,),
        x, x.stride(0), x.stride(1), other, other.stride(0), other.stride(1),
        parts["rx"], parts["rx" if one_set else "ry"], px, py, parts.get("signs") if for_backward else None,
        rows, columns, width,
        PENALTY=penalty, ONE_SET=one_set, SELF=include_self, BR=config.rows, BC=config.rows,
        **slices(config, x, other),
        **dot_types(x), num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if not for_backward:
        return px.sum((1, 2))
    if not one_set:
        torch.sum(py, 1, out=parts["py"])
    return torch.sum(px, 1, out=parts["px"]).sum(1)


def _tiles_backward(of, dsums, x, y, parts, penalty, include_self, eps):
    """dx (`of` "x") or dy."""
    one_set = y is None
    this, other = (x, x if one_set else y) if of == "x" else (y, x)
    other_name = "x" if one_set or of == "y" else "y"
    items, rows, width = this.shape
    columns = other.shape[1]
    signs = parts.get("signs")
    config = row_for(configs.FROM_ROWS if signs is None else configs.FROM_SIGNS, x, capability(x))
    sizes = gradient_slices(config, width, this, other)
    gradient = this.new_empty(this.shape)
    launch(
        _tiles_backward_kernel,
        (items * triton.cdiv(rows, config.rows) * triton.cdiv(width, sizes["BO"]),),
        this, this.stride(0), this.stride(1), other, other.stride(0), other.stride(1),
        parts[f"r{of}"], parts[f"r{other_name}"], parts[f"p{of}"], signs, dsums, gradient,
        rows, columns, width,
        PENALTY=penalty, ONE_SET=one_set, SELF=include_self, BY_COLUMN=of == "y", INVERSE_EPS=inverse(eps),
        BR=config.rows, BC=config.columns, **sizes,
        **dot_types(x), num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return gradient


def _signed_forward(x, y, parts, include_self, eps):
    sums = []
    for name, rows in (("x", x), ("y", y)):
        if rows is None:
            continue
        items, n, width = rows.shape
        blocks = parts["rx"].new_empty(items, triton.cdiv(n, BLOCK_ROWS), width)
        squares = parts["rx"].new_empty(items, n) if y is None and not include_self else None
        read_rows(rows, parts[f"r{name}"], eps, squares=squares, sums=blocks)
        sums.append(torch.sum(blocks, 1, out=parts[f"u{name}"]))
    total = (sums[0] * sums[-1]).sum(1)
    return total if squares is None else total - squares.sum(1)


def _signed_backward(of, dsums, x, y, parts, penalty, include_self, eps):
    this = x if of == "x" else y
    other_name = "x" if y is None or of == "y" else "y"
    factor, less = (1, "nothing") if y is not None else (2, "nothing" if include_self else "itself")
    along = parts[f"u{other_name}"].unsqueeze(1)
    return _closed_backward(dsums, this, parts[f"r{of}"], along, factor, less, eps)


def _square_forward(x, y, parts, include_self, eps):
    grams = []
    for name, rows in (("x", x), ("y", y)):
        if rows is None:
            continue
        squares = parts["rx"].new_empty(rows.shape[:2]) if y is None and not include_self else None
        grams.append(_gram(_unit_rows(rows, parts[f"r{name}"], eps, squares)))
    total = torch.linalg.vecdot(grams[0].flatten(1), grams[-1].flatten(1))
    return total if squares is None else total - torch.linalg.vecdot(squares, squares)


def _square_backward(of, dsums, x, y, parts, penalty, include_self, eps):
    this, other = (x, y) if of == "x" else (y, x)
    other_name = "x" if of == "y" else "y"
    unit = _unit_rows(this, parts[f"r{of}"], eps)
    gram = _gram(unit if y is None else _unit_rows(other, parts[f"r{other_name}"], eps))
    with autocast_off(unit):
        products = torch.bmm(unit, gram.to(unit.dtype))
    factor, less = (2, "nothing") if y is not None else (4, "nothing" if include_self else "its square")
    return _closed_backward(dsums, this, parts[f"r{of}"], products, factor, less, eps)


def _unit_rows(x, norms, eps, squares=None):
    unit = torch.empty_like(x, memory_format=torch.contiguous_format)
    read_rows(x, norms, eps, squares=squares, unit=unit)
    return unit


def _gram(unit):
    """x_hat^T x_hat, [items, D, D], in the accumulation dtype."""
    dtype = accumulation_dtype(unit)
    with autocast_off(unit):
        if unit.is_cuda and unit.dtype != dtype:
            return torch.bmm(unit.mT, unit, out_dtype=dtype)
        return torch.bmm(unit.mT.to(dtype), unit.to(dtype))


def _closed_backward(dsums, x, norms, along, factor, less, eps):
    """dx from `along` [items, N or 1, D]: factor (along - less) through the normalisation."""
    items, rows, width = x.shape
    along_row = along.stride(1) if along.shape[1] > 1 else 0
    gradient = x.new_empty(x.shape)
    launch(
        _closed_backward_kernel, (items * triton.cdiv(rows, BLOCK_ROWS),),
        x, x.stride(0), x.stride(1), norms, along, along.stride(0), along_row, dsums, gradient, rows, width,
        FACTOR=factor, LESS=less, INVERSE_EPS=inverse(eps), BN=BLOCK_ROWS, BD=BLOCK_WIDTH,
        ACC=accumulator(x.dtype), num_warps=4, num_stages=2,
    )  # fmt: skip
    return gradient


@triton.jit(do_not_specialize=["N", "M"])
def _tiles_kernel(
    X, x_item, x_row, Y, y_item, y_row, X_NORMS, Y_NORMS, X_SUMS, Y_SUMS, SIGNS, N, M, D,
    PENALTY: tl.constexpr, ONE_SET: tl.constexpr, SELF: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of S: sums of the penalty along its rows and columns, and the signs of S."""
    row_tiles = tl.cdiv(N, BR)
    column_tiles = tl.cdiv(M, BC)
    item, row_tile, column_tile = tile_of(row_tiles, column_tiles, ONE_SET)
    i = row_tile * BR + tl.arange(0, BR)
    j = column_tile * BC + tl.arange(0, BC)
    x_rows = X + item * x_item + i.to(tl.int64)[:, None] * x_row
    y_rows = Y + item * y_item + j.to(tl.int64)[:, None] * y_row
    x_norm = tl.load(X_NORMS + item * N + i, mask=i < N, other=0.0)
    y_norm = tl.load(Y_NORMS + item * M + j, mask=j < M, other=0.0)
    s = cosines(x_rows, y_rows, i < N, j < M, D, x_norm, y_norm, BR, BC, BD, DT, PREC, ACC)
    if ONE_SET and not SELF:
        s = tl.where(i[:, None] == j[None, :], 0.0, s)
    if PENALTY == "abs":
        penalties = tl.abs(s)
    elif PENALTY == "square":
        penalties = s * s
    else:
        penalties = tl.where(s < 0, 0.0, s)  # a NaN stays
    tl.store(X_SUMS + (item * column_tiles + column_tile) * N + i, tl.sum(penalties, 1), mask=i < N)
    if ONE_SET:
        if row_tile != column_tile:
            tl.store(X_SUMS + (item * row_tiles + row_tile) * N + j, tl.sum(penalties, 0), mask=j < N)
    elif Y_SUMS is not None:
        tl.store(Y_SUMS + (item * row_tiles + row_tile) * M + j, tl.sum(penalties, 0), mask=j < M)
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
    dx, slope, y_places, y_mask, y_norm, DT: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr
):
    """dx + slope y_hat, the rows of y being scaled in the slope, of which there are fewer."""
    y = tl.load(y_places, mask=y_mask, other=0.0).to(DT)
    if y.dtype == tl.float16:  # which 1 / |y| may not fit into
        y = (y.to(ACC) * y_norm[:, None]).to(DT)
        weight = slope.to(DT)
    else:
        weight = (slope * y_norm[None, :]).to(DT)
    return tl.dot(weight, y, dx, input_precision=PREC, out_dtype=ACC)


@triton.jit(do_not_specialize=["N", "M"])
def _tiles_backward_kernel(
    X, x_item, x_row, Y, y_item, y_row, X_NORMS, Y_NORMS, X_SUMS, SIGNS, DSUMS, DX, N, M, D,
    PENALTY: tl.constexpr, ONE_SET: tl.constexpr, SELF: tl.constexpr, BY_COLUMN: tl.constexpr,
    INVERSE_EPS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BO: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """BR x BO of dx: sum_j W[i, j] y_hat[j], W from signs or from S made again, then the normalisation.

    Its part along x_hat is sum_j W[i, j] S[i, j], the penalty's row sum times its degree. With BY_COLUMN X is
    the set that the columns of S belong to.
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
    norm = tl.load(X_NORMS + item * N + i, mask=i < N, other=0.0)
    dx = tl.zeros((BR, BO), ACC)
    if PENALTY == "square":
        for j0 in tl.range(0, M, BC):
            j = j0 + columns
            y_rows = Y + item * y_item + j.to(tl.int64)[:, None] * y_row
            y_norm = tl.load(Y_NORMS + item * M + j, mask=j < M, other=0.0)
            slope = 2.0 * cosines(x_rows, y_rows, i < N, j < M, D, norm, y_norm, BR, BC, BD, DT, PREC, ACC)
            if ONE_SET and not SELF:
                slope = tl.where(i[:, None] == j[None, :], 0.0, slope)
            y_mask = (j < M)[:, None] & out_mask
            dx = _add_unit_rows(dx, slope, y_rows + o[None, :], y_mask, y_norm, DT, PREC, ACC)
    else:
        # Signs of y's rows against x's: of one set where j < i, for only the upper triangle of S was written.
        turned = first_row if ONE_SET else M
        if ONE_SET or BY_COLUMN:
            for j1 in tl.range(0, turned, BC):
                j = j1 + columns
                y_places = Y + item * y_item + j.to(tl.int64)[:, None] * y_row + o[None, :]
                y_norm = tl.load(Y_NORMS + item * M + j, mask=j < M, other=0.0)
                words = tl.cdiv(N, 32)
                slope = tl.trans(_signs(SIGNS, item * M + j, j < M, first_row, words, PENALTY, BC, BR, ACC))
                y_mask = (j < M)[:, None] & out_mask
                dx = _add_unit_rows(dx, slope, y_places, y_mask, y_norm, DT, PREC, ACC)
        if not BY_COLUMN:
            for j2 in tl.range(first_row if ONE_SET else 0, M, BC):
                j = j2 + columns
                y_places = Y + item * y_item + j.to(tl.int64)[:, None] * y_row + o[None, :]
                y_norm = tl.load(Y_NORMS + item * M + j, mask=j < M, other=0.0)
                slope = _signs(SIGNS, item * N + i, i < N, j2, tl.cdiv(M, 32), PENALTY, BR, BC, ACC)
                y_mask = (j < M)[:, None] & out_mask
                dx = _add_unit_rows(dx, slope, y_places, y_mask, y_norm, DT, PREC, ACC)
    along = tl.load(X_SUMS + item * N + i, mask=i < N, other=0.0)
    if PENALTY == "square":
        along = 2.0 * along
    out = tl.load(x_rows + o[None, :], mask=(i < N)[:, None] & out_mask, other=0.0).to(ACC)
    dsum = tl.load(DSUMS + item)
    if ONE_SET:
        dsum = 2.0 * dsum
    out = dsum * through_norm(dx, out, norm, along, INVERSE_EPS, BR, ACC)
    place_out = DX + (item * N + i)[:, None] * D + o[None, :]
    tl.store(place_out, out.to(DX.dtype.element_ty), mask=(i < N)[:, None] & out_mask)


@triton.jit(do_not_specialize=["N"])
def _closed_backward_kernel(
    X, x_item, x_row, NORMS, ALONG, along_item, along_row, DSUMS, DX, N, D,
    FACTOR: tl.constexpr, LESS: tl.constexpr, INVERSE_EPS: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A block of BN rows: dx_hat = along - less, then (dx_hat - x_hat (x_hat . dx_hat)) / |x|."""
    blocks = tl.cdiv(N, BN)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    d = tl.arange(0, BD)
    row_mask = (n < N)[:, None]
    rows = X + item * x_item + n.to(tl.int64)[:, None] * x_row
    along_rows = ALONG + item * along_item + n.to(tl.int64)[:, None] * along_row
    norm = tl.load(NORMS + item * N + n, mask=n < N, other=0.0)
    products = tl.zeros((BN, BD), ACC)
    squares = tl.zeros((BN, BD), ACC)
    for d0 in tl.range(0, D, BD):
        mask = row_mask & (d0 + d < D)[None, :]
        unit = tl.load(rows + (d0 + d)[None, :], mask=mask, other=0.0).to(ACC) * norm[:, None]
        products += unit * tl.load(along_rows + (d0 + d)[None, :], mask=mask, other=0.0).to(ACC)
        squares += unit * unit
    square = tl.sum(squares, 1)
    if LESS == "its square":
        less = square
    elif LESS == "itself":
        less = tl.full((BN,), 1.0, ACC)
    else:
        less = tl.zeros((BN,), ACC)
    # a row that was divided by eps has no part taken out
    radial = tl.sum(products, 1) - less * square
    radial = tl.where(norm < tl.full((BN,), INVERSE_EPS, ACC), radial, 0.0)
    dsum = FACTOR * tl.load(DSUMS + item)
    for e0 in tl.range(0, D, BD):
        e_mask = row_mask & (e0 + d < D)[None, :]
        row = tl.load(rows + (e0 + d)[None, :], mask=e_mask, other=0.0).to(ACC) * norm[:, None]
        along = tl.load(along_rows + (e0 + d)[None, :], mask=e_mask, other=0.0).to(ACC)
        dx = dsum * norm[:, None] * (along - row * (less + radial)[:, None])
        place = DX + (item * N + n)[:, None] * D + (e0 + d)[None, :]
        tl.store(place, dx.to(DX.dtype.element_ty), mask=e_mask)
