"""Losses on regions of an image: two images mixed by patches, each region classified; neighbours alike.

A mask is [R, rows, columns]: how much of each patch belongs to each of R regions, of N = rows * columns
patches row by row; of a floating dtype or bool, on any device.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .. import _checks, _vectors
from .._types import Backend, Reduction
from ..ops.pairs.pairwise_rows import pairwise_logsumexp
from . import _common

_VARIANTS = ("corrected", "released")


def region_masks(
    grid: int | Sequence[int], *, share: float | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """A random box of whole patches, and the rest of the image, for `mix_two_images`.

    Args:
        grid: rows and columns of patches, or one number.
        share: of the patches in the box, at most, from 0 to 1; None draws it, all alike (Beta(1, 1)).
        generator: torch.Generator on the CPU, for the draws.

    Returns:
        float32 [2, rows, columns], on the CPU: 1 in the box and 0 elsewhere, and the opposite.

    The height of the box is drawn, all alike, below the number of rows and below that of its patches, and its
    width follows. Cost: a closed form, O(N).

    Source: the released code of Gong et al. 2021 (arXiv 2104.12753), `generate_mask` and `two_mix`, for
    squares; other grids are ours.

    Example:
        >>> losses.region_masks(4, share=0.5).sum(0)[0]
        tensor([1., 1., 1., 1.])
    """
    rows, columns = _common.pair("grid", grid)

    def draw(low, high):
        """A whole number from low to high."""
        return int(torch.randint(low, max(low, high) + 1, (), generator=generator, device="cpu"))

    if share is None:
        share = float(torch.rand((), generator=generator, dtype=torch.float32, device="cpu"))
    patches = int(rows * columns * _checks.number("share", share, at_least=0, at_most=1))
    height = draw(1, min(rows, patches) - 1)
    width = patches // height
    if width > columns:
        height, width = patches // columns, columns
    top, left = draw(0, rows - height), draw(0, columns - width)
    box = torch.zeros(rows, columns, dtype=torch.float32, device="cpu")
    box[top : top + height, left : left + width] = 1
    return torch.stack([box, 1 - box])


def mix_two_images(
    images: Tensor, targets: Tensor, masks: Tensor, order: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Each image mixed with another one of the batch, patch by patch, and the labels of both.

    Args:
        images: [B, channels, height, width], with a whole number of pixels in each patch.
        targets: soft labels, floating [B, C].
        masks: [2, rows, columns], as `region_masks` gives them: of the image, and of the other one.
        order: the number of the other image of each, int64 [B], such as torch.randperm(B).

    Returns:
        the mixed images, like images; their labels, mixed by the areas, [B, C]; and those of the two regions,
        [B, 2, C], for `region_mixing`.

    Cost: a closed form, O(pixels + B C).

    Source: the released code of Gong et al. 2021 (arXiv 2104.12753), `two_mix`.

    Example:
        >>> images, targets = torch.rand(2, 3, 8, 8), torch.eye(2)
        >>> mixed = losses.mix_two_images(images, targets, losses.region_masks(4), torch.tensor([1, 0]))
        >>> [tuple(tensor.shape) for tensor in mixed]
        [(2, 3, 8, 8), (2, 2), (2, 2, 2)]
    """
    _checks.floating_tensor("images", images)
    if images.dim() != 4:
        raise ValueError(
            f"images must have shape [B, channels, height, width], got {_checks.shape_of(images)}"
        )
    _checks.floating_tensor("targets", targets)
    if targets.dim() != 2 or len(targets) != len(images):
        raise ValueError(f"targets must have shape [{len(images)}, C], got {_checks.shape_of(targets)}")
    _masks(masks)
    rows, columns = masks.shape[1:]
    if len(masks) != 2 or images.shape[2] % rows or images.shape[3] % columns:
        raise ValueError(
            f"masks must have shape [2, rows, columns] that divide {images.shape[2]} x {images.shape[3]} "
            f"pixels, got {_checks.shape_of(masks)}"
        )
    if not isinstance(order, torch.Tensor) or order.dtype != torch.int64:
        given = _checks.name_of(order.dtype) if isinstance(order, torch.Tensor) else type(order).__name__
        raise TypeError(f"order must be a torch.Tensor of dtype int64, got {given}")
    _checks.shaped("order", order, (len(images),))
    _common.numbers_below("order", order, len(images), "numbers of images")
    own, other = masks.to(images)
    pixels = images.shape[2] // rows, images.shape[3] // columns
    first, second = (
        mask.repeat_interleave(pixels[0], 0).repeat_interleave(pixels[1], 1) for mask in (own, other)
    )
    mixed = first * images + second * images[order]
    regions = torch.stack([targets, targets[order]], 1)
    areas = masks.to(targets).mean((-2, -1))
    return mixed, torch.einsum("r,brc->bc", areas, regions), regions


