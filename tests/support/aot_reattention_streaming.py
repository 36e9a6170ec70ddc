"""What the Triton kernels of re-attention's streaming schedule are compiled for: every row of their tables,
and each number of padded heads that has few tiles. An odd width is copied to one that 16 divides."""

import torch

from vitdiv_kernels.ops._launch import capability
from vitdiv_kernels.ops.maps._triton.tiles import too_large
from vitdiv_kernels.ops.maps.reattention.triton_kernels import streaming

# Heads, width. float16 is compiled as bfloat16 is, but for its scaling.
PLAIN = {
    torch.bfloat16: ((1, 64), (3, 64), (6, 64), (16, 35), (8, 128), (16, 128)),
    torch.float16: ((12, 64),),
    torch.float32: ((6, 64), (12, 64)),
}
WITH_EVERYTHING = {
    torch.bfloat16: ((3, 64), (6, 64), (8, 128)),
    torch.float16: ((6, 64),),
    torch.float32: ((6, 64),),
}


def calls():
    for dtype, shapes in PLAIN.items():
        for heads, width in shapes:
            q, k, v, matrix, vector = inputs(heads, width, dtype)
            mixed = q, k, v, 0.125, None, None, matrix, vector, False, None, None, 1e-5
            call(mixed, matrix[None])
    for dtype, shapes in WITH_EVERYTHING.items():
        for heads, width in shapes:
            q, k, v, matrix, vector = inputs(heads, width, dtype)
            everything = q, k, v, 0.125, matrix, vector, matrix, vector, False, vector, vector, 1e-5
            call(everything, matrix[None])
    # a pre-mix alone: of float16 this wide, the gradients of q and k spilled with fewer than all registers
    q, k, v, matrix, vector = inputs(8, 128, torch.float16)
    call((q, k, v, 0.125, matrix, vector, matrix, vector, False, None, None, 1e-5), matrix[None])
    # the most usual: without a norm, where no Gram matrix is needed, and with batch norm
    q, k, v, matrix, vector = inputs(12, 64, torch.bfloat16)
    call((q, k, v, 0.125, None, None, matrix, vector, False, None, None, 1e-5), None)
    call((q, k, v, 0.125, None, None, matrix, None, True, None, None, 1e-5), matrix[None])


def inputs(heads, width, dtype):
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = torch.empty(2, 197, 3, heads, width, dtype=dtype, device="meta").permute(2, 0, 3, 1, 4)
    shapes = (heads, heads), heads
    return q, k, v, *(torch.empty(shape, dtype=accumulation, device="meta") for shape in shapes)


def call(arguments, coupling):
    q, _, _, _, pre_mix, _, _, _, _, norm_weight, _, _ = arguments
    extras = pre_mix is not None or norm_weight is not None
    if too_large(q.shape[1], q.shape[3], q.dtype, extras, capability(q)):
        return
    needs = [True, True, True, pre_mix is not None, True, norm_weight is not None]
    streaming.forward(*arguments, True, coupling is not None)
    streaming.backward(q, coupling, *arguments, needs)
