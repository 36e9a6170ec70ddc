"""What a model is wrapped in to be trained: checkpointing, processes, compilation."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..nn import ReAttention
from .errors import TrainError
from .parallel import Processes


def check_sync(model: nn.Module, device: torch.device) -> None:
    """Raises TrainError for batch norm that can't be that of all processes.

    Re-attention takes the statistics of its maps itself; torch's own SyncBatchNorm needs a GPU.
    """
    maps = {module.var_norm for module in model.modules() if isinstance(module, ReAttention)}
    for name, module in model.named_modules() if device.type == "cpu" else ():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module not in maps:
            raise TrainError(
                f"--sync-bn on the CPU is for batch norm of attention maps, and {name} is another "
                f"{type(module).__name__}, which torch synchronises on GPUs only: leave --sync-bn out"
            )


def checkpoint_blocks(model: nn.Module) -> None:
    """Blocks keep only what enters them for the backward pass, and compute the rest again.

    Hooks on blocks run once; batch norm counts the statistics of a batch once. A copy of the model must be
    made before.
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Module):
        raise TrainError(f"--checkpointing needs model.blocks, which {type(model).__name__} has not")
    for block in blocks.children():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    for module in model.modules():
        if isinstance(module, ReAttention):
            module.count_recomputed = False


def shard(model: nn.Module) -> None:
    """FSDP2: each block a unit, and what is left another."""
    from torch.distributed.fsdp import fully_shard

    for block in model.get_submodule("blocks").children():
        fully_shard(block)
    fully_shard(model)


def wrapped(
    model: nn.Module,
    processes: Processes,
    *,
    fsdp: bool,
    compile: bool,
    sync_bn: bool,
    losses_on_patch_head: bool = False,
) -> nn.Module:
    """The module to call in training. `losses_on_patch_head`: losses beside the logits give it a gradient."""
    run: Any = torch.compile(model) if compile else model
    if compile and fsdp:
        # blocks are compiled one by one, and not all have hooks of an objective
        torch._dynamo.config.skip_nnmodule_hook_guards = False
    if processes.size > 1 and not fsdp:
        # the head of patches (Gong et al.) has no part in the logits, and without such losses no gradient
        unused = getattr(model, "patch_head", None) is not None and not losses_on_patch_head
        run = nn.parallel.DistributedDataParallel(run, find_unused_parameters=unused)
    if sync_bn:
        # after DistributedDataParallel, which refuses SyncBatchNorm on CPUs but does not look again, and
        # before fully_shard, which knows parameters by their modules; the tensors stay the same
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if fsdp:
        shard(model)
    return run


@contextlib.contextmanager
def synchronised(run: nn.Module, model: nn.Module, last: bool) -> Iterator[None]:
    """Gradients are summed over the processes in the last part of a step only."""
    if isinstance(run, nn.parallel.DistributedDataParallel) and not last:
        with run.no_sync():
            yield
        return
    sharded: Any = model
    if hasattr(sharded, "set_requires_gradient_sync"):
        sharded.set_requires_gradient_sync(last)
    yield


def whole(value: Any) -> Any:
    """A state with all tensors whole and on the CPU; all processes must call it where tensors are sharded."""
    if isinstance(value, dict):
        return {name: whole(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(part) for part in value)
    return value.full_tensor().cpu() if hasattr(value, "full_tensor") else value


def like(tensor: Any, pattern: Any) -> Any:
    """A whole tensor, sharded as the pattern is, where that is sharded and has its shape."""
    if not isinstance(tensor, Tensor) or not hasattr(pattern, "placements") or tensor.shape != pattern.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(pattern.device), pattern.device_mesh, pattern.placements)
