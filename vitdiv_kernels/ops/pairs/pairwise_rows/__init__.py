"""Reductions along the rows of the cosines of all pairs of vectors."""

from .api import pairwise_logsumexp, pairwise_nearest

__all__ = ["pairwise_logsumexp", "pairwise_nearest"]
