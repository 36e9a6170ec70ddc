"""Prediction for images of any size: windows, whose logits are averaged where they overlap."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .augment import resized

AT_ONCE = 32  # windows in a forward pass


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side; the last one ends with it. A side shorter than a window has one."""
    last = max(0, length - window)
    return [min(i * stride, last) for i in range(math.ceil(last / stride) + 1)]


@dataclass(frozen=True)
class Windows:
    """How a model for images of `size` pixels sees images of any size.

    Args:
        size: the side of the images that the model takes.
        window: the side of a window in pixels of the image, resized to `size` for the model.
        stride: pixels from a window to the next, at most `window`.
        resize: the shorter side of the image before windows are cut; 0 leaves it as it is. The logits are
            resized back.

    Raises ValueError for a stride larger than the window.
    """

    size: int
    window: int
    stride: int
    resize: int = 0

    def __post_init__(self) -> None:
        if self.stride > self.window:
            raise ValueError(
                f"--stride must be at most the window ({self.window}), or pixels are left out, "
                f"got {self.stride}"
            )

    def __call__(self, model: nn.Module, images: Tensor) -> Tensor:
        """Images [B, C, H, W] to logits [B, classes, H, W], float32."""
        height, width = images.shape[-2:]
        factor = self.resize / min(height, width) if self.resize else 1.0
        inner = resized(images, (round(height * factor), round(width * factor)))
        return resized(self._slide(model, inner), (height, width))

    def _slide(self, model: nn.Module, images: Tensor) -> Tensor:
        count, (height, width) = len(images), images.shape[-2:]
        padded = F.pad(images, (0, max(0, self.window - width), 0, max(0, self.window - height)))
        tall, wide = padded.shape[-2:]
        corners = [
            (top, left)
            for top in starts(tall, self.window, self.stride)
            for left in starts(wide, self.window, self.stride)
        ]
        if len(corners) == 1:
            return self._logits(model, padded)[..., :height, :width]
        crops = [padded[..., y : y + self.window, x : x + self.window] for y, x in corners]
        total, times = None, padded.new_zeros(tall, wide)
        group = max(1, AT_ONCE // count)
        for first in range(0, len(corners), group):
            logits = self._logits(model, torch.cat(crops[first : first + group]))
            for (y, x), part in zip(corners[first : first + group], logits.split(count), strict=True):
                if total is None:
                    total = part.new_zeros(count, part.shape[1], tall, wide)
                total[..., y : y + self.window, x : x + self.window] += part
                times[y : y + self.window, x : x + self.window] += 1
        assert total is not None
        return (total / times)[..., :height, :width]

    def _logits(self, model: nn.Module, crops: Tensor) -> Tensor:
        logits = model(resized(crops, (self.size, self.size))).float()
        return resized(logits, (self.window, self.window))
