"""The operators reattention_{fwd,bwd} and head_dots in Triton; the kernels are in ../_triton.

docs/kernels/reattention.md describes both directions and counts their bytes and instructions.
"""

from .._triton.dots import head_dots
from .._triton.workspace import backward as reattention_bwd
from .._triton.workspace import forward as reattention_fwd

__all__ = ["head_dots", "reattention_bwd", "reattention_fwd"]
