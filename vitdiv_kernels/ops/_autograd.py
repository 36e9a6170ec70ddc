"""What the autograd.Functions of all operations share."""

import functools

import torch


def once_differentiable(backward):
    """Makes a second derivative through `backward` raise, where it would silently be left out.

    torch's decorator of this name does so only if the incoming gradients require grad, and that of a scalar
    loss does not.
    """

    @functools.wraps(backward)
    def wrapper(ctx, *grads):
        if torch.compiler.is_compiling():
            return backward(ctx, *grads)
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # no create_graph
            return outputs
        raise_later = torch._C._functions.DelayedError(
            b"vitdiv_kernels is differentiable once: use backend='reference' for second derivatives",
            len(outputs),
        )
        return raise_later(*(None if x is None else x.detach().requires_grad_() for x in outputs))

    return wrapper
