"""What the Triton kernels of pairwise_cosine are compiled for."""

import torch

from vitdiv_kernels.ops.pairs.pairwise_cosine.triton_kernels import pairwise_cosine_bwd, pairwise_cosine_fwd


def calls():
    """Forward and backward on meta tensors, over the rows of the configuration tables."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        _call(_x(196, 384, dtype), None, "abs")
        _call(_x(197, 768, dtype), None, "square")
    # no stride is a multiple of 16
    _call(_x(197, 35, torch.bfloat16), None, "abs")
    _call(_x(197, 1535, torch.bfloat16), None, "abs")
    _call(_x(197, 1536, torch.float32)[:, :, 1:], _x(49, 1535, torch.float32), "abs")
    _call(_x(196, 384, torch.float16), _x(49, 384, torch.float16), "relu")
    _call(_x(196, 384, torch.float16), None, "signed")
    _call(_x(196, 64, torch.bfloat16), None, "square")
    # few programs
    _call(_x(196, 384, torch.float16, 4), None, "abs")
    _call(_x(196, 384, torch.bfloat16, 4), None, "square")


def _x(n, width, dtype, items=256):
    return torch.empty(items, n, width, dtype=dtype, device="meta")


def _call(x, y, penalty):
    sums, saved = pairwise_cosine_fwd(x, y, penalty, False, 1e-8, True)
    pairwise_cosine_bwd(sums, x, y, saved, penalty, False, 1e-8, True, y is not None)
