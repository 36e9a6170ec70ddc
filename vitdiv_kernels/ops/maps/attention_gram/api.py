"""The public functions `attention_gram`, `attention_cosine` and `attention_diversity`.

The kernels give the centred Gram matrix G~; everything after it is H x H mathematics, done here in torch.
"""

import torch
from torch import Tensor

from .... import _checks, _dispatch
from ...._types import Backend, Penalty, Reduction
from ...._vectors import PENALTIES
from . import function, reference


def attention_gram(
    q: Tensor, k: Tensor, *, scale: float | None = None, centered: bool = False, backend: Backend = "auto"
) -> Tensor:
    """Gram matrix of the attention maps of all heads, per image, without holding the maps.

    `G[b, g, h] = sum_ij A_g[i, j] A_h[i, j]` with `A_h = softmax(scale q_h k_h^T)`. `centered=True` gives
    `G - N/M`, the Gram matrix of `A - 1/M`, accumulated as such: it keeps its digits when attention is nearly
    uniform.

    Args:
        q: queries, [B, H, N, d]; k: keys, [B, H, M, d]. float16, bfloat16, float32 or float64; any strides.
            triton reads them all in place, native those whose last one is 1 (views into a packed qkv
            projection).
        scale: the factor of the logits; None is d^-1/2.
        centered: leave out the part N/M of the row means.
        backend: "auto", "reference", "native" or "triton". An explicit choice never falls back.

    Returns:
        [B, H, H], float32 (float64 for float64 input). Differentiable once in q and k.

    Under autocast q and k are cast to autocast's dtype, as scaled_dot_product_attention does.

    Raises:
        TypeError: q or k is not a floating tensor, or their dtypes differ.
        ValueError: shapes or devices do not match, unknown backend.
        RuntimeError: an explicit backend that is not here.

    Example:
        >>> q, k = torch.randn(2, 8, 6, 197, 64).unbind()
        >>> attention_gram(q, k).shape
        torch.Size([8, 6, 6])
    """
    if _checks.autocast_enabled(q):
        q, k = _checks.autocast_to(q, k)
    _checks.queries_and_keys(q, k)
    gram = _centered_gram(q, k, None, None, scale, backend)
    return gram if centered else gram + q.shape[2] / k.shape[2]


