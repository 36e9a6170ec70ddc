"""What is read outside of the forward pass, where each process holds a shard of the weights, or some of the
images, only."""

import contextlib
import sys
from typing import Any

import torch

from .._autograd import AllSum


def gathered(tensor):
    """The whole of a tensor that is a DTensor (fully_shard, tensor parallelism), differentiable; another one
    as it is.

    Each process takes its own loss of it, as of its own images: the gradient of the shards is the mean over
    the processes, as that of the model's loss. All processes must call it.
    """
    if not _is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import Partial

    mesh = tensor.device_mesh
    whole = tensor.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    return _Share.apply(whole, mesh.size()) if whole.requires_grad else whole


class _Share(torch.autograd.Function):
    """The same tensor; its gradients, which are then summed over `processes`, become shares of their mean."""

    @staticmethod
    def forward(ctx, x, processes):
        ctx.processes = processes
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad / ctx.processes, None


def summed(tensor, count, process_group):
    """A tensor and a count, their sums over the processes of a group, differentiable; without a group as they
    are."""
    if process_group is None:
        return tensor, count
    packed = torch.cat([tensor.flatten(), tensor.new_full((1,), count)])
    total: Any = AllSum.apply(packed, process_group)
    return total[:-1].view_as(tensor), total[-1]


def call(module, x):
    """module(x) outside of the model's forward, with its whole weights.

    A module that has hooks of its own gathers by itself: that of fully_shard(module) or parallelize_module.
    """
    shards = {name: p for name, p in module.named_parameters() if _is_sharded(p)}
    if not shards or any(m._forward_pre_hooks for m in module.modules()):
        return module(x)
    return torch.func.functional_call(module, {name: gathered(p) for name, p in shards.items()}, (x,))


def is_flat(model):
    """Whether FullyShardedDataParallel (FSDP1) holds weights of the model, in flat parameters."""
    return bool(_fsdp1_units(model)) or any(getattr(p, "_fsdp_flattened", False) for p in model.parameters())


@contextlib.contextmanager
def restored(model):
    """Weights that are sharded before are sharded afterwards: fully_shard leaves those of the root gathered
    after a forward pass, and a step of the optimizer would not reach them."""
    sharded = [p for p in model.parameters() if _is_sharded(p)]
    try:
        yield
    finally:
        if len(sharded) > sum(map(_is_sharded, model.parameters())):
            for module in model.modules():
                if hasattr(module, "reshard"):
                    module.reshard()


def whole(model):
    """A context without gradients in which the weights of FSDP1 are there as a whole."""
    units = _fsdp1_units(model)
    if not units:
        return contextlib.nullcontext()
    return type(units[0]).summon_full_params(model, writeback=False)


def _is_sharded(tensor):
    module = sys.modules.get("torch.distributed.tensor")  # not imported: then there is no DTensor
    return module is not None and isinstance(tensor, module.DTensor)


def _fsdp1_units(model):
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return []
    return [m for m in model.modules() if isinstance(m, fsdp.FullyShardedDataParallel)]
