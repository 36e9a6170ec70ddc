"""How the operators run under torch.vmap: as one call of a larger batch where they can, else item by item."""

import torch

JOIN = "join"  # the batch axis is joined to the first one
FRONT = "front"  # the batch axis is a first one more


def vmap_rule(op, folds):
    """The rule of an operator, as torch.library.register_vmap takes it.

    folds(inputs, dims) is asked with the inputs and the batch axis of each (None: it has none). It returns
    None where items have to be taken one by one; else how each input takes the batch and how each output has
    it: JOIN, FRONT, or None for not at all. What a forward saves for its backward is the kernels' own affair,
    and not split.
    """

    def rule(info, dims, *inputs):
        plan = folds(inputs, dims) if folds is not None else None
        if plan is None:
            return _one_by_one(op, info.batch_size, dims, inputs)
        into, out_of = plan
        outputs = op(*map(_fold, inputs, dims, into, (info.batch_size,) * len(inputs)))
        if isinstance(outputs, torch.Tensor):
            return _unfold(outputs, out_of[0], info.batch_size), 0
        found = tuple(map(_unfold, outputs, out_of, (info.batch_size,) * len(outputs)))
        return found, tuple(None if how is None else 0 for how in out_of)

    return rule


def _fold(x, dim, how, size):
    if how is None or x is None:
        return x
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1) if how is JOIN else x


def _unfold(x, how, size):
    return x.unflatten(0, (size, x.shape[0] // size)) if how is JOIN else x


def _one_by_one(op, size, dims, inputs):
    def item(x, dim, i):
        if not isinstance(dim, int):  # None, or a list of them
            return x
        x = x.select(dim, i)
        return x.contiguous() if x.dim() <= 2 else x  # of a matrix the kernels want the usual strides

    calls = [op(*(item(x, dim, i) for x, dim in zip(inputs, dims, strict=True))) for i in range(size)]
    if isinstance(calls[0], torch.Tensor):
        return torch.stack(calls), 0
    return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * len(calls[0])


def sets_forward(inputs, dims):
    """Of an operator (x, y or None, options ...) -> (values for each item, what it saves)."""
    return (FRONT, FRONT, *(None,) * (len(inputs) - 2)), (JOIN, None)


def nearest(inputs, dims):
    """Of an operator (x, y or None, eps) -> a value for each vector."""
    return (FRONT, FRONT, None), (JOIN,)


def sets_backward(inputs, dims, first):
    """Of an operator (`first` tensors of values for each item, x, y, saved, ..., needs_dx, needs_dy) ->
    (dx, dy). Where x and y have no batch, what was saved is of one call for all items."""
    if dims[first] is None and dims[first + 1] is None:
        return None
    into = (*(JOIN,) * first, FRONT, FRONT, *(None,) * (len(inputs) - first - 2))
    return into, tuple(FRONT if needed else None for needed in inputs[-2:])
