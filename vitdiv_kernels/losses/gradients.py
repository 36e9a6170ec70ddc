"""A loss on gradients."""

import torch
from torch import Tensor

from .. import _checks, _vectors
from .._types import Reduction
from .._vectors import matrices_near_one
from . import _common


def gradient_diversity(
    gradients: Tensor, *, replace_nan: bool = False, reduction: Reduction = "mean", eps: float = 1e-12
) -> Tensor:
    """Gradient diversity, to be made large: `-sum_i |g_i|^2 / |sum_i g_i|^2` over the patches of each image.

    Args:
        gradients: of the task's loss with respect to the patches, [..., N, D]; to train on it, from
            `torch.autograd.grad(loss, patches, create_graph=True)`.
        replace_nan: entries that are nan become 1e-8, as in the released code, which nothing hides otherwise.
        reduction: "mean" or "sum" over leading axes, or "none".
        eps: least value of the denominator, as a share of `sum_i |g_i|^2`: gradients that cancel give a large
            finite value, and small ones the same as large ones.

    Returns:
        float32 (float64 for float64 input): a scalar, or [...] with reduction "none". 0 where all are zero.

    Cost: a closed form, O(N D).

    Source: Chen et al. 2022 (arXiv 2203.06345), `loss_grad_diversity_reg`.

    Example:
        >>> gradients = torch.randn(4, 49, 64, requires_grad=True)
        >>> losses.gradient_diversity(gradients).backward()
    """
    _checks.vectors("gradients", gradients)
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    eps = _checks.positive("eps", eps)
    (g,) = _vectors.full_precision(gradients)
    if replace_nan:
        g = torch.where(g.isnan(), 1e-8, g)
    size = torch.linalg.vector_norm(g.detach().flatten(-2), dim=-1)
    if not _vectors.within_range(g, size, 0):
        g = matrices_near_one(g)
    each, together = g.square().sum((-2, -1)), g.sum(-2).square().sum(-1)
    least = (eps * each).clamp_min(torch.finfo(g.dtype).tiny)
    return _common.reduced(-each / torch.maximum(together, least), reduction)
