"""What the Triton kernels that hold a tile of all heads share: [HP, rows, columns], HP heads, a power of two.

Heads past H, rows past N and columns past M of a tile are zero where they are loaded and leave no trace in a
sum.
"""

import math

import torch
import triton
import triton.language as tl

from ...._layout import heads_like
from ..._launch import double

LOG2_E = math.log2(math.e)


@triton.jit
def natural(x):
    """x ln 2: of a factor that gives logits to the base of 2, the factor itself."""
    # ln 2 as two float32, for a literal is rounded to float32
    return x * 0.693147182464599609375 + x * -1.904654323148236017e-9


@triton.jit
def head_offsets(i, c0, stride_h, stride_n, HP: tl.constexpr, DB: tl.constexpr):
    """int64 offsets [HP, rows, DB] of rows i and columns c0 ... c0 + DB within an image."""
    h = tl.arange(0, HP).to(tl.int64)
    d = c0 + tl.arange(0, DB)
    return (h * stride_h)[:, None, None] + (i.to(tl.int64) * stride_n)[None, :, None] + d[None, None, :]


@triton.jit
def head_mask(i, n, c0, H: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DB: tl.constexpr):
    mask = (i < n)[None, :, None]
    if H < HP:
        mask = mask & (tl.arange(0, HP) < H)[:, None, None]
    if D % DB != 0:
        mask = mask & (c0 + tl.arange(0, DB) < D)[None, None, :]
    return mask