def region_means(patches: Tensor, masks: Tensor, *, eps: float = 1e-4) -> Tensor:
    """The mean patch of each region: `sum_j m_rj p_j / (sum_j m_rj + eps)`, what the head of patches takes.

    Args:
        patches: after the final norm, [B, N, D].
        masks: [R, rows, columns] of N patches.
        eps: keeps the mean of an empty region at 0.

    Returns:
        [B, R, D], float32 (float64 for float64 input).

    Cost: a closed form, R N D.

    Source: the released code of Gong et al. 2021 (arXiv 2104.12753), `VisionTransformer.forward`.

    Example:
        >>> losses.region_means(torch.randn(2, 16, 8), losses.region_masks(4)).shape
        torch.Size([2, 2, 8])
    """
    _checks.vectors("patches", patches)
    if patches.dim() != 3:
        raise ValueError(f"patches must have shape [B, N, D], got {_checks.shape_of(patches)}")
    _masks(masks)
    eps = _checks.number("eps", eps, at_least=0)
    if masks.shape[1] * masks.shape[2] != patches.shape[1]:
        raise ValueError(
            f"masks must have shape [R, rows, columns] of {patches.shape[1]} patches, "
            f"got {_checks.shape_of(masks)}"
        )
    with _checks.autocast_off(patches):
        (patches,) = _vectors.full_precision(patches)
        flat = masks.flatten(1).to(patches)
        return (flat / (flat.sum(-1, keepdim=True) + eps)) @ patches


def region_mixing(
    logits: Tensor, targets: Tensor, masks: Tensor, *, eps: float = 1e-8, reduction: Reduction = "mean"
) -> Tensor:
    """Each region of a mixed image is classified by its mean patch, and counts by its area.

    With a_r the share of the image in region r, and p the softmax of the logits,
    `sum_r a_r sum_c t_rc (log t_rc - log(p_rc + eps))`.

    Args:
        logits: of each region, [B, R, C]: those of a head of its own on `region_means`.
        targets: soft labels of each region, [B, R, C], as `mix_two_images` gives them; no gradient.
        masks: [R, rows, columns].
        eps: is added to the probabilities, as the released code does; 0 for none.
        reduction: "mean" or "sum" over images, or "none" for [B].

    Returns:
        float32 (float64 for float64 logits).

    Cost: a closed form, O(R C).

    Source: the released code of Gong et al. 2021 (arXiv 2104.12753), `patch_loss` of
    `VisionTransformer.forward`, which adds it to the cross-entropy with weight 1.

    Example:
        >>> masks = losses.region_masks(4)
        >>> patches, head = torch.randn(2, 16, 8), torch.nn.Linear(8, 5)
        >>> logits = head(losses.region_means(patches, masks))
        >>> losses.region_mixing(logits, torch.rand(2, 2, 5).softmax(-1), masks).backward()
    """
    _checks.floating_tensor("logits", logits)
    if logits.dim() != 3:
        raise ValueError(f"logits must have shape [B, R, C], got {_checks.shape_of(logits)}")
    _checks.floating_tensor("targets", targets)
    _checks.shaped("targets", targets, logits.shape, because=", that of logits")
    _checks.same_device("targets", targets, "logits", logits)
    _common.not_negative("targets", targets)
    _masks(masks)
    if len(masks) != logits.shape[1]:
        raise ValueError(
            f"masks must have shape [{logits.shape[1]}, rows, columns], got {_checks.shape_of(masks)}"
        )
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    eps = _checks.number("eps", eps, at_least=0)
    with _checks.autocast_off(logits):
        (logits,) = _vectors.full_precision(logits)
        targets = targets.detach().to(logits)
        log_p = logits.log_softmax(-1)
        if eps:
            log_p = (log_p.exp() + eps).log()
        # a class of share 0 adds 0, also where its probability is 0
        divergence = torch.xlogy(targets, targets) - (targets * log_p).masked_fill(targets == 0, 0)
        areas = masks.to(logits).mean((-2, -1))
        return _common.reduced(divergence.sum(-1) @ areas, reduction)


