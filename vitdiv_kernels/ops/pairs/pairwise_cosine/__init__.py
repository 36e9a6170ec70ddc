"""Penalties on the cosines of all pairs of vectors."""

from .api import pairwise_cosine

__all__ = ["pairwise_cosine"]
