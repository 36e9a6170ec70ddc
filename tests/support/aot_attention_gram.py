"""What the Triton kernels of attention_gram are compiled for: every row of their tables, each number of
padded heads that has few tiles, and more heads than a tile holds; and widths of one step of the products, of
two, and one that 16 does not divide."""

import torch

from vitdiv_kernels.ops.maps.attention_gram import triton_kernels

# Heads, width. float16 is compiled as bfloat16 is, but for its scaling.
SHAPES = {
    torch.bfloat16: ((1, 64), (3, 64), (6, 64), (12, 64), (16, 35), (8, 128), (12, 80), (16, 128), (24, 80)),
    torch.float16: ((12, 64),),
    torch.float32: ((3, 64), (6, 64), (12, 64)),
    torch.float64: ((3, 64), (12, 64), (24, 64)),
}


def calls():
    for dtype, shapes in SHAPES.items():
        accumulation = torch.float64 if dtype == torch.float64 else torch.float32
        for heads, width in shapes:
            q, k, _ = torch.empty(2, 197, 3, heads, width, dtype=dtype, device="meta").permute(2, 0, 3, 1, 4)
            coupling = torch.empty(2, heads, heads, dtype=accumulation, device="meta")
            triton_kernels.attention_gram_fwd(q, k, 0.125, None, None, 0.125)
            triton_kernels.attention_gram_bwd(
                coupling, q, k, 0.125, None, None, 0.125, [True, True, False, False]
            )
