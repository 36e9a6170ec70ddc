"""Losses on weight matrices: their rows, one for each output, pushed apart.

Every function takes one tensor [..., N, D] or a list of them, of any shapes: matrices of one shape are taken
together in one call. The q, k and v of a packed projection are `block.attn.qkv.weight.unflatten(0, (3, -1))`,
[3, N, D]. reduction: "sum" over all matrices, as published, "mean", or "none" for one value per matrix, in
the order given.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from .. import _checks, _vectors
from .._types import Reduction
from ..ops.pairs.two_gram import two_gram
from . import _common
from ._spectral import GramGap, evaluate


def weight_mhs(
    weights: Tensor | Sequence[Tensor],
    *,
    variant: Literal["paper", "released"] = "paper",
    reduction: Reduction = "sum",
    eps: float = 1e-8,
) -> Tensor:
    """Maximum hyperspherical separation: `-min_{i != j} (2 - 2 cos_ij)` of the rows of each matrix.

    Args:
        weights: a tensor [..., N, D], N > 1, or a list of such tensors; variant, eps: as for `patch_mhs`.
        reduction: "sum" or "mean" over matrices, or "none".

    Returns:
        float32 (float64 for float64 input): a scalar, or [matrices] with reduction "none".

    Cost: tiles, N^2 D / 2 multiply-adds for the index of each row's nearest, then O(N D). The variant
    "released" holds one N x N matrix per weight.

    Source: Chen et al. 2022 (arXiv 2203.06345), `loss_mhs_weight_reg`.

    Example:
        >>> weights = [torch.randn(3, 64, 64, requires_grad=True) for _ in range(2)]  # qkv of 2 blocks
        >>> losses.weight_mhs(weights).backward()
    """
    _checks.one_of("variant", variant, _common.MHS_VARIANTS)
    eps = _checks.number("eps", eps, at_least=0)

    def loss(w):
        return _common.separation(w, variant, eps)

    return _over_shapes(loss, weights, reduction, at_least=2)


def weight_mgd(
    weights: Tensor | Sequence[Tensor],
    *,
    ridge: float = 1e-6,
    reduction: Reduction = "sum",
    eps: float = 1e-8,
) -> Tensor:
    """Maximum Gram determinant: `-log det(exp(2 cos - 2) + ridge I)` of the rows of each matrix.

    Args:
        weights: a tensor [..., N, D] or a list of such tensors; ridge, eps: as for `patch_mgd`.
        reduction: "sum" or "mean" over matrices, or "none".

    Returns:
        float32 (float64 for float64 input): a scalar, or [matrices] with reduction "none". Differentiable
        once.

    Cost: O(N^2 D + N^3); it holds N x N matrices in float64.

    Source: Chen et al. 2022 (arXiv 2203.06345), `loss_mgd_weight_reg`.

    Example:
        >>> weights = [torch.randn(3, 64, 64, requires_grad=True) for _ in range(2)]  # qkv of 2 blocks
        >>> losses.weight_mgd(weights).backward()
    """
    ridge = _checks.positive("ridge", ridge)
    eps = _checks.number("eps", eps, at_least=0)

    def loss(w):
        return _common.determinant(w, ridge, eps)

    return _over_shapes(loss, weights, reduction)


def weight_soft_orthogonality(weights: Tensor | Sequence[Tensor], *, reduction: Reduction = "sum") -> Tensor:
    """Soft orthogonality: `|W W^T - I|_F^2` of each matrix.

    Args:
        weights: a tensor [..., N, D] or a list of such tensors.
        reduction: "sum" or "mean" over matrices, or "none".

    Returns:
        float32 (float64 for float64 input): a scalar, or [matrices] with reduction "none". Differentiable
        once.

    Cost: tiles of the smaller side, n = min(N, D), N D n / 2 multiply-adds, since |W W^T - I|^2 =
    |W^T W - I|^2 + N - D.

    Source: Chen et al. 2022 (arXiv 2203.06345), `loss_s_orth_weight_reg`.

    Example:
        >>> weights = [torch.randn(3, 64, 64, requires_grad=True) for _ in range(2)]  # qkv of 2 blocks
        >>> losses.weight_soft_orthogonality(weights).backward()
    """

    def loss(w):
        n, width = w.shape[-2:]
        if n > width:
            w = w.mT
        means = two_gram(w, normalise=False, reduction="none")
        return means * w.shape[-2] ** 2 + max(0, n - width)

    return _over_shapes(loss, weights, reduction)


def weight_condition_orthogonality(
    weights: Tensor | Sequence[Tensor],
    *,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    of: Literal["rows", "columns"] = "rows",
    reduction: Reduction = "sum",
) -> Tensor:
    """Condition orthogonality: the squared gap between the largest and the smallest eigenvalue of W W^T, each
    estimated by one step of power iteration.

    With G = W W^T and r(G, v) = v^T G v / |v|^2: largest = r(G, G v_0), smallest = largest + r(G', G' v_1)
    with G' = G - largest I, both differentiated.

    Args:
        weights: a tensor [..., N, D] or a list of such tensors.
        start: the vectors v_0 and v_1, [2, N], the same for all matrices; None draws them for each, uniform
            in [0, 1), matrix by matrix within a shape.
        generator: torch.Generator on the device of the weights, for the draw; not with start.
        of: "rows", or "columns" for W^T W, the published `_inverse` form; start is then [2, D].
        reduction: "sum" or "mean" over matrices, or "none".

    Returns:
        float32 (float64 for float64 input): a scalar, or [matrices] with reduction "none". Differentiable
        once. A matrix of zeros has the value 0.

    Cost: a closed form, O(N D): the Gram matrix is only multiplied with vectors.

    Source: Chen et al. 2022 (arXiv 2203.06345), `Loss_condition_orth_weight`.

    Example:
        >>> weights = [torch.randn(3, 64, 64, requires_grad=True) for _ in range(2)]  # qkv of 2 blocks
        >>> losses.weight_condition_orthogonality(weights).backward()
    """
    _checks.one_of("of", of, ("rows", "columns"))

    def loss(w):
        w = w if of == "rows" else w.mT
        return evaluate(GramGap, w, _common.starts(w, start, generator, torch.rand), 1e-12)

    return _over_shapes(loss, weights, reduction)


def _over_shapes(loss, weights, reduction, at_least=1):
    """`loss` takes [L, N, D] to [L]; it is called once for each shape, and the values put in order again."""
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    if not isinstance(weights, (torch.Tensor, Iterable)):
        raise TypeError(f"weights must be a tensor or a list of tensors, got {type(weights).__name__}")
    given = [weights] if isinstance(weights, torch.Tensor) else list(weights)
    if not given:
        raise ValueError("weights must hold at least one matrix, got an empty list")
    for i, w in enumerate(given):
        name = "weights" if isinstance(weights, torch.Tensor) else f"weights[{i}]"
        _checks.vectors(name, w, at_least)
    groups = {}
    for i, w in enumerate(given):
        groups.setdefault((w.shape[-2:], w.dtype, w.device), []).append(i)
    parts = [None] * len(given)
    for members in groups.values():
        stacks = [given[i].flatten(0, -3) if given[i].dim() > 2 else given[i].unsqueeze(0) for i in members]
        (stack,) = _vectors.full_precision(stacks[0] if len(stacks) == 1 else torch.cat(stacks))
        with _checks.autocast_off(stack):
            values = loss(stack).split([part.shape[0] for part in stacks])
        for i, value in zip(members, values, strict=True):
            parts[i] = value
    values = parts[0] if len(parts) == 1 else torch.cat(parts)
    return _common.reduced(values, reduction)
