"""What the autograd.Functions of all operations share."""

import functools

import torch
from torch.autograd import forward_ad

from ._exporting import exporting

transformed = torch._C._are_functorch_transforms_active  # within torch.func.grad, vmap, ...


def by_formula(x):
    """Whether autograd is to differentiate the formula of a Function, and not the Function: torch.func
    transforms it, an exported program keeps its forward alone, and DTensors have rules for what it is made
    of."""
    plain = type(x) in (torch.Tensor, torch.nn.Parameter)
    return not plain or transformed() or exporting()


def refuse_forward_mode(*inputs):
    """Raises where an input has a tangent (torch.func.jvp, jacfwd, hessian; dual numbers), which would be
    lost."""
    if forward_ad._current_level < 0:
        return
    for x in inputs:
        if isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                "vitdiv_kernels has no forward-mode derivatives (jvp, jacfwd, hessian): use "
                "backend='reference'"
            )


class _Refusal(torch.autograd.Function):
    """Gradients as they are; to differentiate them, with respect to anything that `others` depends on,
    raises."""

    @staticmethod
    def forward(ctx, count, *gradients_and_others):
        # copies: a view of an input could not be changed in place
        return tuple(gradient.clone() for gradient in gradients_and_others[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "vitdiv_kernels is differentiable once: for second derivatives use backend='reference', if the "
            "function has a backend"
        )


class AllSum(torch.autograd.Function):
    """Sum over the processes of a group. So is its gradient: each one's loss depends on all summands."""

    @staticmethod
    def forward(ctx, values, process_group):
        ctx.process_group = process_group
        total = values.clone()
        torch.distributed.all_reduce(total, group=process_group)
        return total

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone()
        torch.distributed.all_reduce(total, group=ctx.process_group)
        return total, None


class _Read:
    """A context whose saved tensors were read: under checkpointing that can be done once."""

    def __init__(self, ctx):
        self.ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name):
        return getattr(self.ctx, name)


def once_differentiable(backward):
    """Makes a second derivative through `backward` raise, where it would silently be left out.

    torch's decorator of this name does so only if the incoming gradients require grad, and that of a scalar
    loss does not; and what it returns hangs on no input, so that `torch.autograd.grad` of it with respect to
    an input passes it by, and returns what other paths give.
    """

    @functools.wraps(backward)
    def wrapper(ctx, *grads):
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # no create_graph
            return backward(ctx, *grads)
        ctx = _Read(ctx)
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        made = [x for x in outputs if x is not None]
        refused = iter(_Refusal.apply(len(made), *made, *ctx.saved_tensors, *grads))
        return tuple(None if x is None else next(refused) for x in outputs)

    return wrapper
