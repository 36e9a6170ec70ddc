"""What the Triton kernels of attention_gram are compiled for: a call for every row of their tables."""

import torch

from vitdiv_kernels.ops.attn_diversity import triton_kernels

# Heads and width: a power of two and less, every number of padded heads, widths of one and more pieces,
# unaligned.
SHAPES = (
    (1, 64),
    (2, 32),
    (3, 64),
    (6, 64),
    (12, 64),
    (12, 32),
    (16, 35),
    (8, 128),
    (12, 16),
    (24, 64),
    (32, 80),
)


def calls():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for heads, width in SHAPES:
            if dtype in (torch.float16, torch.float64) and heads not in (3, 12, 24):
                continue  # float16 is compiled as bfloat16 is, but for its scaling
            q, k, _ = torch.empty(2, 197, 3, heads, width, dtype=dtype, device="meta").permute(2, 0, 3, 1, 4)
            accumulation = torch.float64 if dtype == torch.float64 else torch.float32
            coupling = torch.empty(2, heads, heads, dtype=accumulation, device="meta")
            triton_kernels.attention_gram_fwd(q, k, 0.125, None, None, 0.125)
            triton_kernels.attention_gram_bwd(
                coupling, q, k, 0.125, None, None, 0.125, [True, True, False, False]
            )
