"""Triton's interpreter without its two largest costs, which find nothing.

- It exchanges all functions of triton.language for its own at each call of a @triton.jit function by another,
  which tl.sum and tl.max are, too: half a millisecond. Once a launch is enough.
- It computes each sum, difference and product of integers of 32 bits again in 64 bits, in ten operations, and
  compares nothing: the assertion behind them is dropped where `debug` is not set.
"""

import dataclasses
import functools
import inspect

import triton.language as tl
from interpreter_checks import wrap
from triton.runtime import interpreter

from vitdiv_kernels._layout import accumulation_dtype
from vitdiv_kernels.ops.maps._triton import workspace

_exchanged = set()  # names of modules, in this launch


@functools.cache
def _modules(function):
    """The modules that the function's file sees."""
    seen = [value for value in function.__globals__.values() if inspect.ismodule(value)]
    return frozenset(module.__name__ for module in (tl, tl.core) if module in seen)


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
    builder = interpreter.interpreter_builder
    if getattr(builder.options, "sanitize_overflow", False) and not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def products_by_torch(monkeypatch):
    """The products around the row kernels of re-attention, which take the interpreter two thirds of its time.
    test_triton_products.py and test_triton_workspace.py have the kernels."""

    def rows_by_rows(maps, a, b, alpha=1.0, padding=0.0):
        keys, dtype = b.shape[2], accumulation_dtype(a)
        maps[..., :keys] = alpha * (a.to(dtype) @ b.to(dtype).mT)
        maps[..., keys:] = padding

    def maps_by_rows(result, maps, b, alpha=1.0, transposed=False, add=False):
        dtype = accumulation_dtype(b)
        maps = maps[..., : result.shape[2]].mT if transposed else maps[..., : b.shape[2]]
        product = alpha * (maps.to(dtype) @ b.to(dtype))
        result.copy_(result + product if add else product)

    monkeypatch.setattr(workspace, "rows_by_rows", rows_by_rows)
    monkeypatch.setattr(workspace, "maps_by_rows", maps_by_rows)
