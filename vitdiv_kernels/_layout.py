"""Memory layouts that the kernels of all operations share."""

import torch


def heads_like(tensor):
    """An uninitialised [B, H, N, d] of the shape of `tensor`, laid out as [B, N, H, d] where `tensor` is.

    In that layout joining the heads again costs nothing.
    """
    b, h, n, d = tensor.shape
    if tensor.stride(1) < tensor.stride(2):
        return tensor.new_empty(b, n, h, d).transpose(1, 2)
    return tensor.new_empty(b, h, n, d)


def items(tensor):
    """The product of the leading axes of [..., N, D]; symbolic under torch.compile."""
    count = 1
    for size in tensor.shape[:-2]:
        count = count * size
    return count


def accumulation_dtype(tensor):
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def nothing(tensor):
    """What an operator returns for an output that nobody asked for."""
    return tensor.new_empty(0)


def when(condition, tensor):
    return tensor if condition else None


def requires_grad(*tensors):
    """Whether a derivative with respect to any of them may be asked for."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
