"""Triton's interpreter without its largest costs, which find nothing.

- It exchanges all functions of triton.language for its own at each call of a @triton.jit function by another,
  which tl.sum and tl.max are, too: half a millisecond. Once a launch is enough.
- It computes each sum, difference and product of integers of 32 bits again in 64 bits, in ten operations, and
  compares nothing: the assertion behind them is dropped where `debug` is not set.
- It makes the type of each tensor anew, its shape three times, each a tuple of objects that know their own
  types: half of the time of small tiles. Each is made once, and that two tensors share one tells that they
  need no broadcast. A table of all dtypes is made at each look into it; once is enough.
"""

import dataclasses
import functools
import inspect

import triton.language as tl
from interpreter_checks import wrap
from triton.runtime import interpreter

_exchanged = set()  # names of modules, in this launch
_types = {}  # the attributes of a block type, by element type and sizes
_shapes = {}  # of a block type and of a tensor, by sizes: (what its attribute `shape` is, numel)
_TENSOR = {"handle", "type", "dtype", "shape", "numel"}  # all attributes of a tensor
_PLAIN = {int, float, bool, str, type(None), tl.tensor, tl.dtype, tl.block_type, tl.pointer_type}


@functools.cache
def _modules(function):
    """The modules that the function's file sees."""
    seen = [value for value in function.__globals__.values() if inspect.ismodule(value)]
    return frozenset(module.__name__ for module in (tl, tl.core) if module in seen)


def _sizes(shape):
    """Of a list or one of Triton's tuples, of numbers or of constants that hold one."""
    return tuple([getattr(size, "value", size) for size in getattr(shape, "values", shape)])


def _block_type(original):
    def init(self, element_ty, shape):
        key = str(element_ty), _sizes(shape)
        if key not in _types:
            original(self, element_ty, shape)
            self.shape, self.numel = _shapes.setdefault(("type", key[1]), (self.shape, self.numel))
            _types[key] = dict(vars(self))
        vars(self).update(_types[key])

    return init


def _tensor(original):
    def init(self, handle, type):
        key = _sizes(type.shape) if type.is_block() else ()
        known = _shapes.get(key)
        if known:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = known
            return
        original(self, handle, type)
        if vars(self).keys() == _TENSOR:
            _shapes[key] = self.shape, self.numel

    return init


def _broadcast(original):
    def broadcast(self, a, b):
        kinds = a.type, b.type
        blocks = [kind.is_block() for kind in kinds]
        if not any(blocks) or (all(blocks) and kinds[0].shape is kinds[1].shape):
            return a, b
        return original(self, a, b)

    return broadcast


def _unwrap(original):
    return lambda value: value if type(value) in _PLAIN else original(value)


def _numpy_dtype(original):
    found = {}  # by the name of the type of the elements

    def dtype(kind):
        name = str(getattr(kind, "element_ty", kind)) if kind.is_block() else str(kind)
        if name not in found:
            found[name] = original(kind)
        return found[name]

    return dtype


def install():
    """For all launches of this process from now on."""
    if hasattr(interpreter._patch_lang, "__wrapped__"):
        return

    def exchange(original, function):
        if _modules(function) <= _exchanged:
            return None
        _exchanged.update(_modules(function))
        return original(function)

    def launch(original, *arguments, **named):
        _exchanged.clear()  # the one before has put everything back
        original(*arguments, **named)

    wrap(interpreter, "_patch_lang", exchange)
    wrap(interpreter.GridExecutor, "__call__", launch)
    for owner, name, made in [
        (tl.block_type, "__init__", _block_type),
        (tl.tensor, "__init__", _tensor),
        (tl.core, "_unwrap_if_constexpr", _unwrap),
        (interpreter.TritonSemantic, "broadcast_impl_value", _broadcast),
        (interpreter, "_get_np_dtype", _numpy_dtype),
    ]:
        setattr(owner, name, made(getattr(owner, name)))
    builder = interpreter.interpreter_builder
    if getattr(builder.options, "sanitize_overflow", False) and not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
