"""How the Triton kernels of all operations are launched, or, where there is no GPU, recorded to be compiled.

Imports Triton: only `triton_kernels` modules import this one.
"""

import contextlib
import ctypes
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret

DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
# Of tl.dot's operands. The interpreter holds bfloat16 as integers, and gets its arithmetic wrong.
OPERANDS = DTYPES | ({torch.bfloat16: tl.float32} if INTERPRETED else {})

# Of every launch. Up to Triton 3.9 multiply and add are fused unless told not to, from 3.10 on only if told
# to; 3.9 warns of that.
OPTIONS = {"enable_fp_fusion": True}


class Launch(NamedTuple):
    """One launch as `recording` sees it; `arguments` are the kernel's, by name, constexprs included."""

    kernel: triton.runtime.JITFunction
    grid: tuple
    arguments: dict
    num_warps: int
    num_stages: int
    maxnreg: int | None


_recorded = None  # (launches, compute capability), inside `recording`


@contextlib.contextmanager
def recording(capability):
    """Launches inside the block are not run but returned in a list, as if on a GPU of this (major, minor).

    The tensors may be on the meta device. The ahead-of-time test compiles what it finds here, so that what is
    compiled is what would be launched.
    """
    global _recorded
    outer, _recorded = _recorded, ([], capability)
    try:
        yield _recorded[0]
    finally:
        _recorded = outer


def capability(tensor):
    """(major, minor) of the GPU that launches for `tensor` run on; (9, 0) for the interpreter."""
    if _recorded is not None:
        return _recorded[1]
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (9, 0)


_checked: dict = {}  # kernels by id, of which one launch had the right number of arguments


def launch(kernel, grid, *arguments, num_warps, num_stages, maxnreg=None, **constexprs):
    """kernel[grid](*arguments, **constexprs), on the device of the first argument.

    By position, as arguments by name take Triton a quarter longer to sort; their number is looked at once.
    """
    if id(kernel) not in _checked:
        _check(kernel, arguments, constexprs)
        _checked[id(kernel)] = kernel
    if _recorded is not None:
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | constexprs
        _recorded[0].append(Launch(kernel, grid, named, num_warps, num_stages, maxnreg))
        return
    if 0 in grid:
        return
    options = OPTIONS if maxnreg is None else OPTIONS | {"maxnreg": maxnreg}
    device = torch.cuda.device_of(arguments[0]) if arguments[0].is_cuda else contextlib.nullcontext()
    with device:
        kernel[grid](*arguments, **constexprs, num_warps=num_warps, num_stages=num_stages, **options)


def _check(kernel, arguments, constexprs):
    count = len(arguments)
    by_position, by_name = kernel.arg_names[:count], kernel.arg_names[count:]
    if len(by_position) < count or set(by_name) != set(constexprs):
        takes = [name for name in kernel.arg_names if name not in constexprs]
        unknown = sorted(set(constexprs) - set(kernel.arg_names))
        raise TypeError(
            f"{kernel.__name__} must be launched with {len(takes)} arguments, {', '.join(takes)}, got {count}"
            + (f" and unknown {', '.join(unknown)}" if unknown else "")
        )


def input_precision(dtype):
    """Of tl.dot: float32 in three TF32 products, or in one where torch is allowed TF32 in its own."""
    if dtype != torch.float32:
        return "ieee"
    # every way to allow it sets this attribute; the older getter raises once this one was set directly
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if precision is None:
        return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if precision == "tf32" else "tf32x3"


def accumulator(dtype):
    """The tl dtype that sums and softmax statistics are kept in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def split(number):
    """(high, low) for `double`."""
    high = ctypes.c_float(number).value
    return high, number - high if math.isfinite(high) else 0.0


@triton.jit
def double(high, low, ACC: tl.constexpr):
    """A number passed as two float32: Triton rounds float arguments to float32, also for float64 kernels."""
    return tl.full((), high, ACC) + tl.full((), low, ACC)


@triton.jit
def to_tf32(x):
    """float32, rounded: of the operands of a product in TF32 the tensor cores cut off the last 13 bits."""
    bits = x.to(tl.int32, bitcast=True) + 0x1000
    # a NaN could become a number
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
