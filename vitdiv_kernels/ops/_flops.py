"""Floating-point operations of the operators, as torch.utils.flop_counter counts them: two a multiply-add of
a product, whatever symmetry leaves out; exponentials and what is O(N D) beside O(N^2 D) not at all.

Arguments are shapes. As for torch's scaled_dot_product_attention a backward counts the products made again.
"""

from math import prod


def pairs(x, y=None):
    """Of the cosines of all pairs of x [..., N, D] and y [..., M, D], or x itself."""
    return 2 * prod(x) * (x if y is None else y)[-2]


def closed(x, y=None):
    """Of one sum over the vectors of both sets."""
    return 2 * (prod(x) + (0 if y is None else prod(y)))


def maps(q, k):
    """Of the logits of q [B, H, N, d] and k [B, H, M, d], and of every other product with the maps."""
    return 2 * prod(q) * k[2]


def mixed(q, k, heads=None):
    """Of the maps of H heads mixed into those of as many, or of `heads`."""
    batch, own, queries, _ = q
    return 2 * batch * own * (own if heads is None else heads) * queries * k[2]
