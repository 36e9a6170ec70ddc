"""Scenes composed of the handwritten digits, with the digit, or none, of each pixel."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Data, Tensors, load_digits
from ..errors import DataError
from .augment import Crop
from .settings import Dense

SIZE = 32
COUNTS = {"train": 1500, "val": 200, "test": 400}
CELL = SIZE // 2  # of the four quarters, each with a digit or none
FILLED = (3, 4)  # so many quarters of so many
SIDES = (12, CELL)  # of a digit in pixels, 8 before
INK = 0.5  # from which a pixel is the digit's
MARGIN = 1  # pixels
CLUTTER = 0.3  # of the background, smooth


def load_scenes(image_size: int, channels: int, dense: Dense) -> Data:
    """1,500 scenes to train on, 200 to choose by, 400 to report; always the same, and no digit is in two of
    these sets. Classes are background and the ten digits. Raises DataError."""
    if (channels, image_size) != (1, SIZE):
        raise DataError(
            f"the scenes are 1x{SIZE}x{SIZE} images but the model takes "
            f"{channels}x{image_size}x{image_size}: use "
            "other data, --data segfolder:PATH, or a model for scenes, such as scenes12"
        )
    digits = load_digits()
    sets: list[Any] = []
    for seed, (name, count) in enumerate(COUNTS.items()):
        generator = torch.Generator().manual_seed(seed)
        source = cast(Tensors, getattr(digits, name))
        images, masks = zip(*(scene(source, generator) for _ in range(count)), strict=True)
        sets.append(Tensors(torch.stack(images), torch.stack(masks)))
    augment: Any = Crop(SIZE, 0 if dense.resize is None else dense.resize, dense.crop_scale or (0.8, 1.25))
    return Data(sets[0], sets[1], sets[2], ["background", *digits.classes], augment)


def scene(digits: Tensors, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """[1, 32, 32] from 0 to 1, and [32, 32] uint8: 0, or 1 + the digit, up to a margin around its ink."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    clutter = torch.rand(1, 1, 8, 8, generator=generator)
    image = CLUTTER * F.interpolate(clutter, (SIZE, SIZE), mode="bilinear")[0, 0]
    mask = torch.zeros(SIZE, SIZE, dtype=torch.uint8)
    for cell in range(4):
        which, side = draw(0, len(digits) - 1), draw(*SIDES)
        top, left = (CELL * place + draw(0, CELL - side) for place in divmod(cell, 2))
        if draw(1, FILLED[1]) > FILLED[0]:
            continue
        ink = F.interpolate(digits.images[which][None], (side, side), mode="bilinear")
        around = F.max_pool2d(ink, 2 * MARGIN + 1, stride=1, padding=MARGIN)[0, 0]
        place = (slice(top, top + side), slice(left, left + side))
        image[place] = torch.maximum(image[place], ink[0, 0])
        mask[place][around > INK] = 1 + int(digits.labels[which])
    return image[None], mask