@triton.jit
def load_heads(
    base, i, n, c0, stride_h, stride_n,
    H: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """Rows i of all heads, columns c0 ... c0 + DB: [HP, rows, DB]."""
    offsets = head_offsets(i, c0, stride_h, stride_n, HP, DB)
    return tl.load(base + offsets, mask=head_mask(i, n, c0, H, HP, D, DB), other=0.0).to(DT)


@triton.jit
def store_heads(
    base, x, i, n, c0, stride_h, stride_n,
    H: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DB: tl.constexpr,
):  # fmt: skip
    offsets = head_offsets(i, c0, stride_h, stride_n, HP, DB)
    tl.store(base + offsets, x.to(base.dtype.element_ty), mask=head_mask(i, n, c0, H, HP, D, DB))


@triton.jit
def hold_heads(
    base, i, n, stride_h, stride_n, H: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DB: tl.constexpr,
    DT: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """Rows i of all heads in pieces of DB columns, kept through a loop; nothing if not HOLD."""
    pieces = ()
    if HOLD:
        for c in tl.static_range(0, (D + DB - 1) // DB):
            piece = load_heads(base, i, n, c * DB, stride_h, stride_n, H, HP, D, DB, DT)
            pieces = pieces + (piece,)  # noqa: RUF005 -- Triton knows no unpacking
    return pieces


@triton.jit
def products(
    held, a, i, n, a_h, a_n, b, j, m, b_h, b_n, H: tl.constexpr, HP: tl.constexpr, D: tl.constexpr,
    DB: tl.constexpr, DT: tl.constexpr, HOLD: tl.constexpr, PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """a_h[i] . b_h[j] of every head: [HP, rows i, rows j]; `held` is hold_heads of the rows i of a."""
    if HOLD:
        y = load_heads(b, j, m, 0, b_h, b_n, H, HP, D, DB, DT)
        s = tl.dot(held[0], tl.permute(y, (0, 2, 1)), input_precision=PREC, out_dtype=ACC)
        for c in tl.static_range(1, (D + DB - 1) // DB):
            y = load_heads(b, j, m, c * DB, b_h, b_n, H, HP, D, DB, DT)
            s = tl.dot(held[c], tl.permute(y, (0, 2, 1)), s, input_precision=PREC, out_dtype=ACC)
    else:
        s = tl.zeros((HP, i.shape[0], j.shape[0]), ACC)
        # a loop at run time: unrolled, its loads of a would be hoisted to where they hold the chip's memory
        for c0 in tl.range(0, D, DB, num_stages=1):
            x = load_heads(a, i, n, c0, a_h, a_n, H, HP, D, DB, DT)
            t = load_heads(b, j, m, c0, b_h, b_n, H, HP, D, DB, DT)
            s = tl.dot(x, tl.permute(t, (0, 2, 1)), s, input_precision=PREC, out_dtype=ACC)
    return s


# Tensor cores contract over 16 at least. With fewer heads a tile [HP, A, B] is read as [16, HP A B / 16], its
# rows (head, part) where `part` is one of S = 16 / HP parts of the keys, and the matrix as its Kronecker
# product with I_S. The parts are of the keys, not the queries: what a NaN reaches by 0 * NaN is its own row
# of the maps, lost anyway.
@triton.jit
def fold(x, HP: tl.constexpr, A: tl.constexpr, B: tl.constexpr, KEYS: tl.constexpr):
    """[HP, A, B] as [16 or HP, ...]; KEYS is the axis of the keys, 1 or 2."""
    S: tl.constexpr = 16 // HP if HP < 16 else 1
    if S > 1 and KEYS == 2:
        x = tl.permute(tl.reshape(x, (HP, A, S, B // S)), (0, 2, 1, 3))
    return tl.reshape(x, (HP * S, A * B // S))


@triton.jit
def unfold(x, HP: tl.constexpr, A: tl.constexpr, B: tl.constexpr, KEYS: tl.constexpr):
    S: tl.constexpr = 16 // HP if HP < 16 else 1
    if S > 1 and KEYS == 2:
        x = tl.permute(tl.reshape(x, (HP, S, A, B // S)), (0, 2, 1, 3))
    return tl.reshape(x, (HP, A, B))


@triton.jit
def kronecker(matrix, H: tl.constexpr, HP: tl.constexpr, TRANSPOSE: tl.constexpr, ACC: tl.constexpr):
    """The contiguous matrix [H, H], or its transpose, times I_S: [16 or HP, 16 or HP]."""
    S: tl.constexpr = 16 // HP if HP < 16 else 1
    r = tl.arange(0, HP * S)
    g = (r // S)[:, None]
    h = (r // S)[None, :]
    mask = (g < H) & (h < H) & ((r % S)[:, None] == (r % S)[None, :])
    if TRANSPOSE:
        offsets = h * H + g
    else:
        offsets = g * H + h
    return tl.load(matrix + offsets, mask=mask, other=0.0).to(ACC)


@triton.jit
def magnitude(matrix, DT: tl.constexpr, ACC: tl.constexpr):
    """What a matrix is divided by before float16 holds it: float16 has little range."""
    if DT == tl.float16:  # noqa: SIM300
        largest = tl.max(tl.abs(matrix))
        # not of an infinity: Inf / Inf were NaN where the matrix has none
        return tl.where((largest > 0.0) & (largest < float("inf")), largest, 1.0).to(ACC)
    else:
        return tl.full((), 1.0, ACC)


@triton.jit
def scaled_kronecker(
    matrix, size, H: tl.constexpr, HP: tl.constexpr, TRANSPOSE: tl.constexpr, DT: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    return (kronecker(matrix, H, HP, TRANSPOSE, ACC) / size).to(DT)


@triton.jit
def mix_heads(
    matrix, x, HP: tl.constexpr, A: tl.constexpr, B: tl.constexpr, KEYS: tl.constexpr, PREC: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """sum_h matrix[g, h] x_h for a tile x [HP, A, B], by a `kronecker` matrix of its dtype."""
    y = tl.dot(matrix, fold(x, HP, A, B, KEYS), input_precision=PREC, out_dtype=ACC)
    return unfold(y, HP, A, B, KEYS)


@triton.jit
def couple(
    acc, x, y, HP: tl.constexpr, A: tl.constexpr, B: tl.constexpr, W: tl.constexpr, PREC: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """acc [W, 16 or HP, 16 or HP] plus folded x times folded y transposed; its W parts keep W warps busy."""
    S: tl.constexpr = 16 // HP if HP < 16 else 1
    ROWS: tl.constexpr = HP * S
    COLUMNS: tl.constexpr = A * B // S
    x3 = tl.permute(tl.reshape(fold(x, HP, A, B, 2), (ROWS, W, COLUMNS // W)), (1, 0, 2))
    y3 = tl.permute(tl.reshape(fold(y, HP, A, B, 2), (ROWS, W, COLUMNS // W)), (1, 2, 0))
    return tl.dot(x3, y3, acc, input_precision=PREC, out_dtype=ACC)


@triton.jit
def store_coupled(base, acc, HP: tl.constexpr, W: tl.constexpr):
    """A partial sum of `couple`, with zeros where the parts of the keys differ."""
    S: tl.constexpr = 16 // HP if HP < 16 else 1
    ROWS: tl.constexpr = HP * S
    r = tl.arange(0, ROWS)
    if W == 1:
        total = tl.reshape(acc, (ROWS, ROWS))
    else:
        total = tl.sum(acc, 0)
    total = tl.where((r % S)[:, None] == (r % S)[None, :], total, 0.0)
    tl.store(base + r[:, None] * ROWS + r[None, :], total)


@triton.jit
def row_values(base, i, n, stride_h, other, HP: tl.constexpr):
    """Values [HP, rows] kept per head and row."""
    h = tl.arange(0, HP)
    offsets = h[:, None].to(tl.int64) * stride_h + i[None, :]
    return tl.load(base + offsets, mask=(i < n)[None, :] & (h < HP)[:, None], other=other)


@triton.jit
def head_values(base, H: tl.constexpr, HP: tl.constexpr, ACC: tl.constexpr):
    """[HP, 1, 1] of a parameter [H]."""
    h = tl.arange(0, HP)
    return tl.load(base + h, mask=h < H, other=0.0).to(ACC)[:, None, None]


@triton.jit
def factors(
    first_high, first_low, second_high, second_low, H1: tl.constexpr, HP: tl.constexpr, ACC: tl.constexpr
):
    """What the products of each head are multiplied by, [HP, 1, 1]: heads past H1 are another layer's."""
    first = double(first_high, first_low, ACC)
    second = double(second_high, second_low, ACC)
    return tl.where(tl.arange(0, HP) < H1, first, second)[:, None, None]


def aligned(x):
    """x [B, H, N, d], or a copy, whose rows start at multiples of 16 elements and are that many elements
    long.

    Otherwise every load is of one element, which takes twice the instructions and spills registers.
    """
    if (
        x.stride(3) == 1
        and x.shape[3] % 16 == 0
        and x.data_ptr() % 16 == 0
        and not any(s % 16 for s in x.stride()[:3])
    ):
        return x
    b, h, n, d = x.shape
    copy = x.new_zeros(b, n, h, -(-d // 16) * 16).transpose(1, 2)
    copy[..., :d] = x
    return copy


def aligned_empty(x):
    """(heads_like(x), where kernels may write it: itself or its aligned stand-in); see `deliver`."""
    result = heads_like(x)
    b, h, n, d = x.shape
    if d % 16 == 0:
        return result, result
    return result, x.new_empty(b, n, h, -(-d // 16) * 16).transpose(1, 2)


def deliver(result, written):
    if written is not result:
        result.copy_(written[..., : result.shape[3]])
    return result


def uncouple(partial, heads):
    """Sum over partial sums [B, programs, ROWS, ROWS] of `store_coupled`: [B, heads, heads], float64."""
    b, _, k, _ = partial.shape
    padded = padded_heads(heads)
    total = partial.sum(1, dtype=torch.float64).view(b, padded, k // padded, padded, k // padded)
    return total.diagonal(dim1=2, dim2=4).sum(-1)[:, :heads, :heads]


def padded_heads(heads):
    return triton.next_power_of_2(heads)
