"""Every element that a kernel reads or writes in Triton's interpreter lies in the tensor its pointer is from.

The interpreter copies bytes from and to whatever address it is given: what is out of bounds shows as a crash
later, or not at all. After `install` a pointer carries the extent of its tensor through all that is done to
it; one that lost it is refused, too.
"""

import functools

import numpy as np
from triton.runtime import interpreter

# The interpreter's operations that make a pointer of their first argument.
_FROM_A_POINTER = [
    f"create_{name}" for name in ("addptr", "broadcast", "expand_dims", "reshape", "splat", "trans")
]


def _extent(tensor):
    """Addresses of the first byte and of the one behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    length = (last + 1) * tensor.element_size() if tensor.numel() else 0
    return tensor.data_ptr(), tensor.data_ptr() + length


def _check(pointers, mask, what):
    first, end = pointers.attr["extent"]
    addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    if addresses.size and not first <= addresses.min() <= addresses.max() <= end - size:
        here = f"{int(addresses.min()) - first} to {int(addresses.max()) + size - first}"
        raise IndexError(f"{what} of bytes {here} of a tensor of {end - first}")


def _wrap(owner, name, wrapper):
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(functools.partial(wrapper, original)))


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
            if "extent" in getattr(argument, "attr", ()):
                made.set_attr("extent", argument.attr["extent"])
        return made

    def load(original, pointers, mask, *others):
        _check(pointers, mask, "a load")
        return original(pointers, mask, *others)

    def store(original, pointers, value, mask, *others):
        _check(pointers, mask, "a store")
        return original(pointers, value, mask, *others)

    _wrap(interpreter, "_implicit_cvt", convert)
    for name in _FROM_A_POINTER:
        _wrap(builder, name, carry)
    _wrap(builder, "create_masked_load", load)
    _wrap(builder, "create_masked_store", store)
