"""The arithmetic of a GPU in Triton's interpreter, which has numpy's and rounds where a GPU truncates.

- Products on tensor cores, as those of an A100 make them; of the supported GPUs they lose most. The terms of
  a block, 8 products of 16-bit factors or 4 of TF32 and the accumulator, are shifted to the largest exponent
  among them; what lies more than 24 places below its leading bit is cut off, and their sum is cut to float32.
  (H100 and B200 have blocks of 16 and 8, and 25 places.) Measured by Fasi, Higham, Mikaitis and Pranesh,
  "Numerical behavior of NVIDIA tensor cores", PeerJ Computer Science 7:e330, 2021, and to the last bit by
  Khattak and Mikaitis, "Accurate models of NVIDIA tensor cores", arXiv:2512.07004.
- float32 operands by the input precision of each tl.dot: "tf32" passes them on as they are, and the tensor
  cores do not read the last 13 bits; "tf32x3" rounds them (cvt.rna.tf32.f32) in three products, two of them
  with what the rounding lost, and adds the accumulator in float32; "ieee" takes no tensor cores.
- bfloat16, which the interpreter holds as integers and cuts where it should round: to nearest, ties to even.
- float32 functions are off by up to what the PTX that Triton makes of them may be (PTX ISA; for logarithms
  the CUDA C++ Programming Guide), by a hash of the result; tl.exp2 has no subnormal results.

float64 is numpy's. Not modelled: the order of sums, fused multiply-adds.
"""

import contextlib

import numpy as np
import torch
import triton.language as tl
from interpreter_checks import wrap
from triton.runtime import interpreter

from vitdiv_kernels.ops import _launch as _triton

BLOCK = {"16 bits": 8, "TF32": 4}  # products that are added to the accumulator at a time
PLACES = 24  # below the leading bit: those of float32 and one more
# Units in the last place. ex2.approx has a relative error of 2^-22, which is 2 to 4 of them.
ULPS = {"exp": 2, "exp2": 2, "log": 1, "log2": 1, "sqrt": 1, "rsqrt": 2, "fdiv": 2}
_FUNCTIONS = {
    "exp": np.exp2,  # of an argument that was multiplied before
    "exp2": np.exp2,
    "log": np.log,
    "log2": np.log2,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
}
_LOG2_E = np.float32(np.log2(np.e))
_exact = False


@contextlib.contextmanager
def exact():
    """Within the block numpy's arithmetic; bfloat16 is right all the same."""
    global _exact
    outer, _exact = _exact, True
    try:
        yield
    finally:
        _exact = outer


def widened(bits):
    """bfloat16, as integers, to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(x):
    """float32 to bfloat16, as integers: to nearest, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    nearest = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(x), 0x7FFF, nearest).astype(np.uint16)


def truncated(x):
    """What a tensor core reads of a float32 operand: TF32."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def rounded(x):
    """cvt.rna.tf32.f32: to nearest, ties away from zero."""
    bits = np.ascontiguousarray(x).view(np.uint32) + np.uint32(0x1000)
    return np.where(np.isfinite(x), truncated(bits.view(np.float32)), x)


def multiplied(a, b, c, factors):
    """c + a b on a tensor core, c in float32; `factors` of "16 bits" or "TF32", [.., M, K] and [.., K, N]."""
    lost = np.matmul(a, b, dtype=np.float32) + c
    lost = None if np.isfinite(lost).all() else lost
    if lost is not None:
        a, b, c = (np.where(np.isfinite(x), x, 0) for x in (a, b, c))
    a = np.moveaxis(a, -1, 0).astype(np.float64)[..., :, None]
    b = np.moveaxis(b, -2, 0).astype(np.float64)[..., None, :]
    a_exponents, b_exponents = _exponents(a), _exponents(b)
    total = c.astype(np.float64)
    terms, exponents = (np.empty((BLOCK[factors], *total.shape), kind) for kind in (np.float64, np.int16))
    for k in range(0, len(a), BLOCK[factors]):
        block, n = slice(k, k + BLOCK[factors]), len(a) - k
        # a product of significands is in [1, 4), and taken as it is
        np.add(a_exponents[block], b_exponents[block], out=exponents[:n])
        top = np.maximum(exponents[:n].max(0), _exponents(total))
        unit = np.ldexp(1.0, np.maximum(top, -300).astype(np.int32) - PLACES)
        per_unit = 1 / unit
        np.multiply(a[block], b[block], out=terms[:n])
        np.multiply(terms[:n], per_unit, out=terms[:n])
        np.trunc(terms[:n], out=terms[:n])
        total = (terms[:n].sum(0) + np.trunc(total * per_unit)) * unit
        total = (total.view(np.int64) & ~0x1FFFFFFF).view(np.float64)
    total = total.astype(np.float32)
    return total if lost is None else np.where(np.isfinite(lost), total, lost)


def _exponents(x):
    """Of float64 numbers that are in float32's range; of 0 less than any product has."""
    biased = (x.view(np.int64) >> 52 & 0x7FF).astype(np.int16)
    return np.where(biased == 0, np.int16(-1000), biased - np.int16(1023))