def attention_cosine(
    q: Tensor,
    k: Tensor,
    q2: Tensor | None = None,
    k2: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Cosine similarity of attention maps: between the heads of a layer, or between the heads of two layers.

    `cos[b, g, h] = G[g, h] / sqrt(G[g, g] G[h, h])`, each map taken as one vector of N M numbers.

    Args:
        q, k: queries [B, H, N, d] and keys [B, H, M, d] of a layer, as for `attention_gram`.
        q2, k2: those of a second layer, [B, H2, N, d2] and [B, H2, M, d2], same dtype and device; both or
            neither.
        scale: the factor of the logits, of both layers; None is d^-1/2 of each.
        backend: "auto", "reference", "native" or "triton". An explicit choice never falls back.

    Returns:
        [B, H, H], or [B, H, H2] with a second layer; float32 (float64 for float64 input). Differentiable
        once.

    Under autocast all four are cast to autocast's dtype, as scaled_dot_product_attention does.

    Raises: as `attention_gram`; ValueError also when only one of q2 and k2 is given.

    Sources: Chen et al. 2022 (arXiv 2203.06345), attention level; Zhou et al. 2021 (arXiv 2103.11886), the
    similarity between layers.

    Example:
        >>> q, k, q2, k2 = torch.randn(4, 8, 6, 197, 64).unbind()
        >>> attention_cosine(q, k, q2, k2).shape  # each head of one layer with each of another
        torch.Size([8, 6, 6])
    """
    if _checks.autocast_enabled(q):
        q, k, q2, k2 = _checks.autocast_to(q, k, q2, k2)
    _checks.queries_and_keys(q, k)
    _checks.both_or_neither("q2", q2, "k2", k2)
    if q2 is not None and k2 is not None:
        _checks.queries_and_keys(q2, k2, "q2", "k2")
        _checks.same_kind("q2", q2, "q", q)
        for name, x, because, like in (("q2", q2, " to match q", q), ("k2", k2, " to match k", k)):
            shape = like.shape[0], x.shape[1], like.shape[2], x.shape[3]
            _checks.shaped(name, x, shape, (shape[0], "H2", shape[2], "d2"), because)
    cosine = _cosine(_centered_gram(q, k, q2, k2, scale, backend), q, k)
    return cosine if q2 is None else cosine[:, : q.shape[1], q.shape[1] :]


def attention_diversity(
    q: Tensor,
    k: Tensor,
    *,
    penalty: Penalty = "signed",
    include_self: bool = True,
    reduction: Reduction = "mean",
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Penalty on the cosine similarity of the attention maps of the heads of a layer: the head diversity
    loss.

    Args:
        q, k, scale, backend: as for `attention_gram`.
        penalty: of the cosine c: "signed" c, "abs" |c|, "square" c^2 or "relu" max(c, 0). Maps are positive,
            so only "square" differs from the others.
        include_self: count the pairs of each head with itself, as the published loss does; they add a
            constant.
        reduction: "mean" over pairs and images, "sum", or "none" for one value per image, the mean over its
            pairs.

    Returns:
        float32 (float64 for float64 input): a scalar, or [B] with reduction "none". Differentiable once in q
        and k.

    Under autocast q and k are cast to autocast's dtype, as scaled_dot_product_attention does.

    Raises: as `attention_gram`; ValueError also for H < 2 without include_self and unknown penalty or
    reduction.

    Source: Chen et al. 2022 (arXiv 2203.06345), `Loss_cosine_attn`: the defaults.

    Example:
        >>> q, k = torch.randn(2, 8, 6, 197, 64).requires_grad_().unbind()
        >>> attention_diversity(q, k).backward()
    """
    if _checks.autocast_enabled(q):
        q, k = _checks.autocast_to(q, k)
    _checks.queries_and_keys(q, k)
    heads = q.shape[1]
    if heads < 2 and not include_self:
        raise ValueError(f"q must have H >= 2 when include_self is False, got shape {_checks.shape_of(q)}")
    _checks.one_of("penalty", penalty, tuple(PENALTIES))
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    penalties = PENALTIES[penalty](_cosine(_centered_gram(q, k, None, None, scale, backend), q, k))
    pairs = heads * heads
    if not include_self:
        penalties = penalties.masked_fill(torch.eye(heads, dtype=torch.bool, device=q.device), 0)
        pairs -= heads
    return _checks.reduce_pairs(penalties.sum((-2, -1)), pairs, reduction)


def _centered_gram(q, k, q2, k2, scale, backend):
    if scale is not None:
        scale = _checks.number("scale", scale)
    scale2 = None
    if q2 is not None:
        scale2 = q2.shape[3] ** -0.5 if scale is None else scale
    scale = q.shape[3] ** -0.5 if scale is None else scale
    heads = q.shape[1] + (0 if q2 is None else q2.shape[1])
    condition = _dispatch.MANY_HEADS if heads > _dispatch.TRITON_HEADS else None
    backend = _dispatch.resolve("attention_gram", q.device, backend, condition)
    with _checks.autocast_off(q):
        if backend == "reference":
            return reference.head_gram(q, k, q2, k2, scale=scale, scale2=scale2)
        return function.head_gram(q, k, q2, k2, scale=scale, scale2=scale2, backend=backend)


def _cosine(centered_gram, q, k):
    gram = centered_gram + q.shape[2] / k.shape[2]
    # By Cauchy-Schwarz a map's square is at least N/M: no eps is needed.
    inverse_norm = gram.diagonal(dim1=-2, dim2=-1).rsqrt()
    return gram * inverse_norm.unsqueeze(-1) * inverse_norm.unsqueeze(-2)
