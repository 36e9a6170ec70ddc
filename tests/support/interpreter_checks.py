"""Checks in Triton's interpreter of what else shows on a GPU only, if at all: bounds and races.

Every element that a kernel reads or writes lies in the tensor its pointer is from. The interpreter copies
bytes from and to whatever address it is given: what is out of bounds shows as a crash later, or never. Here a
pointer carries the extent of its tensor through all that is done to it; one that lost it is refused.

And what one program of a launch writes, no other one writes or reads: the interpreter runs them in order.

And tl.maximum, tl.max, tl.minimum and tl.min pass over a NaN, as on a GPU. The interpreter's maximum kept it
before Triton 3.8, and its max before 3.5.
"""

import functools

import numpy as np
from triton.runtime import interpreter

# The interpreter's operations that make a pointer of their first argument.
_FROM_A_POINTER = [
    f"create_{name}" for name in ("addptr", "broadcast", "expand_dims", "reshape", "splat", "trans")
]
_loads, _stores = [], []  # of one launch: (extent, program, addresses)


def _extent(tensor):
    """Addresses of the first byte and of the one behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    length = (last + 1) * tensor.element_size() if tensor.numel() else 0
    return tensor.data_ptr(), tensor.data_ptr() + length


def _access(pointers, mask, what, accesses):
    first, end = pointers.attr["extent"]
    addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
    if not addresses.size:
        return
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    if not first <= addresses.min() <= addresses.max() <= end - size:
        here = f"{int(addresses.min()) - first} to {int(addresses.max()) + size - first}"
        raise IndexError(f"{what} of bytes {here} of a tensor of {end - first}")
    builder = interpreter.interpreter_builder
    accesses.append(((first, end), np.ravel_multi_index(builder.grid_idx, builder.grid_dim), addresses))


def _check_races():
    written = {extent for extent, _, _ in _stores}
    loads = [
        load for load in _loads if any(load[0][0] < end and first < load[0][1] for first, end in written)
    ]
    if not written:
        return
    accesses = _stores + loads
    addresses = np.concatenate([access[2] for access in accesses])
    programs = np.repeat([access[1] for access in accesses], [access[2].size for access in accesses])
    order = np.lexsort((programs, addresses))
    addresses, programs = addresses[order], programs[order]
    shared = addresses[1:][(addresses[1:] == addresses[:-1]) & (programs[1:] != programs[:-1])]
    if np.isin(shared, np.concatenate([store[2] for store in _stores])).any():
        raise RuntimeError("a race: what one program writes, another one writes or reads")


def wrap(owner, name, wrapper):
    """owner.name(..) becomes wrapper(what it was, ..)."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*arguments, **named):
        return wrapper(original, *arguments, **named)

    setattr(owner, name, wrapped)


def install():
    """For all launches of this process from now on."""
    builder = interpreter.interpreter_builder
    if hasattr(builder.create_masked_load, "__wrapped__"):
        return

    def convert(original, argument):
        converted = original(argument)
        if hasattr(argument, "data_ptr"):
            converted.handle.set_attr("extent", _extent(argument))
        return converted

    def carry(original, *arguments):
        made = original(*arguments)
        for argument in arguments:
            if isinstance(argument, interpreter.TensorHandle) and "extent" in argument.attr:
                made.set_attr("extent", argument.attr["extent"])
        return made

    def load(original, pointers, mask, *others):
        _access(pointers, mask, "a load", _loads)
        return original(pointers, mask, *others)

    def store(original, pointers, value, mask, *others):
        _access(pointers, mask, "a store", _stores)
        return original(pointers, value, mask, *others)

    def launch(original, *arguments, **named):
        _loads.clear(), _stores.clear()
        original(*arguments, **named)
        _check_races()

    def reduced(original, self, values, val_reduce_op, idx_reduce_op=None):
        if idx_reduce_op is None:
            val_reduce_op = {np.max: np.nanmax, np.min: np.nanmin}.get(val_reduce_op, val_reduce_op)
        return original(self, values, val_reduce_op, idx_reduce_op)

    builder.create_maxnumf = lambda a, b: builder.binary_op(a, b, np.fmax)
    builder.create_minnumf = lambda a, b: builder.binary_op(a, b, np.fmin)
    wrap(interpreter.ReduceOps, "min_max", reduced)
    wrap(interpreter, "_implicit_cvt", convert)
    for name in _FROM_A_POINTER:
        wrap(builder, name, carry)
    wrap(builder, "create_masked_load", load)
    wrap(builder, "create_masked_store", store)
    wrap(interpreter.GridExecutor, "__call__", launch)
