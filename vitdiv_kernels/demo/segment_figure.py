"""The figure of the demo that segments: curves, IoU of each class, and predictions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..train.files import replacing
from ..train.plots import add_grid, pyplot
from ..train.segment.pictures import palette, pixels
from .figure import STYLE


def draw(
    results: dict[str, dict[str, Any]],
    iou: dict[str, list[float]],
    scenes: Sequence[tuple[Tensor, Tensor]],
    titles: dict[str, str],
    classes: Sequence[str],
    path: Path,
) -> None:
    """Writes the PNG from what `segment.train_model` returned for each model, and images with their masks."""
    plt = pyplot("the demo")
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(13.5, 3.6 + 2.3 * len(scenes)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[3.6, 2.3 * len(scenes)])
    val, cosine, rank, each = upper.subplots(1, 4, width_ratios=[1, 1, 1, 1.4])
    for i, (name, result) in enumerate(results.items()):
        color, dash = STYLE[name]
        line = dict(color=color, linestyle=dash, linewidth=1.8, label=titles[name])
        measured = [row for row in result["rows"] if row["val_miou"] != ""]
        val.plot([r["step"] for r in measured], [100 * r["val_miou"] for r in measured], **line)
        blocks = range(1, 1 + len(result["records"]))
        cosine.plot(blocks, [r["patch_abs_cosine"] for r in result["records"]], **line)
        rank.plot(blocks, [r["effective_rank"] for r in result["records"]], **line)
        places = [x + 0.4 * i - 0.2 for x in range(len(classes))]
        each.bar(places, [100 * value for value in iou[name]], 0.4, color=color)
    val.set(title="validation mean IoU", xlabel="step", ylabel="%")
    cosine.set(title="likeness of patches: mean |cosine|", xlabel="block", ylim=(0, 1))
    rank.set(title="directions that patches span", xlabel="block", ylabel="effective rank")
    rank.set_ylim(bottom=1)
    for axis in (cosine, rank):
        axis.xaxis.get_major_locator().set_params(integer=True)
    each.set(title="IoU of each class, test scenes", xlabel="class", ylabel="%")
    each.set_xticks(range(len(classes)), ["none", *classes[1:]])
    add_grid(val, cosine, rank, each)
    handles, labels = val.get_legend_handles_labels()
    upper.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, handlelength=3)

    colours = palette(len(classes))
    grid = lower.subplots(len(scenes), 2 + len(results), squeeze=False)
    for i, (image, mask) in enumerate(scenes):
        found = [torch.tensor(result["predictions"][i]) for result in results.values()]
        shown = [pixels(image), *(colours[labels.long()] for labels in (mask, *found))]
        for axis, picture in zip(grid[i], shown, strict=True):
            axis.imshow(picture.numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    for axis, title in zip(grid[0], ("test scene", "truth", *titles.values()), strict=True):
        axis.set_title(title)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
