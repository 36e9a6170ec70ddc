"""Images of a batch mixed as a recipe says, with the labels of images, patches and regions.

Own code, since timm's `Mixup` does not tell which patches it has mixed.
"""

import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, losses
from .recipe import Recipe


@dataclass(frozen=True)
class Mixed:
    """A mixed batch.

    Args:
        images: [B, channels, height, width].
        targets: soft labels of the images, smoothed, [B, C], for the task's cross-entropy: float32 (float64
            of float64 images).
        mixing: labels, others and shares [N] of the patches, `mixing` of a `DiversityObjective`.
        regions: targets [B, 2, C] and masks [2, rows, columns], its `regions`; None without two-image mixing.
    """

    images: Tensor
    targets: Tensor
    mixing: tuple[Tensor, Tensor, Tensor]
    regions: tuple[Tensor, Tensor] | None = None


def mix(
    recipe: Recipe,
    images: Tensor,
    labels: Tensor,
    *,
    classes: int,
    grid: tuple[int, int],
    generator: torch.Generator,
) -> Mixed:
    """The batch with mixup or CutMix, and then two-image mixing, as the recipe says.

    Args:
        images: [B, channels, height, width]; labels: int64 [B], from 0 to C - 1.
        classes: C. grid: rows and columns of patches.
        generator: torch.Generator on the CPU, from which all draws are.

    As `Mixup(mode="batch")` of the timm 0.3 that the papers use: one draw for the batch, whose other images
    are the batch in reverse order; of an odd batch the middle image stays as it is. The box of CutMix has two
    equal halves around its centre (those of timm 1.0 may differ by a pixel), is cut at the edges, and its
    area after that counts.

    Example:
        >>> from vitdiv_kernels import recipes
        >>> images, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
        >>> draws = torch.Generator().manual_seed(0)
        >>> recipe = recipes.load("diverse_vit_deit_small")
        >>> batch = recipes.mix(recipe, images, labels, classes=3, grid=(2, 2), generator=draws)
        >>> batch.targets.shape, batch.mixing[2].shape
        (torch.Size([4, 3]), torch.Size([4]))
    """
    _checks.floating_tensor("images", images)
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64:
        given = _checks.name_of(labels.dtype) if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise TypeError(f"labels must be a torch.Tensor of dtype int64, got {given}")
    if images.dim() != 4 or labels.shape != images.shape[:1]:
        raise ValueError(
            "images and labels must have shapes [B, channels, height, width] and [B], got "
            f"{_checks.shape_of(images)} and {_checks.shape_of(labels)}"
        )
    if _checks.values_at_hand(labels) and len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(
            f"labels must be from 0 to {classes - 1} (classes={classes}), got {int(labels.min())} to "
            f"{int(labels.max())}"
        )
    # torch draws no Beta variate from a generator, so one number of the generator seeds Python's
    draw = random.Random(int(torch.randint(2**63 - 1, (), generator=generator, device="cpu")))
    height, width = images.shape[-2:]
    share, box, cutmix = 1.0, (0, 0, 0, 0), recipe.cutmix_alpha
    if (recipe.mixup or cutmix) and draw.random() < recipe.mix_probability:
        by_cutmix = not recipe.mixup or (cutmix > 0 and draw.random() < recipe.cutmix_probability)
        alpha = cutmix if by_cutmix else recipe.mixup
        share = draw.betavariate(alpha, alpha)
        if by_cutmix:
            box = _box(height, width, share, draw)
            top, bottom, left, right = box
            share = 1 - (bottom - top) * (right - left) / (height * width)
            mixed = images.clone()
            mixed[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right].flip(0)
            images = mixed
        else:
            images = share * images + (1 - share) * images.flip(0)
    shares = torch.full((grid[0] * grid[1],), share, dtype=torch.float32, device="cpu")
    if box != (0, 0, 0, 0):
        corners = torch.tensor(box, device="cpu")
        shares = losses.cutmix_shares(corners, image_size=(height, width), grid=grid)
    first = F.one_hot(labels, classes).to(torch.promote_types(images.dtype, torch.float32))
    smoothing = recipe.label_smoothing
    targets = (1 - smoothing) * (share * first + (1 - share) * first.flip(0)) + smoothing / classes
    mixing = labels, labels.flip(0), shares.to(images.device)
    if not recipe.mixes_two_images:
        return Mixed(images, targets, mixing)
    masks = losses.region_masks(grid, generator=generator)
    order = torch.randperm(len(images), generator=generator, device="cpu").to(images.device)
    images, targets, regions = losses.mix_two_images(images, targets, masks, order)
    return Mixed(images, targets, mixing, (regions, masks))


def _box(height: int, width: int, share: float, draw: random.Random) -> tuple[int, int, int, int]:
    """Top, bottom, left and right in pixels, of 1 - share of the area, cut at the edges."""
    ratio = math.sqrt(1 - share)

    def edges(pixels: int) -> tuple[int, int]:
        half, centre = int(pixels * ratio) // 2, draw.randrange(pixels)
        return max(0, centre - half), min(pixels, centre + half)

    return *edges(height), *edges(width)
