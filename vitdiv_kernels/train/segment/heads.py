"""Heads that turn maps of tokens into logits of pixels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearHead(nn.Module):
    """The logits of each patch, a linear function of its token."""

    levels = 1

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(dim, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """The map of the last block [B, D, rows, columns] to logits [B, classes, rows, columns]."""
        return self.classifier(maps[-1])


class UPerHead(nn.Module):
    """Pyramid pooling of the coarsest of four maps, lateral sums, and one fusion of all (UPerNet).

    The four maps of a ViT have one size; they are made 4, 2, 1 and 1/2 times as large, as BEiT does. Norms
    are group norms: an image counts by itself, so that several processes train as one.

    Source: Xiao et al. 2018 (arXiv 1807.10221); Bao et al. 2021 (arXiv 2106.08254) for ViTs.
    """

    levels = 4
    pooled = (1, 2, 3, 6)

    def __init__(self, dim: int, width: int, classes: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            [
                nn.Sequential(_twice(dim), _norm(dim), nn.GELU(), _twice(dim)),
                _twice(dim),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )
        self.pool = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), *_layer(dim, width, 1)) for side in self.pooled
        )
        self.context = nn.Sequential(*_layer(dim + len(self.pooled) * width, width, 3))
        self.lateral = nn.ModuleList(nn.Sequential(*_layer(dim, width, 1)) for _ in range(3))
        self.smooth = nn.ModuleList(nn.Sequential(*_layer(width, width, 3)) for _ in range(3))
        self.fuse = nn.Sequential(*_layer(4 * width, width, 3))
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps [B, D, rows, columns] to logits [B, classes, 4 rows, 4 columns]."""
        *finer, coarse = (scale(x) for scale, x in zip(self.scales, maps, strict=True))
        around = [_as_large(pool(coarse), coarse) for pool in self.pool]
        levels = [self.context(torch.cat([coarse, *around], 1))]
        for lateral, x in zip(self.lateral, reversed(finer), strict=True):
            x = lateral(x)
            levels.append(x + _as_large(levels[-1], x))
        levels = [levels[0], *(smooth(x) for smooth, x in zip(self.smooth, levels[1:], strict=True))]
        finest = levels[-1]
        return self.classifier(self.fuse(torch.cat([_as_large(x, finest) for x in levels], 1)))


def _twice(dim: int) -> nn.Module:
    return nn.ConvTranspose2d(dim, dim, 2, stride=2)


def _norm(width: int) -> nn.Module:
    # groups of 16 features: a group needs several, where a map is pooled to one pixel
    return nn.GroupNorm(width // 16 if width % 16 == 0 else 1, width)


def _layer(features: int, width: int, side: int) -> list[nn.Module]:
    return [nn.Conv2d(features, width, side, padding=side // 2, bias=False), _norm(width), nn.ReLU()]


def _as_large(x: Tensor, other: Tensor) -> Tensor:
    return F.interpolate(x, other.shape[-2:], mode="bilinear")
