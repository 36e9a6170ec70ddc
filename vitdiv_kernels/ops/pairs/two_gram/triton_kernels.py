"""two_gram on NVIDIA GPUs: the operators' functions, then the kernels; the maths is in README.md."""

import triton
import triton.language as tl

from ...._layout import accumulation_dtype, nothing
from ..._launch import capability, double, launch, split
from .._inverse_norms import inverse_norms_of, new_inverse_norms
from .._tiles import forward_row, row_for
from .._triton import aligned, cosines, dot_types, items_of, products, read_rows, slices, tile_of
from .._weighted import store_along, store_weights, weighted_gradient
from . import triton_configs as configs


def two_gram_fwd(x, y, penalty, margin, normalise, eps, needs_dx, needs_dy):
    x, y = items_of(x), None if y is None else items_of(y)
    saved = nothing(x)
    x_inverse_norms = y_inverse_norms = None
    if normalise:
        saved = new_inverse_norms(x, y)
        x_inverse_norms, y_inverse_norms = inverse_norms_of(saved, x, y)
        read_rows(x, x_inverse_norms, eps)
        if y is not None:
            read_rows(y, y_inverse_norms, eps)
    items, rows, _ = x.shape
    config = forward_row(configs.FORWARD, x, rows, capability(x))
    row_tiles = triton.cdiv(rows, config.rows)
    parts = x.new_empty(items, row_tiles * (row_tiles + 1) // 2, dtype=accumulation_dtype(x))
    # every address of rows that are not aligned takes a register: with 4 warps these spilled
    warps = config.warps if aligned(x) and (y is None or aligned(y)) else 8
    launch(
        _tiles_kernel, (parts.numel(),),
        *_set(x, x_inverse_norms), *_set(y, y_inverse_norms), parts, rows, *split(margin),
        PENALTY=penalty, BR=config.rows, **slices(config, x, x if y is None else y),
        **dot_types(x), num_warps=warps, num_stages=config.stages,
    )  # fmt: skip
    return parts.sum(1), saved if normalise and (needs_dx or needs_dy) else nothing(x)


def two_gram_bwd(dsums, x, y, saved, penalty, margin, normalise, eps, needs_dx, needs_dy):
    shapes = x.shape, None if y is None else y.shape
    x, y = items_of(x), None if y is None else items_of(y)
    x_inverse_norms, y_inverse_norms = inverse_norms_of(saved, x, y) if normalise else (None, None)
    x_set, y_set = (x, x_inverse_norms), (y, y_inverse_norms)
    arguments = dsums.contiguous(), penalty, margin, eps
    dx = dy = nothing(x)
    if needs_dx:
        dx = _gradient("x", x_set, y_set, *arguments).view(shapes[0])
    if needs_dy:
        dy = _gradient("y", y_set, x_set, *arguments).view(shapes[1])
    return dx, dy


def _set(x, inverse_norms):
    """Vectors as the kernels take them, or none."""
    return (None,) * 5 if x is None else (x, x.stride(0), x.stride(1), x.shape[2], inverse_norms)


def _gradient(of, own_set, other_set, dsums, penalty, margin, eps):
    own, inverse_norms = own_set
    items, rows, _ = own.shape
    config = row_for(configs.WEIGHTS, own, capability(own))
    column_tiles = triton.cdiv(rows, config.rows)
    given = [x for x in (own, other_set[0]) if x is not None]
    options = slices(config, *given)
    # as of the forward
    warps = config.warps if all(map(aligned, given)) else 8

    def write(chunk, weights):
        images, part = weights.shape[:2]
        row_tiles, triangle = triton.cdiv(part, config.rows), part == rows
        tiles = row_tiles * (row_tiles + 1) // 2 if triangle else row_tiles * column_tiles
        along = None if inverse_norms is None else inverse_norms.new_empty(images, column_tiles, part)
        sets = (
            (None if x is None else x[chunk.first : chunk.last],
             None if norms is None else norms.view(items, rows)[chunk.first : chunk.last])
            for x, norms in (own_set, other_set)
        )  # fmt: skip
        launch(
            _weights_kernel, (images * tiles,),
            *(argument for set_ in sets for argument in _set(*set_)), weights, along, part, rows,
            weights.shape[2], chunk.top, *split(margin),
            OF=of, PENALTY=penalty, TRIANGLE=triangle, BR=config.rows, **options,
            **dot_types(own), num_warps=warps, num_stages=config.stages,
        )  # fmt: skip
        return along

    return weighted_gradient(write, own, inverse_norms, own, inverse_norms, eps, dsums=dsums, factor=2.0)


@triton.jit
def _relu(s):
    return tl.where(s < 0, 0.0, s)  # a NaN stays


@triton.jit
def _penalties(s, t, margin, PENALTY: tl.constexpr):
    if PENALTY == "product":
        penalties = s * t
    elif PENALTY == "hinge":
        penalties = _relu(tl.abs(s - t) - margin)
    else:
        r = _difference(s, t, PENALTY)
        penalties = r * r
    return penalties


@triton.jit
def _difference(s, t, PENALTY: tl.constexpr):
    """What the penalty is the square of."""
    if PENALTY == "square":
        r = s - t
    elif PENALTY == "relu_square":
        r = _relu(s) - _relu(t)
    elif PENALTY == "relu_teacher_square":
        r = tl.where((s < 0) & (t < 0), 0.0, s) - _relu(t)
    else:
        r = s - _relu(t)
    return r


@triton.jit
def _slopes(s, t, margin, PENALTY: tl.constexpr, OF: tl.constexpr):
    """The penalty's derivative by s (OF "x") or by t; those with a kink have the one of the plain formula."""
    if PENALTY == "product":
        slopes = t if OF == "x" else s
    elif PENALTY == "hinge":
        sign = tl.where(s > t, tl.full(s.shape, 1.0, s.dtype), tl.where(s < t, -1.0, 0.0))
        slopes = tl.where(tl.abs(s - t) <= margin, 0.0, sign if OF == "x" else -sign)
    else:
        slopes = 2.0 * _difference(s, t, PENALTY)
        if OF == "y":
            slopes = -slopes
            if PENALTY != "square":
                slopes = tl.where(t <= 0, 0.0, slopes)
        elif PENALTY == "relu_square":
            slopes = tl.where(s <= 0, 0.0, slopes)
        elif PENALTY == "relu_teacher_square":
            slopes = tl.where((s < 0) & (t < 0), 0.0, slopes)
    return slopes


@triton.jit
def _gram(
    X, x_item, x_row, D, INVERSE_NORMS, item, i, j, N, BR: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of the Gram matrix; that of no vectors is the identity."""
    if X is None:
        gram = tl.where(i[:, None] == j[None, :], tl.full((BR, BC), 1.0, ACC), 0.0)
    else:
        i_rows = X + item * x_item + i.to(tl.int64)[:, None] * x_row
        j_rows = X + item * x_item + j.to(tl.int64)[:, None] * x_row
        if INVERSE_NORMS is None:
            gram = products(i_rows, j_rows, i < N, j < N, D, BR, BC, BD, DT, PREC, ACC)
        else:
            i_inverse_norm = tl.load(INVERSE_NORMS + item * N + i, mask=i < N, other=0.0)
            j_inverse_norm = tl.load(INVERSE_NORMS + item * N + j, mask=j < N, other=0.0)
            gram = cosines(
                i_rows, j_rows, i < N, j < N, D, i_inverse_norm, j_inverse_norm, BR, BC, BD, DT, PREC, ACC
            )
    return gram


# Numbers of rows help no load, so that one compiled kernel serves them all; strides and widths do.
@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["X_INVERSE_NORMS", "Y_INVERSE_NORMS"])
def _tiles_kernel(
    X, x_item, x_row, D, X_INVERSE_NORMS,  # [L, N, D], its strides and width; [L, N], or None
    Y, y_item, y_row, D2, Y_INVERSE_NORMS,  # [L, N, D2], or None: the identity is T
    PARTS,  # [L, tiles]
    N,
    margin_high, margin_low,  # see `double`
    PENALTY: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """S = x_hat x_hat^T,  T = y_hat y_hat^T,  sum_ij penalty(S, T): of a tile of the upper triangle, twice
    where it stands for two."""
    row_tiles = tl.cdiv(N, BR)
    item, row_tile, column_tile = tile_of(row_tiles, row_tiles, True)
    i = row_tile * BR + tl.arange(0, BR)
    j = column_tile * BR + tl.arange(0, BR)
    s = _gram(X, x_item, x_row, D, X_INVERSE_NORMS, item, i, j, N, BR, BR, BD, DT, PREC, ACC)
    t = _gram(Y, y_item, y_row, D2, Y_INVERSE_NORMS, item, i, j, N, BR, BR, BD, DT, PREC, ACC)
    penalties = _penalties(s, t, double(margin_high, margin_low, ACC), PENALTY)
    total = tl.sum(tl.where((i < N)[:, None] & (j < N)[None, :], penalties, 0.0))
    tl.store(PARTS + tl.program_id(0), tl.where(row_tile == column_tile, total, 2.0 * total))


@triton.jit(
    do_not_specialize=["N", "M", "top"],
    do_not_specialize_on_alignment=["X_INVERSE_NORMS", "Y_INVERSE_NORMS"],
)
def _weights_kernel(
    X, x_item, x_row, D, X_INVERSE_NORMS,  # [L, M, D], its strides and width; [L, M], or None
    Y, y_item, y_row, D2, Y_INVERSE_NORMS,  # [L, M, D2], or None
    WEIGHTS,  # [L, N, padded M]: of N rows from `top` on
    ALONG,  # [L, tiles of columns, N], or None
    N,
    M,
    padded_columns,
    top,
    margin_high, margin_low,  # see `double`
    OF: tl.constexpr, PENALTY: tl.constexpr, TRIANGLE: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """W = slope(S, T),  along = sum_j W S: of a tile of S and T and, of all rows, of that on the other side
    of the diagonal. Stored is W / |x|. With OF "y" X are the vectors of T, and Y those of S."""
    HAS_NORM: tl.constexpr = X_INVERSE_NORMS is not None
    row_tiles = tl.cdiv(N, BR)
    column_tiles = tl.cdiv(M, BR)
    item, row_tile, column_tile = tile_of(row_tiles, column_tiles, TRIANGLE)
    local = row_tile * BR + tl.arange(0, BR)
    i = top + local
    j = column_tile * BR + tl.arange(0, BR)
    own = _gram(X, x_item, x_row, D, X_INVERSE_NORMS, item, i, j, M, BR, BR, BD, DT, PREC, ACC)
    other = _gram(Y, y_item, y_row, D2, Y_INVERSE_NORMS, item, i, j, M, BR, BR, BD, DT, PREC, ACC)
    margin = double(margin_high, margin_low, ACC)
    if OF == "x":
        slopes = _slopes(own, other, margin, PENALTY, OF)
    else:
        slopes = _slopes(other, own, margin, PENALTY, OF)
    slopes = tl.where((i < M)[:, None] & (j < M)[None, :], slopes, 0.0)
    i_inverse_norm, j_inverse_norm = margin, margin
    if HAS_NORM:
        store_along(slopes * own, ALONG, item, local, j, row_tile, column_tile, column_tiles, N, TRIANGLE)
        i_inverse_norm = tl.load(X_INVERSE_NORMS + item * M + i, mask=i < M, other=0.0)
        j_inverse_norm = tl.load(X_INVERSE_NORMS + item * M + j, mask=j < M, other=0.0)
    store_weights(
        slopes, WEIGHTS, i_inverse_norm, j_inverse_norm, item, local, j, N, padded_columns,
        row_tile != column_tile, HAS_NORM, TRIANGLE,
    )  # fmt: skip
