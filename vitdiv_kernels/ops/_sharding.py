"""How the operators run on DTensors (torch.distributed.tensor): shards of a batch stay, all else is gathered.

Items of a batch are independent. Heads are not, where they are mixed or compared, nor the vectors of a set.
"""

import functools

from .._imports import when_imported

BATCH, SUM, WHOLE = "sharded along the first axis", "a part of a sum", "replicated"


def register(op, shards):
    """The rule of an operator, once torch.distributed.tensor is there: its import takes a second.

    shards(inputs) gives the sharding of each input and of each output, or None: all are whole then. Inputs
    that are tensors have a shape and placements.
    """
    when_imported("torch.distributed.tensor", functools.partial(_register, op, shards))


def _register(op, shards):
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    placements = {BATCH: Shard(0), SUM: Partial(), WHOLE: Replicate()}
    tensors = [str(argument.type) in ("Tensor", "Optional[Tensor]") for argument in op._schema.arguments]

    @register_sharding(op)
    def rule(*inputs):
        plan = shards(inputs) if shards is not None else None
        into, out_of = plan or ([WHOLE] * len(inputs), [WHOLE] * len(op._schema.returns))
        placed = [
            placements[how] if is_tensor and x is not None else None
            for x, how, is_tensor in zip(inputs, into, tensors, strict=True)
        ]
        return [([placements[how] for how in out_of], placed)]

    # Left alone it takes calls that differ in floats, words and flags for the same, and gives the later one
    # the output shapes of the first.
    first_option = tensors.index(False) if False in tensors else len(tensors)
    propagator = DTensor._op_dispatcher.sharding_propagator
    propagator.op_to_schema_info[op] = RuntimeSchemaInfo(first_option, needs_pytree=True)


def sets_forward(inputs):
    """Of (x, y, options ...) -> (values for each item, what is saved)."""
    if not _sets_by_items(inputs[0]):
        return None
    return (BATCH, BATCH, *(WHOLE,) * (len(inputs) - 2)), (BATCH, WHOLE)


def sets_backward(inputs, first):
    """Of (`first` tensors of values for each item, x, y, what was saved, options ..., needs_dx, needs_dy)
    -> (dx, dy)."""
    if not _sets_by_items(inputs[first]):
        return None
    into = (*(BATCH,) * (first + 2), *(WHOLE,) * (len(inputs) - first - 2))
    return into, tuple(map(batch_where, inputs[-2:]))


def by_items(x):
    """Whether a batch x [B, ...] is taken in shards: where it comes so."""
    return any(placement.is_shard(0) for placement in x.placements) and x.shape[0] >= x.mesh.size()


def _sets_by_items(x):
    """The same of sets [..., N, D]; the items of all leading axes have to be in the order of the shards.

    What a forward saves is the kernels' own affair: it goes to the backward as it is, as if it were whole. So
    both must take x alike, by what can be told from x alone.
    """
    return by_items(x) and (x.ndim == 3 or (x.ndim > 3 and x.shape[0] % x.mesh.size() == 0))


def batch_where(needed):
    return BATCH if needed else WHOLE
