"""Memory layouts that the kernels of all operations share."""

import torch


def unit_stride(tensor):
    """The tensor itself if its last axis is contiguous, which is all that the kernels ask for; else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def heads_like(tensor, model=None):
    """An uninitialised [B, H, N, d] of `tensor`'s shape, with the tokens outside of the heads where `model` has them so.

    An output laid out as [B, N, H, d] costs nothing when the heads are joined again.
    """
    model = tensor if model is None else model
    b, h, n, d = tensor.shape
    if model.stride(1) < model.stride(2):
        return tensor.new_empty(b, n, h, d).transpose(1, 2)
    return tensor.new_empty(b, h, n, d)


def accumulation_dtype(tensor):
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def nothing(tensor):
    """What an operator returns for an output that nobody asked for."""
    return tensor.new_empty(0)


def when(condition, tensor):
    return tensor if condition else None
