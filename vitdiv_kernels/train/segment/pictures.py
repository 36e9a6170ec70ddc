"""Pictures of predictions: image, truth, prediction."""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..files import replacing
from ..plots import pyplot
from .augment import IGNORED

LEGEND = 20  # at most so many classes are named


def palette(classes: int) -> Tensor:
    """[256, 3], uint8: black for class 0, distinct hues for the others, grey for ignored pixels."""
    colours = torch.full((256, 3), 128, dtype=torch.uint8)
    colours[0] = 0
    for i in range(1, classes):
        # neighbours in hue differ in value, too
        colour = colorsys.hsv_to_rgb((i - 1) / (classes - 1), 0.85, (1.0, 0.65)[i % 2])
        colours[i] = torch.tensor([round(255 * part) for part in colour])
    return colours


def pixels(image: Tensor) -> Tensor:
    """[C, H, W] to [H, W, 3] from 0 to 1; all values of the image are shown."""
    low, high = image.min(), image.max()
    shown = (image - low) / (high - low).clamp_min(1e-6)
    return (shown.expand(3, -1, -1) if len(shown) == 1 else shown[:3]).permute(1, 2, 0)


def draw(
    rows: Sequence[tuple[Tensor, ...]], titles: Sequence[str], classes: Sequence[str], title: str, path: Path
) -> None:
    """Writes the PNG: a row for each image [C, H, W] with masks [H, W], under these titles."""
    plt = pyplot("pictures of predictions")
    colours = palette(len(classes))
    width = len(titles)
    figure, axes = plt.subplots(
        len(rows),
        width,
        figsize=(2.4 * width + 1.8, 2.4 * len(rows) + 0.6),
        squeeze=False,
        layout="constrained",
    )
    figure.suptitle(title, fontsize=11)
    for line, (image, *masks) in zip(axes, rows, strict=True):
        for axis, shown in zip(line, [pixels(image), *(colours[mask.long()] for mask in masks)], strict=True):
            axis.imshow(shown.numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[0], titles, strict=True):
        axis.set_title(name)
    if len(classes) <= LEGEND:
        from matplotlib.patches import Patch

        named = {i: name for i, name in enumerate(classes)}
        if any((mask == IGNORED).any() for _, *masks in rows for mask in masks):
            named[IGNORED] = "ignored"
        patches = [
            Patch(facecolor=(colours[i] / 255).tolist(), edgecolor="#888888", label=name)
            for i, name in named.items()
        ]
        figure.legend(handles=patches, loc="outside right upper", frameon=False, fontsize=8)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
