"""What the Triton kernels of pairwise_rows are compiled for."""

import torch

from vitdiv_kernels.ops.pairs.pairwise_rows.triton_kernels import (
    pairwise_logsumexp_bwd,
    pairwise_logsumexp_fwd,
    pairwise_nearest,
)


def calls():
    """Forward and backward on meta tensors, over the rows of the configuration tables."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        _call(_x(196, 384, dtype), None)
    for dtype in (torch.bfloat16, torch.float32):
        _call(_x(196, 384, dtype), None, scale=100.0)
        _call(_x(196, 384, dtype), _x(49, 384, dtype))
    # a narrower gradient than the tables' rows make
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        _call(_x(196, 64, dtype), _x(49, 64, dtype))
    # no stride is a multiple of 16
    _call(_x(197, 35, torch.bfloat16), None)
    _call(_x(197, 1535, torch.bfloat16), None, scale=100.0)
    _call(_x(197, 1536, torch.float32)[:, :, 1:], _x(49, 1535, torch.float32))
    # few programs
    _call(_x(196, 384, torch.float16, 4), None)


def _x(n, width, dtype, items=256):
    return torch.empty(items, n, width, dtype=dtype, device="meta")


def _call(x, y, scale=2.0):
    rows, saved = pairwise_logsumexp_fwd(x, y, scale, 1e-8, True)
    pairwise_logsumexp_bwd(rows, rows, x, y, saved, scale, 1e-8, True, y is not None)
    pairwise_nearest(x, y, 1e-8)