def _dot(original, a, b, c, input_precision, *others):
    kind, precision = a.dtype.scalar, str(input_precision).rpartition(".")[2].lower()
    if kind == tl.bfloat16:
        a, b = (interpreter.TensorHandle(widened(x.data), tl.float32) for x in (a, b))
    if _exact or kind == tl.float64 or (kind == tl.float32 and precision == "ieee"):
        return original(a, b, c, input_precision, *others)
    x, y, start = a.data, b.data, c.data
    with np.errstate(all="ignore"):
        if kind in (tl.float16, tl.bfloat16):
            result = multiplied(x, y, start, "16 bits")
        elif (kind, precision) == (tl.float32, "tf32"):
            result = multiplied(truncated(x), truncated(y), start, "TF32")
        elif (kind, precision) == (tl.float32, "tf32x3"):
            big_x, big_y = rounded(x), rounded(y)
            small_x, small_y = truncated(x - big_x), truncated(y - big_y)
            # 2^-11 of the whole: what these sums lose is lost in it
            small = np.matmul(small_x, big_y) + np.matmul(big_x, small_y)
            # Inf - Inf, where the product itself is Inf
            small = np.where(np.isnan(small), np.float32(0), small)
            result = multiplied(big_x, big_y, small, "TF32") + start
        else:
            raise ValueError(f"no model of tl.dot of {kind} with the input precision {precision}")
    return interpreter.TensorHandle(result, c.dtype.scalar)


def _off(y, ulps):
    """float64 y as a float32 that is up to `ulps` units in the last place away."""
    nearest = y.astype(np.float32)
    # from -1 to 1
    part = (nearest.view(np.uint32) * np.uint32(0x9E3779B1)).view(np.int32) * 2.0**-31
    # half a unit more is that of the rounding
    moved = y + part * (ulps - 0.5) * np.spacing(np.abs(nearest))
    return np.where(np.isfinite(nearest) & (nearest != 0), moved.astype(np.float32), nearest)


def _approximate(name):
    def function(original, x):
        if _exact or x.data.dtype != np.float32:
            return original(x)
        with np.errstate(all="ignore"):
            argument = x.data * _LOG2_E if name == "exp" else x.data
            y = _off(_FUNCTIONS[name](argument.astype(np.float64)), ULPS[name])
            if name in ("exp", "exp2"):
                y = np.where(argument == 0, np.float32(1), y)
            if name == "exp2":
                y = np.where(y < np.finfo(np.float32).tiny, np.float32(0), y)
        return interpreter.TensorHandle(y, x.dtype.scalar)

    return function


def _divide(original, x, y):
    if _exact or x.data.dtype != np.float32:
        return original(x, y)
    with np.errstate(all="ignore"):
        quotient = _off(x.data.astype(np.float64) / y.data, ULPS["fdiv"])
    return interpreter.TensorHandle(quotient, x.dtype.scalar)


def _cast(original, source, target):
    kinds = source.dtype.scalar, target.scalar
    if kinds == (tl.bfloat16, tl.float32):
        return interpreter.TensorHandle(widened(source.data), tl.float32)
    if kinds == (tl.float32, tl.bfloat16):
        return interpreter.TensorHandle(narrowed(source.data), tl.bfloat16)
    _refuse_bfloat16(*kinds)
    return original(source, target)


def _compute(original, *arguments):
    _refuse_bfloat16(*(x.dtype.scalar for x in arguments if isinstance(x, interpreter.TensorHandle)))
    return original(*arguments)


def _reduce(original, reduction, inputs):
    _refuse_bfloat16(*(x.dtype.scalar for x in inputs))
    return original(reduction, inputs)


def _refuse_bfloat16(*kinds):
    if tl.bfloat16 in kinds:
        raise TypeError("the interpreter would take bfloat16 for integers: convert to float32 first")


def install():
    """For all launches of this process from now on; products of bfloat16 take it as it is."""
    if _triton.OPERANDS[torch.bfloat16] == tl.bfloat16:
        return
    _triton.OPERANDS[torch.bfloat16] = tl.bfloat16
    builder = interpreter.interpreter_builder
    for name in _FUNCTIONS:
        wrap(builder, f"create_{name}", _approximate(name))
    wrap(builder, "create_fdiv", _divide)
    wrap(builder, "create_dot", _dot)
    wrap(builder, "cast_impl", _cast)
    for name in ("binary_op", "unary_op"):
        wrap(builder, name, _compute)
    wrap(interpreter.ReduceScanOpInterface, "check_tensor", _reduce)
