"""What the Triton kernels of pairs of vectors share: inverse norms, tiles of products, gradients of rows.

Vectors are multiplied as they are, and the inverse norms applied to the tiles of products; tiles of vectors
far from 1, whose products would leave the range, are made again of vectors brought near 1.

Names of constants: BR, BC, BD, BO sizes of a tile's rows and columns, of a step over the width, of columns of
the gradient; BN rows of kernels that read each once. DT and WT are the element types of the factors of
products, of vectors and of weights, PREC and WPREC their precisions if float32, ACC that of all else.
"""

import math

import torch
import triton
import triton.language as tl

from .._launch import OPERANDS, accumulator, capability, input_precision, launch, to_tf32

BLOCK_ROWS, BLOCK_WIDTH = 16, 256  # of the kernels that read each row once: 4096 elements, 32 a thread
# Of variants that the tables' rows were not chosen for. Without a limit ptxas aims at 128, and may spill a
# little to get there.
ALL_REGISTERS = 255


def items_of(x):
    """[items, N, D] with a last stride of 1; a view where the leading axes are one in memory."""
    x = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def slices(config, *rows):
    """What a program of this row of a table takes of the vectors at a time, and registers at most."""
    if all(map(aligned, rows)):
        return dict(BD=config.width, maxnreg=ALL_REGISTERS if _takes_many(rows[0]) else None)
    return dict(BD=max(16, config.width // 2), maxnreg=ALL_REGISTERS)


def gradient_columns(most, width, *rows, maxnreg=None):
    """How many columns of the gradient [items, N, width] a program makes, and registers at most."""
    # no wider than the gradient: narrow rows would be mostly padding
    out = min(most, max(16, triton.next_power_of_2(width)))
    if not all(map(aligned, rows)):
        return dict(BO=min(out, 32), maxnreg=ALL_REGISTERS)
    return dict(BO=out, maxnreg=ALL_REGISTERS if out < most or _takes_many(rows[0]) else maxnreg)


def _takes_many(x):
    """Whether its kernels spilled at 168 registers."""
    return x.dtype == torch.float64 or (x.dtype, capability(x)[0]) == (torch.float32, 10)


def aligned(x):
    """Whether Triton, too, can tell that its rows start at multiples of 16 bytes.

    Otherwise every load is of one element, and needs a register for every address.
    """
    return x.stride(1) % 16 == 0 and x.data_ptr() % 16 == 0


def read_rows(x, inverse_norms, eps, *, squares=None, sums=None, unit=None):
    """Inverse norms and what else is asked for: |x_hat|^2, sums of x_hat over blocks of rows, x_hat."""
    items, rows, width = x.shape
    maxnreg = 128 if x.dtype == torch.bfloat16 else None  # at 72 it spilled on sm_100
    launch(
        rows_kernel, (items * triton.cdiv(rows, BLOCK_ROWS),),
        x, x.stride(0), x.stride(1), inverse_norms, squares, sums, unit, rows, width,
        EPS=eps, INVERSE_EPS=inverse_eps(eps), BN=BLOCK_ROWS, BD=BLOCK_WIDTH, ACC=accumulator(x.dtype),
        num_warps=4, num_stages=2, maxnreg=maxnreg,
    )  # fmt: skip


def inverse_eps(eps):
    return 1 / eps if eps else math.inf


def dot_types(x):
    """Element type of the products' operands, precision and accumulator."""
    return dict(DT=OPERANDS[x.dtype], PREC=input_precision(x.dtype), ACC=accumulator(x.dtype))


def weight_types(x):
    """Element type and precision of products of rows with weights of any size, more than float16 holds."""
    if x.dtype == torch.float16:
        return dict(WT=tl.float32, WPREC="rounded tf32")  # whose 11 bits hold the rows
    types = dot_types(x)
    return dict(WT=types["DT"], WPREC=types["PREC"])


# Triton's usual ones of float32 are off by 1 and 2 units in the last place, which a log-sum-exp of large
# scale shows. These are one a row.
@triton.jit
def square_root(x, ACC: tl.constexpr):
    if ACC == tl.float32:  # noqa: SIM300
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def inverse_of(x, ACC: tl.constexpr):
    if ACC == tl.float32:  # noqa: SIM300
        return tl.div_rn(tl.full(x.shape, 1.0, ACC), x)
    else:
        return 1.0 / x


@triton.jit
def _any_far(length, ACC: tl.constexpr):
    """1 if products of vectors of any of these lengths, or inverse lengths, may leave the range, else 0."""
    bound: tl.constexpr = 2.0**340 if ACC == tl.float64 else 2.0**42  # noqa: SIM300
    far = (length > bound) | (length < 1.0 / bound)
    return tl.max(far.to(tl.int32), 0)


@triton.jit
def _powers(x, ACC: tl.constexpr):
    """The largest power of two up to x > 0, and its inverse, both normal numbers."""
    largest: tl.constexpr = 2.0**1022 if ACC == tl.float64 else 2.0**126  # noqa: SIM300
    x = tl.minimum(tl.maximum(x, 1.0 / largest), largest)
    if ACC == tl.float64:  # noqa: SIM300
        bits = x.to(tl.int64, bitcast=True) & 0x7FF0000000000000
        inverse_bits = 0x7FE0000000000000 - bits
    else:
        bits = x.to(tl.int32, bitcast=True) & 0x7F800000
        inverse_bits = 0x7F000000 - bits
    return bits.to(ACC, bitcast=True), inverse_bits.to(ACC, bitcast=True)


@triton.jit
def _far_lengths(rows, row_mask, D, BN: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr):
    """|x| of vectors of any length, read twice more: a power of two times the length of x by it."""
    d = tl.arange(0, BD)
    largest = tl.zeros((BN, BD), ACC)
    for d0 in tl.range(0, D, BD):
        mask = row_mask & (d0 + d < D)[None, :]
        largest = tl.maximum(largest, tl.abs(tl.load(rows + (d0 + d)[None, :], mask=mask, other=0.0).to(ACC)))
    power, inverse_power = _powers(tl.max(largest, 1), ACC)
    squares = tl.zeros((BN, BD), ACC)
    for e0 in tl.range(0, D, BD):
        mask = row_mask & (e0 + d < D)[None, :]
        x = tl.load(rows + (e0 + d)[None, :], mask=mask, other=0.0).to(ACC) * inverse_power[:, None]
        squares += x * x
    return square_root(tl.sum(squares, 1), ACC) * power


# Numbers of rows help no load, so that one compiled kernel serves them all; strides and widths do. Inverse
# norms are loaded one by one, and where those of y start depends on the number of rows.
@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["INVERSE_NORMS"])
def rows_kernel(
    X, x_item, x_row,  # [L, N, D] and its strides
    INVERSE_NORMS,  # [L, N]
    SQUARES,  # [L, N], or None, as what follows may be
    SUMS,  # [L, blocks of rows, D]
    UNIT,  # [L, N, D]
    N,
    D,
    EPS: tl.constexpr, INVERSE_EPS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """inverse_norm = 1 / max(|x|, eps) of a block of BN rows and, of x_hat = x inverse_norm, in a second
    reading, what has a pointer: SQUARES |x_hat|^2, SUMS sum_n x_hat, UNIT x_hat."""
    blocks = tl.cdiv(N, BN)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    n = block * BN + tl.arange(0, BN)
    d = tl.arange(0, BD)
    row_mask = (n < N)[:, None]
    rows = X + item * x_item + n.to(tl.int64)[:, None] * x_row
    squares = tl.zeros((BN, BD), ACC)
    for d0 in tl.range(0, D, BD):
        mask = row_mask & (d0 + d < D)[None, :]
        x = tl.load(rows + (d0 + d)[None, :], mask=mask, other=0.0).to(ACC)
        squares += x * x
    length = square_root(tl.sum(squares, 1), ACC)
    eps = tl.full((BN,), EPS, ACC)
    if X.dtype.element_ty != tl.float16:  # whose squares are all within range
        size = tl.where(n < N, tl.where(length <= eps, eps, length), 1.0)
        if _any_far(size, ACC) > 0:
            length = _far_lengths(rows, row_mask, D, BN, BD, ACC)
    # of a NaN stays NaN
    short = length <= eps
    inverse_norm = inverse_of(tl.where(short, 1.0, length), ACC)
    inverse_norm = tl.where(short, tl.full((BN,), INVERSE_EPS, ACC), inverse_norm)
    tl.store(INVERSE_NORMS + item * N + n, inverse_norm, mask=n < N)
    if SQUARES is not None:
        tl.store(SQUARES + item * N + n, (length * inverse_norm) * (length * inverse_norm), mask=n < N)
    if (SUMS is not None) or (UNIT is not None):
        for e0 in tl.range(0, D, BD):
            width_mask = e0 + d < D
            row = tl.load(rows + (e0 + d)[None, :], mask=row_mask & width_mask[None, :], other=0.0).to(ACC)
            unit = row * inverse_norm[:, None]
            if SUMS is not None:
                # rows past the last have the inverse norm of a zero row: 0 * 1e8, but 0 * inf when eps is 0
                sums = tl.sum(tl.where(row_mask, unit, 0.0), 0)
                tl.store(SUMS + (item * blocks + block) * D + e0 + d, sums, mask=width_mask)
            if UNIT is not None:
                place = UNIT + (item * N + n)[:, None] * D + (e0 + d)[None, :]
                tl.store(place, unit.to(UNIT.dtype.element_ty), mask=row_mask & width_mask[None, :])


@triton.jit
def tile_of(tiles_of_rows, tiles_of_columns, TRIANGLE: tl.constexpr):
    """(item, tile of rows, tile of columns) of this program; of the upper triangle alone, row by row."""
    if TRIANGLE:
        tiles = tiles_of_rows * (tiles_of_rows + 1) // 2
        left = tl.program_id(0) % tiles
        row_tile = 0
        while left >= tiles_of_rows - row_tile:
            left -= tiles_of_rows - row_tile
            row_tile += 1
        column_tile = row_tile + left
    else:
        tiles = tiles_of_rows * tiles_of_columns
        row_tile = tl.program_id(0) % tiles // tiles_of_columns
        column_tile = tl.program_id(0) % tiles_of_columns
    item = (tl.program_id(0) // tiles).to(tl.int64)
    return item, row_tile, column_tile


@triton.jit
def products(
    x_rows, y_rows, x_mask, y_mask, D, BR: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """x y^T, [BR, BC], of rows [.., 1] of pointers, from slices of BD of the width D."""
    d = tl.arange(0, BD)
    s = tl.zeros((BR, BC), ACC)
    for d0 in tl.range(0, D, BD):
        width_mask = (d0 + d < D)[None, :]
        x = tl.load(x_rows + (d0 + d)[None, :], mask=x_mask[:, None] & width_mask, other=0.0).to(DT)
        y = tl.load(y_rows + (d0 + d)[None, :], mask=y_mask[:, None] & width_mask, other=0.0).to(DT)
        s = tl.dot(x, tl.trans(y), s, input_precision=PREC, out_dtype=ACC)
    return s


@triton.jit
def cosines(
    x_rows, y_rows, x_mask, y_mask, D, x_inverse_norm, y_inverse_norm,
    BR: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
    DT: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`products` of unit vectors, of inverse norms as given."""
    s = products(x_rows, y_rows, x_mask, y_mask, D, BR, BC, BD, DT, PREC, ACC)
    # the same when x and y change places, for vectors that are equal to be equally near
    s = s * (x_inverse_norm[:, None] * y_inverse_norm[None, :])
    if DT != tl.float16:  # noqa: SIM300 -- whose products are all within range
        # 0 is the inverse norm of no row
        x_far = _any_far(tl.where(x_inverse_norm > 0, x_inverse_norm, 1.0), ACC)
        far = tl.maximum(x_far, _any_far(tl.where(y_inverse_norm > 0, y_inverse_norm, 1.0), ACC))
        if far > 0:
            # Of what depends on `far`, which is 1, the compiler moves nothing out of the branch and out of
            # the loops around it, where it would take registers. Multiples of 16 keep the loads wide.
            first, x_inverse_norm, y_inverse_norm = 16 * (far - 1), x_inverse_norm * far, y_inverse_norm * far
            s = _far_cosines(
                x_rows, y_rows, x_mask, y_mask, first, D, x_inverse_norm, y_inverse_norm,
                BR, BC, DT, PREC, ACC,
            )  # fmt: skip
    return s


@triton.jit
def _far_cosines(
    x_rows, y_rows, x_mask, y_mask, first, D, x_inverse_norm, y_inverse_norm,
    BR: tl.constexpr, BC: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`cosines` of vectors of any length, multiplied by powers of two first, which is exact."""
    FD: tl.constexpr = 16  # and no stages: no more registers than `products` takes
    x_power, x_inverse = _powers(x_inverse_norm, ACC)
    y_power, y_inverse = _powers(y_inverse_norm, ACC)
    d = tl.arange(0, FD)
    s = tl.zeros((BR, BC), ACC)
    for d0 in tl.range(first, D, FD * (first + 1), num_stages=1):
        width_mask = (d0 + d < D)[None, :]
        x = tl.load(x_rows + (d0 + d)[None, :], mask=x_mask[:, None] & width_mask, other=0.0).to(ACC)
        y = tl.load(y_rows + (d0 + d)[None, :], mask=y_mask[:, None] & width_mask, other=0.0).to(ACC)
        x, y = (x * x_power[:, None]).to(DT), (y * y_power[:, None]).to(DT)
        s = tl.dot(x, tl.trans(y), s, input_precision=PREC, out_dtype=ACC)
    return s * ((x_inverse_norm * x_inverse)[:, None] * (y_inverse_norm * y_inverse)[None, :])


@triton.jit
def add_rows(dx, weights, y_places, y_mask, WT: tl.constexpr, WPREC: tl.constexpr, ACC: tl.constexpr):
    """dx + weights y."""
    y = tl.load(y_places, mask=y_mask, other=0.0).to(WT)
    if WPREC == "rounded tf32":
        return tl.dot(to_tf32(weights), y, dx, input_precision="tf32", out_dtype=ACC)
    else:
        return tl.dot(weights.to(WT), y, dx, input_precision=WPREC, out_dtype=ACC)


@triton.jit
def through_norm(dx, x, inverse_norm, along, INVERSE_EPS: tl.constexpr, BR: tl.constexpr, ACC: tl.constexpr):
    """The gradient of rows x from that of x_hat, whose part along x_hat is known."""
    # a row that was divided by eps has no part taken out
    along = tl.where(inverse_norm < tl.full((BR,), INVERSE_EPS, ACC), along, 0.0)
    return inverse_norm[:, None] * (dx - x * inverse_norm[:, None] * along[:, None])
