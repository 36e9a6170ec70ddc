"""Losses on the attention maps of heads, all from the H x H Gram matrix of the maps.

The mean cosine of the heads of a layer is `attention_diversity`. Every function here takes queries q
[B, H, N, d] and keys k [B, H, M, d], never holds the maps, casts q and k as scaled_dot_product_attention does
under autocast, and costs what `attention_gram` costs: the maps once, tile by tile, and O(H^3) per image.
"""

from typing import Literal

import torch
from torch import Tensor

from .. import _checks
from .._types import Backend, Penalty, Reduction
from .._vectors import PENALTIES
from ..ops.maps.attention_gram import attention_cosine, attention_gram
from . import _common


def head_cross_cosine(
    q: Tensor,
    k: Tensor,
    q2: Tensor,
    k2: Tensor,
    *,
    penalty: Penalty = "abs",
    reduction: Reduction = "mean",
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Penalty on the cosines between the heads of two layers: the mean over all pairs (g, h).

    Args:
        q, k, q2, k2, scale, backend: as for `attention_cosine`.
        penalty: "signed", "abs", "square" or "relu". Maps are positive: only "square" differs.
        reduction: "mean" over pairs and images, "sum", or "none" for one value per image, the mean over its
            pairs.

    Returns:
        float32 (float64 for float64 input): a scalar, or [B] with reduction "none". Differentiable once.

    Cost: tiles, those of `attention_cosine`; H x H2 numbers per image.

    Source: Chen et al. 2022 (arXiv 2203.06345), `loss_cosine_across_attn_reg` and its twin `_noabs`.

    Example:
        >>> q, k, q2, k2 = torch.randn(4, 4, 6, 49, 16).requires_grad_().unbind()
        >>> losses.head_cross_cosine(q, k, q2, k2).backward()
    """
    _checks.one_of("penalty", penalty, tuple(PENALTIES))
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    cosine = attention_cosine(q, k, q2, k2, scale=scale, backend=backend)
    pairs = cosine.shape[1] * cosine.shape[2]
    return _checks.reduce_pairs(PENALTIES[penalty](cosine).sum((-2, -1)), pairs, reduction)


def head_contrast(
    q: Tensor,
    k: Tensor,
    q2: Tensor,
    k2: Tensor,
    *,
    reduction: Reduction = "mean",
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """A head must resemble itself in another layer more than the other heads there.

    With c the cosines between the heads of two layers, the mean over heads g of

        -log(exp(c_gg) / (exp(c_gg) + exp(mean_{h != g} c_gh))).

    Args:
        q, k, q2, k2, scale, backend: as for `attention_cosine`; as many heads, H > 1, in both layers.
        reduction: "mean" over heads and images, "sum" over images of the mean over heads, or "none" for one
            value per image.

    Returns:
        float32 (float64 for float64 input): a scalar, or [B] with reduction "none". Differentiable once.

    Cost: tiles, those of `attention_cosine`.

    Source: Chen et al. 2022 (arXiv 2203.06345), `loss_contrastive_attn_reg`.

    Example:
        >>> q, k, q2, k2 = torch.randn(4, 4, 6, 49, 16).requires_grad_().unbind()
        >>> losses.head_contrast(q, k, q2, k2).backward()
    """
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    cosine = attention_cosine(q, k, q2, k2, scale=scale, backend=backend)
    heads = cosine.shape[1]
    if cosine.shape[2] != heads or heads < 2:
        raise ValueError(
            f"q and q2 must have as many heads, H >= 2, got shapes {_checks.shape_of(q)} and "
            f"{_checks.shape_of(q2)}"
        )
    own = cosine.diagonal(dim1=-2, dim2=-1)
    others = (cosine.sum(-1) - own) / (heads - 1)
    return _common.reduced(_common.contrast(own, others).mean(-1), reduction)


def head_mhs(
    q: Tensor,
    k: Tensor,
    *,
    variant: Literal["paper", "released"] = "paper",
    reduction: Reduction = "mean",
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Maximum hyperspherical separation of the heads' maps: `-min_{g != h} (2 - 2 cos_gh)`.

    Args:
        q, k, scale, backend: as for `attention_gram`; H > 1.
        variant: as for `patch_mhs`.
        reduction: "mean" or "sum" over images, or "none".

    Returns:
        float32 (float64 for float64 input): a scalar, or [B] with reduction "none". Differentiable once.

    Cost: tiles, those of `attention_gram`.

    Source: Chen et al. 2022 (arXiv 2203.06345), `loss_mhs_feature_reg` on attention maps.

    Example:
        >>> q, k = torch.randn(2, 4, 6, 49, 16).requires_grad_().unbind()
        >>> losses.head_mhs(q, k).backward()
    """
    _checks.one_of("variant", variant, _common.MHS_VARIANTS)
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    cosine = attention_cosine(q, k, scale=scale, backend=backend)
    if cosine.shape[-1] < 2:
        raise ValueError(f"q must have H >= 2, got shape {_checks.shape_of(q)}")
    return _common.reduced(_common.minimum_separation(cosine, variant), reduction)


def head_mgd(
    q: Tensor,
    k: Tensor,
    *,
    ridge: float = 1e-6,
    reduction: Reduction = "mean",
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Maximum Gram determinant of the heads' maps: `-log det(exp(2 cos - 2) + ridge I)`.

    Args:
        q, k, scale, backend: as for `attention_gram`.
        ridge: keeps the value finite for equal maps; positive.
        reduction: "mean" or "sum" over images, or "none".

    Returns:
        float32 (float64 for float64 input): a scalar, or [B] with reduction "none". Differentiable once.
        Cosines have the rounding of float32. Of heads that are all but equal, cosines within 1e-6 of 1, the
        value was seen off by 1 % and the gradient by half its size and more: use float64 there.

    Cost: tiles, those of `attention_gram`; the determinant of an H x H matrix in float64.

    Source: Chen et al. 2022 (arXiv 2203.06345), `loss_mgd_feature_reg` on attention maps.

    Example:
        >>> q, k = torch.randn(2, 4, 6, 49, 16).requires_grad_().unbind()
        >>> losses.head_mgd(q, k).backward()
    """
    ridge = _checks.positive("ridge", ridge)
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    cosine = attention_cosine(q, k, scale=scale, backend=backend)
    return _common.reduced(_common.gram_determinant(cosine, ridge), reduction)


def head_soft_orthogonality(
    q: Tensor,
    k: Tensor,
    *,
    reduction: Reduction = "mean",
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Soft orthogonality of the heads' maps, as they are: `|G - I|_F^2`, G their Gram matrix.

    Args:
        q, k, scale, backend: as for `attention_gram`.
        reduction: "mean" or "sum" over images, or "none".

    Returns:
        float32 (float64 for float64 input): a scalar, or [B] with reduction "none". Differentiable once.

    Cost: tiles, those of `attention_gram`.

    Source: Chen et al. 2022 (arXiv 2203.06345), `loss_s_orth_attn_reg`.

    Example:
        >>> q, k = torch.randn(2, 4, 6, 49, 16).requires_grad_().unbind()
        >>> losses.head_soft_orthogonality(q, k).backward()
    """
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    gram = attention_gram(q, k, scale=scale, backend=backend)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return _common.reduced((gram - identity).square().sum((-2, -1)), reduction)


def head_condition_orthogonality(
    q: Tensor,
    k: Tensor,
    *,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Condition orthogonality of the heads' maps, as they are: as `patch_condition_orthogonality`, with G the
    Gram matrix of the maps.

    Args:
        q, k, scale, backend: as for `attention_gram`.
        start: start vectors, [B, 2, H], or [2, H] for all images; None draws them from the standard normal
            distribution.
        generator: torch.Generator on the device of q, for the draw; not with start.
        reduction: "mean" or "sum" over images, or "none".

    Returns:
        float32 (float64 for float64 input): a scalar, or [B] with reduction "none". Differentiable once.

    Cost: tiles, those of `attention_gram`.

    Source: Chen et al. 2022 (arXiv 2203.06345), `loss_condition_orth_attn_reg`.

    Example:
        >>> q, k = torch.randn(2, 4, 6, 49, 16).requires_grad_().unbind()
        >>> losses.head_condition_orthogonality(q, k).backward()
    """
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    gram = attention_gram(q, k, scale=scale, backend=backend)
    start = _common.starts(gram, start, generator, torch.randn)
    with _checks.autocast_off(gram):
        gap = _common.spectral_gap(lambda v: (gram @ v.unsqueeze(-1)).squeeze(-1), start, 1e-6)
        return _common.reduced(gap, reduction)
