"""CutMix (Yun et al. 2019, arXiv 1905.04899): a box of every image of a batch comes from another image.

As timm's `Mixup(mode="batch")` does it: one box for the batch, and the other image is that of the batch in
reverse order, so that the middle image of an odd batch stays as it is.
"""

import math
import random

import torch
from torch import Tensor

Box = tuple[int, int, int, int]  # top, bottom, left and right in pixels, bottom and right exclusive


def draw_box(height: int, width: int, alpha: float, generator: torch.Generator) -> Box:
    """A box of the image's proportions, with 1 - Beta(alpha, alpha) of its area, cut at the image's edges.

    Its centre is a pixel, all alike. It may be empty. All randomness comes from the generator, on the CPU.
    """
    # torch draws no Beta variate from a generator, so one number of the generator seeds Python's
    draw = random.Random(int(torch.randint(2**63 - 1, (), generator=generator)))
    ratio = math.sqrt(1 - draw.betavariate(alpha, alpha))

    def edges(pixels: int) -> tuple[int, int]:
        side = int(ratio * pixels)
        first = draw.randrange(pixels) - side // 2
        return max(0, first), min(pixels, first + side)

    return *edges(height), *edges(width)


def mix(images: Tensor, box: Box) -> Tensor:
    """images [B, C, H, W] with the pixels in the box from images.flip(0)."""
    top, bottom, left, right = box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right].flip(0)
    return mixed


def share_left(box: Box, height: int, width: int) -> float:
    """The share of the area outside the box: the lambda of the mixed labels."""
    top, bottom, left, right = box
    return 1 - (bottom - top) * (right - left) / (height * width)
