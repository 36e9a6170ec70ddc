"""How to segment: options that are no part of the recipe."""

import argparse
import contextlib
from dataclasses import dataclass

from ..options import number, option

HEADS = ("linear", "upernet")


def scale_range(text: str) -> tuple[float, float]:
    """An argparse type: `LOW-HIGH`, two factors."""
    low, _, high = text.partition("-")
    with contextlib.suppress(ValueError):
        if 0 < float(low) <= float(high) < float("inf"):
            return float(low), float(high)
    raise argparse.ArgumentTypeError(f"must be two factors such as 0.5-2, got {text!r}")


@dataclass(frozen=True)
class Dense:
    """Head, images and windows. A run that goes on must have the same."""

    head: str = option("linear", "linear, or upernet: a pyramid of the tokens of four blocks", choices=HEADS)
    head_width: int | None = option(
        None, "features in the head upernet (default: as many as tokens have)", parse=number(int, 1)
    )
    num_classes: int | None = option(
        None,
        "classes in the annotations of a segfolder (default: those that are named there, else as "
        "many as the annotations have)",
        parse=number(int, 2, 254),
    )
    ignore_zero: bool = option(
        False, "in the annotations 0 is no class and ignored, and the classes count from 1 (ADE20K)"
    )
    resize: int | None = option(
        None,
        "resize images so that their shorter side has so many pixels, 0 to leave them as they are "
        "(default: the model's image size)",
        parse=number(int, 0),
    )
    crop_scale: tuple[float, float] | None = option(
        None,
        "range of the random factor by which images are resized before a crop of the model's size is taken "
        "(default: 0.5-2, of the scenes 0.8-1.25)",
        parse=scale_range,
        metavar="LOW-HIGH",
    )
    window: int | None = option(
        None, "validate in windows of so many pixels (default: the model's image size)", parse=number(int, 1)
    )
    stride: int | None = option(
        None, "pixels from a window to the next (default: two thirds of a window)", parse=number(int, 1)
    )
