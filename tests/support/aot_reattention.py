"""What the Triton kernels of re-attention are compiled for: every row of their tables."""

import torch

from vitdiv_kernels.ops.maps.reattention import triton_kernels

# Heads, keys: each row of ROWS, tiles of one query row and of several. The width is the products' alone.
# float16 is compiled as bfloat16 is, but for its scaling.
SHAPES = {
    torch.bfloat16: ((12, 64), (12, 197), (6, 197), (12, 300), (16, 1025), (24, 197)),
    torch.float16: ((12, 197), (24, 197)),
    torch.float32: ((12, 197), (6, 197), (16, 1025), (24, 197)),
    torch.float64: ((12, 197), (6, 197), (24, 197)),
}


def calls():
    for dtype, shapes in SHAPES.items():
        for heads, keys in shapes:
            q, k, v, matrix, vector = inputs(heads, keys, dtype)
            mixed = q, k, v, 0.125, None, None, matrix, vector, False, None, None, 1e-5
            call(mixed, matrix[None])
            everything = q, k, v, 0.125, matrix, vector, matrix, vector, False, vector, vector, 1e-5
            call(everything, matrix[None])
        x = torch.empty(2, 12, 197, 35, dtype=dtype, device="meta")
        triton_kernels.head_dots(x, x.transpose(1, 2).contiguous().transpose(1, 2))
    # the most usual: without a norm, where no Gram matrix is needed, and with batch norm
    q, k, v, matrix, vector = inputs(12, 197, torch.bfloat16)
    call((q, k, v, 0.125, None, None, matrix, vector, False, None, None, 1e-5), None)
    call((q, k, v, 0.125, None, None, matrix, None, True, None, None, 1e-5), matrix[None])


def inputs(heads, keys, dtype):
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = torch.empty(2, keys, 3, heads, 64, dtype=dtype, device="meta").permute(2, 0, 3, 1, 4)
    shapes = (heads, heads), heads
    return q, k, v, *(torch.empty(shape, dtype=accumulation, device="meta") for shape in shapes)


def call(arguments, coupling):
    q, _, _, _, pre_mix, _, _, _, _, norm_weight, _, _ = arguments
    needs = [True, True, True, pre_mix is not None, True, norm_weight is not None]
    triton_kernels.reattention_fwd(*arguments, True, coupling is not None)
    triton_kernels.reattention_bwd(q, coupling, *arguments, needs)
