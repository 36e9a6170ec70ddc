"""head_dots: the sum over images and rows of x . y, per head."""

import torch
import triton
import triton.language as tl

from ...._layout import accumulation_dtype
from ..._launch import accumulator, launch

# 32 elements a thread and step; a program's rows give some hundred programs at ViT sizes.
_STEP, _ELEMENTS, _STEPS, _WARPS = 64, 4096, 4, 4


@triton.jit(do_not_specialize=["heads", "rows", "programs"])
def dot_rows(
    x,  # [B, heads, rows, width]
    y,  # [B, heads, rows, width]
    parts,  # [B * heads, programs]
    heads,
    rows,
    programs,  # of a head
    width,
    x_image, x_head, x_row,  # strides
    y_image, y_head, y_row,
    WIDTH: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """parts = sum_i x_i . y_i: of a head, over STEP * STEPS rows each."""
    # one axis: the others of a grid end at 65535
    item, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    image, head = item // heads, item % heads
    x += image.to(tl.int64) * x_image + head.to(tl.int64) * x_head
    y += image.to(tl.int64) * y_image + head.to(tl.int64) * y_head
    e = tl.arange(0, WIDTH)
    sums = tl.zeros((STEP, WIDTH), ACC)
    for step in range(STEPS):
        i = (program * STEPS + step) * STEP + tl.arange(0, STEP)
        inside = (i < rows)[:, None] & (e < width)[None, :]
        i64 = i.to(tl.int64)[:, None]
        x_block = tl.load(x + i64 * x_row + e[None, :], mask=inside, other=0.0).to(ACC)
        y_block = tl.load(y + i64 * y_row + e[None, :], mask=inside, other=0.0).to(ACC)
        sums += x_block * y_block
    tl.store(parts + tl.program_id(0), tl.sum(sums))


def head_dots(x, y):
    """As `vitdiv::head_dots`: [H] in the accumulation dtype; x and y are [B, H, N, d] with any strides."""
    x, y = (t if t.stride(3) == 1 else t.contiguous() for t in (x, y))
    images, heads, rows, width = x.shape
    padded = triton.next_power_of_2(width)
    step = max(1, min(_STEP, _ELEMENTS // padded))
    programs = triton.cdiv(rows, step * _STEPS)
    parts = x.new_empty(images, heads, programs, dtype=accumulation_dtype(x))
    launch(
        dot_rows, (images * heads * programs,), x, y, parts, heads, rows, programs, width, *x.stride()[:3],
        *y.stride()[:3], WIDTH=padded, STEP=step, STEPS=_STEPS,
        ACC=accumulator(x.dtype), num_warps=_WARPS, num_stages=1,
    )  # fmt: skip
    return parts.sum((0, 2), dtype=torch.float64).to(parts.dtype)
