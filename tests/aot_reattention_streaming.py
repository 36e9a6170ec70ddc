"""What the Triton kernels of re-attention's streaming schedule are compiled for."""

import torch

from vitdiv_kernels.ops.reattention.triton_kernels import streaming

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
            q, k, v = torch.empty(2, 197, 3, heads, width, dtype=dtype, device="meta").permute(2, 0, 3, 1, 4)
            call(q, k, v, all_options=heads in (3, 12, 24))


def call(q, k, v, all_options):
    heads = q.shape[1]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    matrix, vector = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((heads, heads), heads))
    plain = q, k, v, 0.125, None, None, matrix, vector, False, None, None, 1e-5
    batch = q, k, v, 0.125, None, None, matrix, None, True, None, None, 1e-5
    everything = q, k, v, 0.125, matrix, vector, matrix, vector, False, vector, vector, 1e-5
    streaming.forward(*plain, True, False)
    streaming.backward(q, None, *plain, [True, True, True, False, True, False])
    if all_options:
        streaming.forward(*batch, True, True)
        streaming.backward(q, matrix[None], *batch, [True, True, True, False, True, False])
        streaming.forward(*everything, True, True)
        streaming.backward(q, matrix[None], *everything, [True] * 6)
