"""Running statistics of batch norm that the operation's own update, a step of fixed momentum, can't make."""

import torch


@torch.library.custom_op("vitdiv::in_backward", mutates_args=())
def _in_backward_now(like: torch.Tensor) -> torch.Tensor:
    """`in_backward` as a bool [], asked when a compiled program runs and not when it is made."""
    return torch.full((), in_backward(), dtype=torch.bool, device=like.device)


@_in_backward_now.register_fake
def _(like):
    return like.new_empty((), dtype=torch.bool)


def in_backward():
    """Whether this thread is in a backward pass, where checkpointing recomputes what it did not keep."""
    return torch._C._current_graph_task_id() != -1


def copies(norm):
    """Running mean and variance of a batch norm for the operation to step, and the momentum of the step."""
    momentum = 1.0 if norm.momentum is None else norm.momentum
    return norm.running_mean.clone(), norm.running_var.clone(), momentum


def put_back(norm, mean, var, count_recomputed):
    """Update a batch norm by its stepped `copies`: the average of all batches where its momentum is None, and
    nothing in a recomputation that must not count."""
    counts = True
    if not count_recomputed:
        compiling = torch.compiler.is_compiling()
        counts = ~_in_backward_now(norm.running_mean) if compiling else not in_backward()
    if counts is False:
        return
    number = norm.num_batches_tracked
    with torch.no_grad():
        if number is not None:
            number.add_(counts)
        for running, stepped in ((norm.running_mean, mean), (norm.running_var, var)):
            if norm.momentum is None:
                share = number.to(torch.promote_types(running.dtype, torch.float32)).reciprocal()
                stepped = running.lerp(stepped, share.to(running.dtype))
            running.copy_(stepped if counts is True else torch.where(counts, stepped, running))
