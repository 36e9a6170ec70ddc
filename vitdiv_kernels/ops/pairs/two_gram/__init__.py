"""Penalties on the entries of two Gram matrices of the same patches."""

from .api import two_gram

__all__ = ["two_gram"]
