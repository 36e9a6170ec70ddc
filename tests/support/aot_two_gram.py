"""What the Triton kernels of two_gram are compiled for."""

import torch

from vitdiv_kernels.ops.pairs.two_gram.triton_kernels import two_gram_bwd, two_gram_fwd


def calls():
    """Forward and backward on meta tensors, over the rows of the configuration tables."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        _call(_x(196, 384, dtype), _x(196, 768, dtype), "relu_teacher_square")
    _call(_x(196, 384, torch.bfloat16), None, "square")
    _call(_x(196, 384, torch.float64), None, "hinge")
    _call(_x(196, 384, torch.bfloat16), _x(196, 384, torch.bfloat16), "hinge", normalise=False)
    _call(_x(196, 384, torch.float32), _x(196, 384, torch.float32), "product", normalise=False)
    # a narrower gradient than the tables' rows make
    for dtype in (torch.float16, torch.float32):
        _call(_x(196, 64, dtype), _x(196, 128, dtype), "hinge")
    # no stride is a multiple of 16
    _call(_x(197, 35, torch.bfloat16), _x(197, 1535, torch.bfloat16), "relu_square")
    _call(_x(197, 1536, torch.float32)[:, :, 1:], _x(197, 33, torch.float32), "clamped_teacher_square")
    # few programs
    _call(_x(196, 384, torch.float16, 4), _x(196, 768, torch.float16, 4), "hinge")


def _x(n, width, dtype, items=256):
    return torch.empty(items, n, width, dtype=dtype, device="meta")


def _call(x, y, penalty, normalise=True):
    arguments = penalty, 0.25, normalise, 1e-8, True, y is not None
    sums, saved = two_gram_fwd(x, y, *arguments)
    two_gram_bwd(sums, x, y, saved, *arguments)