def region_contrast(
    x: Tensor,
    *,
    grid: Sequence[int] | None = None,
    variant: Literal["corrected", "released"] = "corrected",
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
    eps: float = 1e-8,
    backend: Backend = "auto",
) -> Tensor:
    """A patch must resemble its eight neighbours more than the other patches of its image and of the batch.

    With S the cosines, i and j the P patches that are not on the border, the mean over i of

        -log(e_i / (e_i + sum_j exp(S_ij) + sum_j exp(S_i,o(j)))),  e_i = mean_{k near i} exp(S_ik) + 1e-10,

    where o puts these patches of the whole batch into a random order, and j runs over all P, also i. The two
    sums are targets: they have a gradient to patch i alone.

    Args:
        x: patches of the last layer, [B, N, D].
        grid: rows and columns of patches, at least 3 x 3; None is a square.
        variant: "corrected", or "released", which reshapes the vectors [P, D] to [D, P] where it transposes
            them before it takes the two sums: these are then of unrelated vectors, mixed from the numbers of
            all P, and not of length 1.
        generator: torch.Generator on the device of x, for the order.
        reduction: "mean" over patches and images, "sum" over images of the mean over patches, or "none" for
            [B].
        eps: patches shorter than this are divided by eps instead of by their norm.
        backend: of `pairwise_logsumexp`, for variant "corrected".

    Returns:
        float32 (float64 for float64 input). Differentiable once.

    Cost: tiles, 2 P^2 D multiply-adds and 8 P D. The variant "released" holds P x 2 P matrices.

    Source: the released code of Gong et al. 2021 (arXiv 2104.12753), `reg_engine.py`, with weight 0.5. It is
    not in the paper, and the released main program does not use it; which tokens of the model it took is not
    released. (What that program uses is `neighbourhood_contrast`.)

    Example:
        >>> x = torch.randn(2, 25, 16, requires_grad=True)
        >>> losses.region_contrast(x, generator=torch.Generator().manual_seed(0)).backward()
    """
    _checks.vectors("x", x)
    if x.dim() != 3:
        raise ValueError(f"x must have shape [B, N, D], got {_checks.shape_of(x)}")
    rows, columns = _common.grid_of(grid, x.shape[1])
    if rows < 3 or columns < 3:
        raise ValueError(f"grid must be at least 3 x 3 patches, got {rows} x {columns}")
    _checks.one_of("variant", variant, _VARIANTS)
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    eps = _checks.number("eps", eps, at_least=0)
    with _checks.autocast_off(x):
        (x,) = _vectors.full_precision(x)
        image = _vectors.unit(x, eps).unflatten(1, (rows, columns))
        inner = image[:, 1:-1, 1:-1]
        near = [
            torch.linalg.vecdot(inner, image[:, i : rows - 2 + i, j : columns - 2 + j])
            for i in range(3)
            for j in range(3)
            if (i, j) != (1, 1)
        ]
        own = (torch.stack(near, -1).exp().mean(-1) + 1e-10).log().flatten(1)
        if variant == "released":
            patches = inner.flatten(1, 2).reshape(len(x), -1, own.shape[1]).mT
        else:
            patches = x.unflatten(1, (rows, columns))[:, 1:-1, 1:-1].flatten(1, 2)
        order = torch.randperm(own.numel(), generator=generator, device=x.device)
        others = patches.flatten(0, 1)[order].view(patches.shape)
        if variant == "released":
            targets = torch.cat([patches, others], 1).detach()
            sums = (patches @ targets.mT).logsumexp(-1)
        else:
            sums = torch.logaddexp(
                pairwise_logsumexp(patches, patches.detach(), eps=eps, backend=backend),
                pairwise_logsumexp(patches, others.detach(), eps=eps, backend=backend),
            )
        return _common.reduced((torch.logaddexp(own, sums) - own).mean(-1), reduction)


def _masks(masks):
    if not isinstance(masks, torch.Tensor) or not (masks.is_floating_point() or masks.dtype == torch.bool):
        given = _checks.name_of(masks.dtype) if isinstance(masks, torch.Tensor) else type(masks).__name__
        raise TypeError(f"masks must be a torch.Tensor of a floating or bool dtype, got {given}")
    if masks.dim() != 3 or 0 in masks.shape:
        raise ValueError(f"masks must have shape [R, rows, columns], got {_checks.shape_of(masks)}")
    if masks.is_floating_point():
        _common.not_negative("masks", masks)
