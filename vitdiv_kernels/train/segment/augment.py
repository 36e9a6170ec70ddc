"""Images of any size with their masks: crops for training, which are drawn for both together."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = 255  # in a mask: a pixel without a class


class Ragged(list):
    """Tensors of different sizes, with what the trainer does with a batch: indexing by lists, and `to`."""

    def __getitem__(self, index: Any) -> Any:
        return (
            Ragged(super(Ragged, self).__getitem__(i) for i in index)
            if isinstance(index, list)
            else (super().__getitem__(index))
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Ragged":
        return Ragged(tensor.to(device, non_blocking=non_blocking) for tensor in self)


Images = Tensor | Ragged  # [B, C, H, W], or each [C, H, W]
Masks = Tensor | Ragged  # [B, H, W], or each [H, W]; uint8


@dataclass(frozen=True)
class Crop:
    """Square crops of images that are resized by random factors, and mirrored, each with its mask.

    Args:
        size: the side of the crops in pixels.
        resize: the shorter side of an image before the random factor; 0 leaves images as they are.
        scale: the range of that factor.
        mirror: half of the crops are mirrored.

    Where an image is smaller than a crop, it lies at a random place in it; the rest is 0 and `IGNORED`.
    """

    size: int
    resize: int = 0
    scale: tuple[float, float] = (1.0, 1.0)
    mirror: bool = False

    def __call__(
        self,
        images: Images,
        masks: Masks,
        generator: torch.Generator,
        places: list[int] | None = None,
        whole: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Images and masks [B, C, size, size] and [B, size, size]; all randomness is the generator's.

        Where the images are a part of a batch of `whole` images, at these places, it draws for the whole
        batch: they are what they would be in the whole.
        """
        u = torch.rand(whole or len(images), 4, generator=generator)
        if places is not None:
            u = u[places]
        pairs = zip(images, masks, u.tolist(), strict=True)
        return _stacked(self._crop(image, mask, *drawn) for image, mask, drawn in pairs)

    def centres(self, images: Images, masks: Masks) -> tuple[Tensor, Tensor]:
        """The middle of each image, at its mean scale."""
        middle = Crop(self.size, self.resize)
        return _stacked(middle._crop(*pair, 0.0, 0.5, 0.5, 1.0) for pair in zip(images, masks, strict=True))

    def _crop(
        self, image: Tensor, mask: Tensor, zoom: float, down: float, right: float, turn: float
    ) -> tuple[Tensor, Tensor]:
        height, width = mask.shape
        factor = self.scale[0] + zoom * (self.scale[1] - self.scale[0])
        if self.resize:
            factor *= self.resize / min(height, width)
        side = max(1, round(self.size / factor))  # of the crop, in the image as it is
        top, left = _start(height, side, down), _start(width, side, right)
        box = (slice(max(0, top), top + side), slice(max(0, left), left + side))
        image, mask = image[:, box[0], box[1]], mask[box]
        before, above = max(0, -left), max(0, -top)
        margins = (before, side - mask.shape[1] - before, above, side - mask.shape[0] - above)
        if any(margins):
            image, mask = F.pad(image, margins), F.pad(mask, margins, value=IGNORED)
        if side != self.size:
            image = resized(image[None], (self.size, self.size))[0]
            nearest = ((torch.arange(self.size, device=mask.device) + 0.5) * (side / self.size)).long()
            mask = mask[nearest][:, nearest]
        return (image.flip(-1), mask.flip(-1)) if self.mirror and turn < 0.5 else (image, mask)


def _start(length: int, side: int, share: float) -> int:
    """Where a crop begins; before the image, by less than the crop is longer, where it is longer."""
    free = length - side
    return int(share * (free + 1)) if free >= 0 else -int(share * (1 - free))


def _stacked(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, masks = zip(*pairs, strict=True)
    return torch.stack(images), torch.stack(masks)


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, H, W] to another height and width, bilinear, antialiased; the same tensor where they agree."""
    if images.shape[-2:] == torch.Size(size):
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True)
