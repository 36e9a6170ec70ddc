"""Patch-wise mixing: images of a batch mixed by CutMix or mixup, and a class label for every patch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks
from .._types import Reduction
from . import _common


def cutmix_shares(
    box: Tensor | Sequence[float], *, image_size: int | Sequence[int], grid: int | Sequence[int]
) -> Tensor:
    """The share of each patch that a CutMix box leaves to the first image.

    Args:
        box: top, bottom, left and right edge in pixels, bottom and right exclusive: four numbers, or a tensor
            [..., 4] of boxes.
        image_size: height and width in pixels, or one number for a square; grid: rows and columns of patches,
            or one number.

    Returns:
        float32 [..., N], N patches row by row: 1 outside the box, 0 within it, the share of the area on its
        edge.

    Cost: a closed form, O(N): the covered area of a patch is a product of two lengths.

    Source: Chen et al. 2022 (arXiv 2203.06345), `patch_wise_lam`.

    Example:
        >>> losses.cutmix_shares((0, 16, 0, 24), image_size=32, grid=2)
        tensor([0.0000, 0.5000, 1.0000, 1.0000])
    """
    # as_tensor takes a tensor to the default device
    box = box.float() if isinstance(box, torch.Tensor) else torch.as_tensor(box, dtype=torch.float32)
    if box.shape[-1:] != (4,):
        raise ValueError(
            f"box must be top, bottom, left and right, four numbers or [..., 4], got {_checks.shape_of(box)}"
        )
    sizes = _common.pair("image_size", image_size), _common.pair("grid", grid)
    rows, columns = (
        _covered(box[..., 2 * axis : 2 * axis + 2], pixels, patches)
        for axis, (pixels, patches) in enumerate(zip(*sizes, strict=True))
    )
    return 1 - (rows.unsqueeze(-1) * columns.unsqueeze(-2)).flatten(-2)


def patch_targets(
    labels: Tensor, others: Tensor, shares: Tensor, *, num_classes: int, smoothing: float = 0.0
) -> Tensor:
    """Soft labels of patches: the shares of two images' labels, smoothed.

    Args:
        labels, others: classes of the first and the second image, int64 [B]. (timm mixes a batch with itself
            in reverse order: others = labels.flip(0).)
        shares: of the first image in each patch, [N] or [B, N], as `cutmix_shares` gives; for mixup its
            lambda, N times.
        num_classes: C.
        smoothing: this much of the weight goes to all classes evenly.

    Returns:
        [B, N, C], the dtype of shares; rows sum to 1.

    Source: Chen et al. 2022 (arXiv 2203.06345), `mixup_target`.

    Example:
        >>> labels, shares = torch.tensor([0, 2]), torch.tensor([0.0, 0.5, 1.0, 1.0])
        >>> losses.patch_targets(labels, labels.flip(0), shares, num_classes=3).shape
        torch.Size([2, 4, 3])
    """
    num_classes = _checks.count("num_classes", num_classes, at_least=1)
    smoothing = _labels(labels, others, shares, smoothing, classes=num_classes)
    shares = shares.expand(len(labels), -1).unsqueeze(-1)
    first, second = (
        torch.nn.functional.one_hot(y, num_classes).to(shares.dtype).unsqueeze(1) for y in (labels, others)
    )
    return (1 - smoothing) * (shares * first + (1 - shares) * second) + smoothing / num_classes


def patch_mixing(
    logits: Tensor,
    labels: Tensor,
    others: Tensor,
    shares: Tensor,
    *,
    smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy of every patch with the soft label that CutMix or mixup gives it.

    With t the soft labels of `patch_targets`, `-sum_c t_c log softmax(logits)_c`, in one call for all
    patches, and without the [B, N, C] labels. Where t_c is 0 its term is 0, also with a logit of -inf.

    Args:
        logits: of the patches, without the class token, [B, N, C].
        labels, others, shares, smoothing: as for `patch_targets`.
        reduction: "mean" over images and patches, "sum" over patches of the mean over images, as the released
            code has it, or "none" for [B, N].

    Returns:
        float32 (float64 for float64 input).

    Cost: a closed form, O(N C).

    Sources: Gong et al. 2021 (arXiv 2104.12753), patch-wise mixing loss: "mean". Chen et al. 2022 (arXiv
    2203.06345), `Loss_mixing`: "sum"; their trainer adds the class token's cross-entropy and divides by
    N + 1.

    Example:
        >>> labels, shares = torch.tensor([0, 2]), torch.tensor([0.0, 0.5, 1.0, 1.0])
        >>> logits = torch.randn(2, 4, 3, requires_grad=True)
        >>> losses.patch_mixing(logits, labels, labels.flip(0), shares).backward()
    """
    _checks.floating_tensor("logits", logits)
    if logits.dim() != 3:
        raise ValueError(f"logits must have shape [B, N, C], got {_checks.shape_of(logits)}")
    smoothing = _labels(labels, others, shares, smoothing, logits)
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    with _checks.autocast_off(logits):
        return _patch_mixing(logits, labels, others, shares, smoothing, reduction)


def _patch_mixing(logits, labels, others, shares, smoothing, reduction):
    log_p = logits.log_softmax(-1, torch.promote_types(logits.dtype, torch.float32))
    shares = shares.to(log_p.dtype)
    # both labels at once: the gradient of each gather is a tensor as large as the logits
    classes = torch.stack([labels, others], -1).unsqueeze(1).expand(-1, logits.shape[1], -1)
    weights = (smoothing - 1) * torch.stack([shares, 1 - shares], -1)
    chosen = log_p.gather(-1, classes)
    # a class of share 0 adds 0, also where its probability is 0
    losses = (weights * chosen.masked_fill((weights == 0) & chosen.isinf(), 0)).sum(-1)
    if smoothing:
        losses = losses - smoothing * log_p.mean(-1)
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.mean(0).sum()


def _covered(interval, pixels, patches):
    """The share of each of `patches` equal parts of `pixels` that lies in the interval [..., 2]."""
    edges = torch.linspace(0, pixels, patches + 1, dtype=interval.dtype, device=interval.device)
    low, high = interval.unsqueeze(-2).unbind(-1)
    overlap = torch.minimum(high, edges[1:]) - torch.maximum(low, edges[:-1])
    return overlap.clamp_min(0) * (patches / pixels)


def _labels(labels, others, shares, smoothing, logits=None, classes=None):
    classes = classes if logits is None else logits.shape[-1]
    for name, value in (("labels", labels), ("others", others)):
        if not isinstance(value, torch.Tensor) or value.dtype != torch.int64:
            given = _checks.name_of(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a torch.Tensor of dtype int64, got {given}")
        if value.dim() != 1 or (logits is not None and len(value) != logits.shape[0]):
            expected = "[B]" if logits is None else f"[{logits.shape[0]}]"
            raise ValueError(f"{name} must have shape {expected}, got {_checks.shape_of(value)}")
        _common.numbers_below(name, value, classes, "classes")
    _checks.shaped("others", others, labels.shape, because=", that of labels")
    _checks.floating_tensor("shares", shares)
    n = shares.shape[-1:] if logits is None else logits.shape[1:2]
    if shares.dim() == 0 or shares.shape not in (n, (*labels.shape, *n)):
        patches = "N" if logits is None else n[0]
        raise ValueError(
            f"shares must have shape [{patches}] or [{len(labels)}, {patches}], "
            f"got {_checks.shape_of(shares)}"
        )
    return _checks.number("smoothing", smoothing, at_least=0, at_most=1)
