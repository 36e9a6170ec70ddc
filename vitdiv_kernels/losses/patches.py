"""Losses on patch embeddings: patches of one layer pushed apart, or told apart through the layers.

The mean cosine of patches, within a layer and across layers, is `pairwise_cosine`.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _checks, _vectors
from .._autograd import by_formula, once_differentiable
from .._types import Backend, Reduction
from ..ops.pairs.pairwise_cosine import pairwise_cosine
from ..ops.pairs.two_gram import two_gram
from . import _common
from ._spectral import GramGap, evaluate


def patch_contrast(
    first: Tensor,
    last: Tensor,
    *,
    normalise: bool = True,
    detach_first: bool = False,
    reduction: Reduction = "mean",
    eps: float = 1e-8,
) -> Tensor:
    """A patch of the last layer must resemble itself in the first layer more than the others of its image.

    With S the cosines between the two layers, the mean over patches i of

        -log(exp(S_ii) / (exp(S_ii) + exp(mean_{j != i} S_ij))).

    Args:
        first, last: patches of two layers, [..., N, D], N > 1.
        normalise: False takes inner products instead of cosines.
        detach_first: no gradient to the first layer, as Gong et al. have it. The released code of Chen et al.
            has a gradient to both.
        reduction: "mean" over patches and leading axes, "sum" over leading axes of the mean over patches, or
            "none" for one value per leading index.
        eps: patches shorter than this are divided by eps instead of by their norm.

    Returns:
        float32 (float64 for float64 input): a scalar, or [...] with reduction "none". Differentiable once.

    Cost: a closed form, O(N D): the exponent of the mean needs only row sums of S, products with one vector.

    Sources: Gong et al. 2021 (arXiv 2104.12753), patch-wise contrastive loss; Chen et al. 2022 (arXiv
    2203.06345), `Loss_contrastive`.

    Example:
        >>> first, last = torch.randn(2, 4, 49, 64).requires_grad_().unbind()
        >>> losses.patch_contrast(first, last).backward()
    """
    _checks.vectors("first", first, at_least=2)
    _checks.second_vectors("last", last, "first", first, same_number=True)
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    eps = _checks.number("eps", eps, at_least=0)
    if detach_first:
        first = first.detach()
    first, last = _vectors.full_precision(first, last)
    with _checks.autocast_off(first):
        if by_formula(first):
            first, last = (_vectors.unit(x, eps) if normalise else x for x in (first, last))
            own = torch.linalg.vecdot(first, last)
            others = (torch.linalg.vecdot(first, last.sum(-2, keepdim=True)) - own) / (first.shape[-2] - 1)
        else:
            first, *first_scales = _vectors.scaled(first, eps if normalise else None)
            last, *last_scales = _vectors.scaled(last, eps if normalise else None)
            own, others = _OwnAndOthers.apply(first, last, *first_scales, *last_scales)
        return _common.reduced(_common.contrast(own, others).mean(-1), reduction)


class _OwnAndOthers(torch.autograd.Function):
    """x, y [..., N, D], with `_vectors.scaled` of both, to S_ii and mean_{j != i} S_ij, [..., N].

    Each gradient is a combination of two vectors of x and y and one that all patches share: written out, it
    makes a fourth of the passes over x and y that autograd would, and no copy of unit vectors.
    """

    @staticmethod
    def forward(ctx, x, y, scale_x, radial_x, scale_y, radial_y):
        total = scale_y.mT @ y  # sum of the unit vectors y, [..., 1, D]
        own = torch.linalg.vecdot(x, y).unsqueeze(-1) * scale_x * scale_y
        rows = (x @ total.mT) * scale_x
        ctx.save_for_backward(x, y, scale_x, radial_x, scale_y, radial_y, total, own, rows)
        return own.squeeze(-1), ((rows - own) / (x.shape[-2] - 1)).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, down, dothers):
        x, y, scale_x, radial_x, scale_y, radial_y, total, own, rows = ctx.saved_tensors
        drows = dothers.unsqueeze(-1) / (x.shape[-2] - 1)
        down = down.unsqueeze(-1) - drows
        both = down * scale_x * scale_y
        dx = dy = None
        with _checks.autocast_off(x):
            if ctx.needs_input_grad[0]:
                along = (down * own + drows * rows) * scale_x * radial_x
                dx = (x * -along).addcmul_(y, both).addcmul_(total, drows * scale_x)
            if ctx.needs_input_grad[1]:
                dtotal = (drows * scale_x).mT @ x
                along = (down * own + (y @ dtotal.mT) * scale_y) * scale_y * radial_y
                dy = (y * -along).addcmul_(x, both).addcmul_(dtotal, scale_y)
        return dx, dy, *(None,) * 4


def neighbourhood_contrast(
    patches: Tensor,
    context: Tensor,
    *,
    grid: Sequence[int] | None = None,
    window: int = 7,
    border: Literal["zeros", "inside"] = "zeros",
    reduction: Reduction = "mean",
    eps: float = 1e-8,
) -> Tensor:
    """A patch must resemble its own embedding more than its neighbours and the other patches of its image do.

    With c_i the embedding of patch i (detached), the mean over patches of

        -log(softmax([c_i . p_i, c_i . mean_{j != i} p_j, c_i . mean_{j in window(i), j != i} p_j])_0 + eps).

    Args:
        patches: of the last layer, [..., N, D], N > 1; context: the patch embeddings, [..., N, D].
        grid: rows and columns of patches, N of them; None is a square.
        window: width of the neighbourhood, an odd number of patches.
        border: "zeros" divides by window^2 - 1 also where the window leaves the image, as the released code
            does; "inside" by the number of neighbours.
        reduction: "mean" over patches and leading axes, "sum" over leading axes of the mean over patches, or
            "none" for one value per leading index.

    Returns:
        float32 (float64 for float64 input): a scalar, or [...] with reduction "none".

    Cost: a closed form, O(N D): means and a box filter.

    Source: the released code of Gong et al. 2021 (arXiv 2104.12753), `similarity` with its defaults, where
    the paper has `patch_contrast`.

    Example:
        >>> x, y = torch.randn(2, 4, 49, 64).requires_grad_().unbind()
        >>> losses.neighbourhood_contrast(x, y, grid=(7, 7)).backward()
    """
    _checks.vectors("patches", patches, at_least=2)
    _checks.second_vectors("context", context, "patches", patches, same_number=True)
    _checks.one_of("border", border, ("zeros", "inside"))
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    eps = _checks.number("eps", eps, at_least=0)
    window = _checks.integral(window)
    if not isinstance(window, int) or window < 3 or window % 2 == 0:
        raise ValueError(f"window must be an odd number of patches, at least 3, got {window!r}")
    n = patches.shape[-2]
    rows, columns = _common.grid_of(grid, n)
    p, c = _vectors.full_precision(patches, context.detach())
    with _checks.autocast_off(p):
        boxes = p.mT.reshape(-1, p.shape[-1], rows, columns)
        boxes = F.avg_pool2d(boxes, window, 1, window // 2, divisor_override=1)
        neighbours: int | Tensor = window**2 - 1
        if border == "inside":
            ones = p.new_ones(1, 1, rows, columns)
            neighbours = F.avg_pool2d(ones, window, 1, window // 2, divisor_override=1).flatten() - 1
        own = torch.linalg.vecdot(c, p)
        everywhere = (c @ p.sum(-2, keepdim=True).mT).squeeze(-1)
        nearby = torch.linalg.vecdot(c, boxes.flatten(2).mT.reshape(p.shape))
        logits = torch.stack([own, (everywhere - own) / (n - 1), (nearby - own) / neighbours], -1)
        losses = -(logits.softmax(-1)[..., 0] + eps).log()
        return _common.reduced(losses.mean(-1), reduction)


def patch_mhs(
    x: Tensor,
    *,
    variant: Literal["paper", "released"] = "paper",
    reduction: Reduction = "mean",
    eps: float = 1e-8,
    backend: Backend = "auto",
) -> Tensor:
    """Maximum hyperspherical separation: `-min_{i != j} (2 - 2 cos_ij)`, of the patches of each image.

    Args:
        x: vectors, [..., N, D], N > 1.
        variant: "paper", or "released": pairs at a distance of exactly 0 are skipped (all of them: the loss
            is 0), and pairs at the same smallest distance are summed.
        reduction: "mean" or "sum" over leading axes, or "none" for one value per leading index.
        eps: vectors shorter than this are divided by eps instead of by their norm. (The released code adds
            1e-8 under two square roots.)
        backend: of `pairwise_nearest`, for variant "paper".

    Returns:
        float32 (float64 for float64 input): a scalar, or [...] with reduction "none". The gradient goes to
        the nearest pair, the first one of equals in variant "paper".

    Cost: tiles, N^2 D / 2 multiply-adds for the index of each nearest vector, then O(N D). The variant
    "released" holds N x N matrices.

    Source: Chen et al. 2022 (arXiv 2203.06345), `loss_mhs_feature_reg`.

    Example:
        >>> x = torch.randn(4, 49, 64, requires_grad=True)
        >>> losses.patch_mhs(x).backward()
    """
    _checks.vectors("x", x, at_least=2)
    _checks.one_of("variant", variant, _common.MHS_VARIANTS)
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    eps = _checks.number("eps", eps, at_least=0)
    with _checks.autocast_off(x):
        return _common.reduced(_common.separation(x, variant, eps, backend), reduction)


def patch_mgd(x: Tensor, *, ridge: float = 1e-6, reduction: Reduction = "mean", eps: float = 1e-8) -> Tensor:
    """Maximum Gram determinant: `-log det(exp(2 cos - 2) + ridge I)`, of the patches of each image.

    Args:
        x: vectors, [..., N, D].
        ridge: keeps the value finite for equal vectors; positive.
        reduction, eps: as for `patch_mhs`.

    Returns:
        float32 (float64 for float64 input): a scalar, or [...] with reduction "none". Differentiable once.

    Cost: O(N^2 D + N^3), in float64: else patches that are nearly equal give nan. It holds N x N matrices:
    the exponential of a Gram matrix has full rank, so its determinant needs all of it.

    Source: Chen et al. 2022 (arXiv 2203.06345), `loss_mgd_feature_reg`.

    Example:
        >>> x = torch.randn(4, 49, 64, requires_grad=True)
        >>> losses.patch_mgd(x).backward()
    """
    _checks.vectors("x", x)
    ridge = _checks.positive("ridge", ridge)
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    eps = _checks.number("eps", eps, at_least=0)
    with _checks.autocast_off(x):
        return _common.reduced(_common.determinant(x, ridge, eps), reduction)


def patch_soft_orthogonality(
    x: Tensor, *, reduction: Reduction = "mean", eps: float = 1e-8, backend: Backend = "auto"
) -> Tensor:
    """Soft orthogonality: `|X_hat X_hat^T - I|_F^2`, of the unit patches of each image.

    Args:
        x: vectors, [..., N, D].
        reduction, eps: as for `patch_mhs`.
        backend: of `pairwise_cosine` or `two_gram`.

    Returns:
        float32 (float64 for float64 input): a scalar, or [...] with reduction "none". Differentiable once.

    Cost: where D <= 3/4 N a closed form, O(N D^2), of `pairwise_cosine` with penalty "square"; else tiles,
    N^2 D / 2 multiply-adds.

    Source: Chen et al. 2022 (arXiv 2203.06345), `loss_s_orth_embedding_reg`.

    Example:
        >>> x = torch.randn(4, 49, 64, requires_grad=True)
        >>> losses.patch_soft_orthogonality(x).backward()
    """
    _checks.vectors("x", x)
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    eps = _checks.number("eps", eps, at_least=0)
    n, width = x.shape[-2:]
    if 4 * width > 3 * n:
        means = two_gram(x, reduction="none", eps=eps, backend=backend)
        return _common.reduced(means * n**2, reduction)
    squares = pairwise_cosine(
        x, penalty="square", include_self=True, reduction="none", eps=eps, backend=backend
    )
    with _checks.autocast_off(x):
        x, scale, radial = _vectors.scaled(_vectors.full_precision(x)[0], eps)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        # N, but for vectors shorter than eps
        own = torch.where(radial > 0, 1, norm * scale).square().sum((-2, -1))
        return _common.reduced(squares * n**2 - 2 * own + n, reduction)


def patch_condition_orthogonality(
    x: Tensor,
    *,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
    eps: float = 1e-8,
) -> Tensor:
    """Condition orthogonality: the squared gap between the largest and the smallest eigenvalue of
    X_hat X_hat^T, each estimated by one step of power iteration.

    With G the Gram matrix and r(G, v) = v^T G v / (|v|^2 + 1e-6): largest = r(G, G v_0), smallest = largest +
    r(G', G' v_1) with G' = G - largest I, both differentiated.

    Args:
        x: vectors, [..., N, D].
        start: the vectors v_0 and v_1, [..., 2, N], or [2, N] for all; None draws them from the standard
            normal distribution.
        generator: torch.Generator on the device of x, for the draw; not with start.
        reduction, eps: as for `patch_mhs`.

    Returns:
        float32 (float64 for float64 input): a scalar, or [...] with reduction "none". Differentiable once.

    Cost: a closed form, O(N D): the Gram matrix is only multiplied with vectors.

    Source: Chen et al. 2022 (arXiv 2203.06345), `loss_condition_orth_embedding_reg`.

    Example:
        >>> x = torch.randn(4, 49, 64, requires_grad=True)
        >>> generator = torch.Generator().manual_seed(0)
        >>> losses.patch_condition_orthogonality(x, generator=generator).backward()
    """
    _checks.vectors("x", x)
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    eps = _checks.number("eps", eps, at_least=0)
    start = _common.starts(x, start, generator, torch.randn)
    with _checks.autocast_off(x):
        return _common.reduced(evaluate(GramGap, _vectors.unit(x, eps), start, 1e-6), reduction)
