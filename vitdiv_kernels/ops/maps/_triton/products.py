"""The matrix products of re-attention, of all heads of a chunk at once, for tensors of any strides.

A library's batched product takes one stride for images and heads together. A view into packed q, k, v has
none, so that every operand and result would be copied: here there is nothing to copy.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..._launch import OPERANDS, accumulator, capability, double, input_precision, launch, split
from ..._tables import first_row
from ..._tables import options as launch_options


class ProductTile(NamedTuple):
    rows: int
    columns: int
    inner: int  # of a step of the loop; what is of the width is no more than a narrow one
    warps: int
    stages: int
    maxnreg: int | None


# Bytes of an element, lowest compute capability: the first row that covers a call. Of `rows_by_rows`, whose
# loop is along the width, and of `maps_by_rows`. float32 has 32 rows from compute capability 10 on: of 64
# Triton takes tcgen05, and chains the three products of TF32x3 in tensor memory, which gave wrong results on
# sm_103 (Triton's issue 10821). In more than one stage a loop of two steps is unrolled, and chains as well.
ROWS_BY_ROWS = {
    (2, (10, 0)): ProductTile(128, 128, 64, 8, 1, None),
    (2, (0, 0)): ProductTile(128, 128, 64, 8, 2, None),
    (4, (10, 0)): ProductTile(32, 64, 32, 4, 2, None),
    (4, (0, 0)): ProductTile(64, 64, 32, 4, 2, None),
    (8, (0, 0)): ProductTile(32, 32, 16, 4, 2, 128),
}
MAPS_BY_ROWS = {
    (2, (0, 0)): ProductTile(128, 64, 32, 8, 3, 128),
    (4, (10, 0)): ProductTile(32, 64, 32, 4, 2, None),
    (4, (0, 0)): ProductTile(64, 64, 32, 4, 2, None),
    (8, (0, 0)): ProductTile(32, 32, 16, 4, 2, None),
}


@triton.jit
def tile_of(heads, row_tiles, column_tiles):
    """(image, head, row tile, column tile) of this program; those of a head come one after the other."""
    program = tl.program_id(0)
    column_tile = program % column_tiles
    program //= column_tiles
    row_tile = program % row_tiles
    program //= row_tiles
    return (program // heads).to(tl.int64), (program % heads).to(tl.int64), row_tile, column_tile


@triton.jit(do_not_specialize=["rows", "columns", "heads", "row_tiles", "column_tiles"])
def logits_kernel(
    a,  # [B, H, rows, width]
    b,  # [B, H, columns, width]
    maps,  # [B, H, rows, padded_columns]
    alpha_high, alpha_low,  # see `double`
    padding,
    rows,
    columns,
    padded_columns,
    heads,
    row_tiles,
    column_tiles,
    maps_image, maps_head,  # strides
    a_image, a_head, a_row, a_column,
    b_image, b_head, b_row, b_column,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """maps = alpha a b^T, and `padding` past the columns: what stands there leaves no trace in a softmax."""
    image, head, row_tile, column_tile = tile_of(heads, row_tiles, column_tiles)
    i = row_tile * ROWS + tl.arange(0, ROWS)
    j = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    # in 64 bits: the width may be the outermost axis of a large tensor
    c = tl.arange(0, INNER).to(tl.int64)
    a += image * a_image + head * a_head
    b += image * b_image + head * b_head
    a_rows = a + i.to(tl.int64)[:, None] * a_row
    b_rows = b + j.to(tl.int64)[None, :] * b_row
    sums = tl.zeros((ROWS, COLUMNS), ACC)
    # unrolled it would chain products in tensor memory, as the tables say
    for c0 in tl.range(0, WIDTH, INNER):
        inside = c0 + c < WIDTH
        x = tl.load(
            a_rows + ((c0 + c) * a_column)[None, :], mask=(i < rows)[:, None] & inside[None, :], other=0.0
        )
        y = tl.load(
            b_rows + ((c0 + c) * b_column)[:, None], mask=(j < columns)[None, :] & inside[:, None], other=0.0
        )
        sums = tl.dot(x.to(DOT), y.to(DOT), sums, input_precision=PRECISION, out_dtype=ACC)
    products = sums * double(alpha_high, alpha_low, ACC)
    if (column_tile + 1) * COLUMNS > columns:
        products = tl.where((j < columns)[None, :], products, padding)
    maps += image * maps_image + head * maps_head
    tl.store(
        maps + i.to(tl.int64)[:, None] * padded_columns + j[None, :],
        products.to(maps.dtype.element_ty),
        mask=(i < rows)[:, None] & (j < padded_columns)[None, :],
    )


@triton.jit(do_not_specialize=["rows", "inner", "heads", "row_tiles", "column_tiles"])
def values_kernel(
    maps,  # [B, H, rows, padded columns], or with TRANSPOSED [B, H, inner, padded columns]
    b,  # [B, H, inner, width]
    result,  # [B, H, rows, width]
    alpha_high, alpha_low,  # see `double`
    rows,
    inner,
    padded_columns,
    heads,
    row_tiles,
    column_tiles,
    maps_image, maps_head,  # strides
    b_image, b_head, b_row, b_column,
    result_image, result_head, result_row, result_column,
    TRANSPOSED: tl.constexpr, ADD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, INNER: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """result = alpha maps b, or alpha maps^T b; with ADD it is added to what is there."""
    image, head, row_tile, column_tile = tile_of(heads, row_tiles, column_tiles)
    i = row_tile * ROWS + tl.arange(0, ROWS)
    c = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    c64 = c.to(tl.int64)  # the width may be the outermost axis of a large tensor
    maps += image * maps_image + head * maps_head
    b += image * b_image + head * b_head
    sums = tl.zeros((ROWS, COLUMNS), ACC)
    for k0 in tl.range(0, inner, INNER):
        k = k0 + tl.arange(0, INNER)
        # of maps whole rows are read, padding too, for loads of 16 bytes: it meets zeros of b
        if TRANSPOSED:
            x = tl.load(
                maps + k.to(tl.int64)[:, None] * padded_columns + i[None, :],
                mask=(k < inner)[:, None] & (i < padded_columns)[None, :], other=0.0,
            )  # fmt: skip
            x = tl.trans(x)
        else:
            x = tl.load(
                maps + i.to(tl.int64)[:, None] * padded_columns + k[None, :],
                mask=(i < rows)[:, None] & (k < padded_columns)[None, :], other=0.0,
            )  # fmt: skip
        y = tl.load(
            b + k.to(tl.int64)[:, None] * b_row + (c64 * b_column)[None, :],
            mask=(k < inner)[:, None] & (c < WIDTH)[None, :], other=0.0,
        )  # fmt: skip
        sums = tl.dot(x.to(DOT), y.to(DOT), sums, input_precision=PRECISION, out_dtype=ACC)
    result += image * result_image + head * result_head
    places = result + i.to(tl.int64)[:, None] * result_row + (c64 * result_column)[None, :]
    mask = (i < rows)[:, None] & (c < WIDTH)[None, :]
    sums *= double(alpha_high, alpha_low, ACC)
    if ADD:
        sums += tl.load(places, mask=mask, other=0.0).to(ACC)
    tl.store(places, sums.to(result.dtype.element_ty), mask=mask)


def padding_of(pre_mix):
    """What logits have past the keys: it leaves nothing in a softmax, nor in a mix of heads before it."""
    return float("-inf") if pre_mix is None else 0.0


def _tile(table, x):
    device = capability(x)
    return first_row(table, lambda size, first: x.dtype.itemsize == size and device >= first)


def _options(tile, dtype, width):
    return dict(
        WIDTH=width, ROWS=tile.rows, COLUMNS=tile.columns, INNER=tile.inner, DOT=OPERANDS[dtype],
        PRECISION=input_precision(dtype), ACC=accumulator(dtype), **launch_options(tile),
    )  # fmt: skip


def _of_width(most, width):
    """Of a part of a tile that goes along the width; 16 is what tensor cores take at least."""
    return min(most, max(16, triton.next_power_of_2(width)))


def rows_by_rows(maps, a, b, alpha=1.0, padding=0.0):
    """maps [B, H, rows, padded keys] = alpha a b^T of a [B, H, rows, d] and b [B, H, keys, d]."""
    images, heads, rows, width = a.shape
    keys = b.shape[2]
    tile = _tile(ROWS_BY_ROWS, a)
    tile = tile._replace(inner=_of_width(tile.inner, width))
    row_tiles, column_tiles = triton.cdiv(rows, tile.rows), triton.cdiv(maps.shape[3], tile.columns)
    launch(
        logits_kernel, (images * heads * row_tiles * column_tiles,), a, b, maps, *split(alpha), padding,
        rows, keys, maps.shape[3], heads, row_tiles, column_tiles, *maps.stride()[:2], *a.stride(),
        *b.stride(), **_options(tile, a.dtype, width),
    )  # fmt: skip


def maps_by_rows(result, maps, b, alpha=1.0, transposed=False, add=False):
    """result [B, H, rows, d] = alpha maps b, of maps [B, H, rows, padded keys] and b [B, H, keys, d]; with
    transposed result [B, H, keys, d] = alpha maps^T b, of b [B, H, rows, d]."""
    images, heads, rows, width = result.shape
    tile = _tile(MAPS_BY_ROWS, b)
    tile = tile._replace(columns=_of_width(tile.columns, width))
    row_tiles, column_tiles = triton.cdiv(rows, tile.rows), triton.cdiv(width, tile.columns)
    launch(
        values_kernel, (images * heads * row_tiles * column_tiles,), maps, b, result, *split(alpha), rows,
        b.shape[2], maps.shape[3], heads, row_tiles, column_tiles, *maps.stride()[:2], *b.stride(),
        *result.stride(), TRANSPOSED=transposed, ADD=add, **_options(tile, b.dtype, width),
    )  # fmt: skip
