"""Validation that the operations share: comparisons in the valid case, sentences only on failure."""

import contextlib
import numbers
from typing import get_args

import torch

from ._autograd import transformed
from ._types import Reduction

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LOW_PRECISION = (torch.bfloat16, torch.float16)
REDUCTIONS = get_args(Reduction)


def sizes(*values):
    """Sizes, or their names, as sentences write a shape."""
    return f"[{', '.join(map(str, values))}]"


def shape_of(tensor):
    return sizes(*tensor.shape)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def floating_tensor(name, value):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        known = ", ".join(map(name_of, FLOATS))
        raise TypeError(f"{name} must have one of the dtypes {known}, got {name_of(value.dtype)}")
    if value.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one: call once for each of its tensors")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}: pass {name}.to_dense()")


def values_at_hand(tensor):
    """Whether the host may read values: of a plain tensor in main memory, not traced, not in torch.func."""
    return (
        not torch.compiler.is_compiling()
        and tensor.device.type == "cpu"
        and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and not transformed()
    )


def same_kind(name, value, like_name, like):
    """`value` is a floating tensor with the dtype and on the device of `like`."""
    floating_tensor(name, value)
    if value.dtype != like.dtype:
        expected = name_of(like.dtype)
        raise TypeError(f"{name} must have the dtype of {like_name}, {expected}, got {name_of(value.dtype)}")
    same_device(name, value, like_name, like)


def same_device(name, value, like_name, like):
    if value.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}, got {value.device}")


def shaped(name, value, shape, named=None, because=""):
    """`value` has the shape; `named` are its sizes as the sentence writes them, where names say more."""
    if value.shape != shape:
        expected = sizes(*(named or shape))
        raise ValueError(f"{name} must have shape {expected}{because}, got {shape_of(value)}")


def both_or_neither(name, value, other_name, other):
    if (value is None) != (other is None):
        given, absent = (name, other_name) if other is None else (other_name, name)
        raise ValueError(f"{name} and {other_name} must be given together, got {given} without {absent}")


def one_of(name, value, known):
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def number(name, value, *, at_least=None, at_most=None):
    """The value as a number of Python, which operators take; NumPy's are converted."""
    if not isinstance(value, (int, float)):
        value = _python_number(name, value)
    if at_least is not None and not value >= at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    if at_most is not None and not value <= at_most:
        raise ValueError(f"{name} must be at most {at_most}, got {value}")
    return value


def _python_number(name, value):
    if isinstance(value, (torch.SymInt, torch.SymFloat)):  # sizes while torch.export runs
        return value
    if isinstance(value, numbers.Real):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a number, got a tensor: pass {name}.item(); it has no gradient")
    if getattr(value, "ndim", None) == 0 and value.dtype.kind in "iuf":  # an array of NumPy
        return value.item()
    raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def positive(name, value):
    value = number(name, value)
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return value


def integral(value):
    """NumPy's integers as those of Python; anything else as it is, for a check that has its own sentence."""
    return int(value) if isinstance(value, numbers.Integral) else value


def count(name, value, at_least=0):
    number = None if isinstance(value, bool) else integral(value)
    if not isinstance(number, int) or number < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}, got {value!r}")
    return number


def vectors(name, x, at_least=1, when=""):
    """`x [..., N, D]` with N >= at_least vectors of at least one feature; `when` ends the sentence on N."""
    floating_tensor(name, x)
    if x.dim() < 2:
        raise ValueError(f"{name} must have shape [..., N, D], got {shape_of(x)}")
    if x.shape[-2] < at_least or x.shape[-1] == 0:
        raise ValueError(
            f"{name} must hold N >= {at_least} vectors of at least one feature{when}, got shape {shape_of(x)}"
        )


def second_vectors(name, y, like_name, x, *, same_number=False, any_width=False):
    """`y [..., M, D]` belongs to `x [..., N, D]`: with M = N, or with a width of its own, if so asked."""
    same_kind(name, y, like_name, x)
    leading, (n, width) = x.shape[:-2], x.shape[-2:]
    if (
        y.dim() != x.dim()
        or y.shape[:-2] != leading
        or (same_number and y.shape[-2] != n)
        or (not any_width and y.shape[-1] != width)
    ):
        expected = sizes(*leading, n if same_number else "M", "D2" if any_width else width)
        raise ValueError(f"{name} must have shape {expected} to match {like_name}, got {shape_of(y)}")
    if y.shape[-2] == 0 or y.shape[-1] == 0:
        raise ValueError(
            f"{name} must hold at least one vector of at least one feature, got shape {shape_of(y)}"
        )


def queries_and_keys(q, k, q_name="q", k_name="k"):
    """`q [B, H, N, d]` and `k [B, H, M, d]` belong together."""
    floating_tensor(q_name, q)
    same_kind(k_name, k, q_name, q)
    if q.dim() != 4:
        raise ValueError(f"{q_name} must have shape [B, H, N, d], got {shape_of(q)}")
    batch, heads, queries, width = q.shape
    if k.dim() != 4 or k.shape[0] != batch or k.shape[1] != heads or k.shape[3] != width:
        expected = sizes(batch, heads, "M", width)
        raise ValueError(f"{k_name} must have shape {expected} to match {q_name}, got {shape_of(k)}")
    if heads == 0 or queries == 0 or width == 0 or k.shape[2] == 0:
        raise ValueError(
            f"{q_name} and {k_name} must have at least one head, query, key and feature, "
            f"got {q_name} {shape_of(q)} and {k_name} {shape_of(k)}"
        )


def reduce_pairs(sums, pairs, reduction):
    """`sums [*leading]` of penalties over `pairs` pairs each, reduced as the public `reduction` says."""
    if reduction == "sum":
        return sums.sum()
    if reduction == "none":
        return sums / pairs
    return sums.mean() / pairs


def autocast_enabled(tensor):
    if not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta":  # torch raises for meta
        return False
    return torch.is_autocast_enabled(tensor.device.type)


def autocast_to(*tensors):
    """The tensors in autocast's dtype, as scaled_dot_product_attention takes them: float64 stays."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)

    def cast(tensor):
        castable = isinstance(tensor, torch.Tensor) and tensor.dtype in FLOATS[:3]
        return tensor.to(dtype) if castable else tensor

    return [cast(tensor) for tensor in tensors]


def autocast_off(tensor):
    """The operations choose their arithmetic themselves: autocast must not change the products inside."""
    if autocast_enabled(tensor):
        return torch.autocast(tensor.device.type, enabled=False)
    return contextlib.nullcontext()
