"""Attention whose maps are mixed across heads."""

from .api import reattention

__all__ = ["reattention"]
