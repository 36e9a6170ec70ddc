"""What the Triton kernels of re-attention's workspace schedule are compiled for."""

import torch

from vitdiv_kernels.ops.reattention import triton_kernels

# Heads, keys, width: each row of ROWS, tiles of one query row and of several, any alignment.
SHAPES = {
    torch.bfloat16: ((12, 64, 64), (12, 197, 64), (6, 197, 35), (12, 300, 32), (16, 1025, 64), (24, 197, 64)),
    torch.float16: ((12, 197, 64), (16, 1025, 64), (24, 197, 64)),
    torch.float32: ((12, 197, 64), (6, 197, 35), (16, 1025, 64), (24, 197, 64)),
    torch.float64: ((12, 197, 64), (6, 197, 35)),  # more than 16 heads are known to spill
}


def calls():
    for dtype, shapes in SHAPES.items():
        for heads, keys, width in shapes:
            packed = torch.empty(2, keys, 3, heads, width, dtype=dtype, device="meta")
            call(*packed.permute(2, 0, 3, 1, 4))
        x = torch.empty(2, 12, 197, 35, dtype=dtype, device="meta")
        triton_kernels.head_dots(x, x.transpose(1, 2).contiguous().transpose(1, 2))


def call(q, k, v):
    heads = q.shape[1]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    matrix, vector = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((heads, heads), heads))
    plain = q, k, v, 0.125, None, None, matrix, vector, False, None, None, 1e-5
    batch = q, k, v, 0.125, None, None, matrix, None, True, None, None, 1e-5
    everything = q, k, v, 0.125, matrix, vector, matrix, vector, False, vector, vector, 1e-5
    with triton_kernels.schedule("workspace"):
        triton_kernels.reattention_fwd(*plain, True, False)
        triton_kernels.reattention_bwd(q, None, *plain, [True, True, True, False, True, False])
        triton_kernels.reattention_fwd(*batch, True, True)
        triton_kernels.reattention_bwd(q, matrix[None], *batch, [True, True, True, False, True, False])
        if heads <= 16 or q.dtype.itemsize == 2:
            triton_kernels.reattention_fwd(*everything, True, True)
            triton_kernels.reattention_bwd(q, matrix[None], *everything, [True] * 6)
