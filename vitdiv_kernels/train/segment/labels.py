"""What the numbers in annotations mean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .augment import IGNORED

OUT_OF_RANGE = -1

# Cityscapes: the 19 classes that count, by their label ids; the other ids up to 33 do not. Source: Cordts et
# al. 2016 (arXiv 1604.01685), and labels.py of its scripts.
CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car",
    27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip


@dataclass(frozen=True)
class Labels:
    """The classes; the class of each number in an annotation, or `IGNORED`; what is expected, in words."""

    names: Sequence[str]
    numbers: Mapping[int, int]
    expected: str

    def table(self) -> Tensor:
        """[256], int16: a class, `IGNORED`, or `OUT_OF_RANGE`."""
        table = torch.full((256,), OUT_OF_RANGE, dtype=torch.int16)
        for number, label in self.numbers.items():
            table[number] = label
        return table


def counted(names: Sequence[str], ignore_zero: bool) -> Labels:
    """Classes from 0, or from 1 where 0 is ignored; 255 is ignored."""
    first = int(ignore_zero)
    numbers = {first + i: i for i in range(len(names))} | {IGNORED: IGNORED}
    last = first + len(names) - 1
    if ignore_zero:
        return Labels(names, {0: IGNORED} | numbers, f"1 to {last}, or 0 or 255 to ignore a pixel")
    return Labels(
        names, numbers, f"0 to {last}, or 255 to ignore a pixel (with --ignore-zero 1 to {last + 1})"
    )


def cityscapes() -> Labels:
    """By label ids."""
    others = {number: IGNORED for number in (*range(34), IGNORED)}
    classes = {number: i for i, number in enumerate(CITYSCAPES)}
    return Labels(list(CITYSCAPES.values()), others | classes, "label ids from 0 to 33")
