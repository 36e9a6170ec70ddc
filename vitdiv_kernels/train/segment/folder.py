"""Folders of images and annotations: ADE20K's layout, Cityscapes' names, or your own."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..data import Data
from ..errors import DataError
from . import labels, pairs
from .augment import IGNORED, Crop
from .labels import Labels
from .pairs import Pair, PairFiles
from .settings import Dense

SUFFIXES = (".jpg", ".jpeg", ".png")
# names of the parts, as ADE20K has them and as others have
PARTS = {"train": ("training", "train"), "val": ("validation", "val"), "test": ("test",)}
MOST = 254  # classes, beside 255 and an ignored 0
ADE_NAMES = "objectInfo150.txt"
NAMES = "classes.txt"


def load_segfolder(root: Path, image_size: int, channels: int, seed: int, dense: Dense) -> Data:
    """Images and their annotations, PNGs with the number of a class in each pixel.

    - images/{training,validation}/NAME.jpg and annotations/{training,validation}/NAME.png, as ADE20K;
    - images/NAME.jpg and annotations/NAME.png, split 80/10/10 by the seed;
    - leftImg8bit/{train,val}/CITY/NAME_leftImg8bit.png and gtFine/{train,val}/CITY/NAME_gtFine_labelIds.png,
      as Cityscapes, whose 19 classes are taken.

    Images may be .jpg, .jpeg or .png, and the folders be called train and val. Names of classes are in
    classes.txt, a line each, or in ADE20K's objectInfo150.txt; or `num_classes` says how many there are; else
    all annotations are read. All files are opened, but not read. Raises DataError with a sentence.
    """
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"{root} {what}")
    if (root / "leftImg8bit").is_dir():
        if dense.ignore_zero or dense.num_classes:
            raise DataError("Cityscapes has its 19 classes: leave --num-classes and --ignore-zero out")
        found, meaning = _cityscapes(root), labels.cityscapes()
    else:
        found = _parts(root, seed)
        meaning = _labels(root, found, dense)
    for part in found.values():
        pairs.check(part)
    sets = {name: PairFiles(root, part, meaning, channels) for name, part in found.items()}
    resize = image_size if dense.resize is None else dense.resize
    augment: Any = Crop(image_size, resize, dense.crop_scale or (0.5, 2.0), mirror=True)
    parts: list[Any] = [sets["train"], sets["val"], sets.get("test")]
    return Data(parts[0], parts[1], parts[2], meaning.names, augment)


def _parts(root: Path, seed: int) -> dict[str, Sequence[Pair]]:
    images, masks = root / "images", root / "annotations"
    for folder in (images, masks):
        if not folder.is_dir():
            raise DataError(
                f"{root} has no folder {folder.name}: expected images and annotations, as ADE20K has them, "
                "or leftImg8bit and gtFine, as Cityscapes"
            )
    found: dict[str, Sequence[Pair]] = {}
    for part, names in PARTS.items():
        there = [name for name in names if (images / name).is_dir() and (masks / name).is_dir()]
        if there:
            found[part] = _matched(images / there[0], masks / there[0])
    if not found:
        return _split(_matched(images, masks), images, seed)
    absent = [part for part in ("train", "val") if part not in found]
    if absent:
        wanted = " or ".join(PARTS[absent[0]])
        raise DataError(f"{root} has no folder {wanted} in images and annotations, but {', '.join(found)}")
    return found


def _cityscapes(root: Path) -> dict[str, Sequence[Pair]]:
    found: dict[str, Sequence[Pair]] = {}
    for part in ("train", "val"):
        images, masks = root / "leftImg8bit" / part, root / "gtFine" / part
        for folder in (images, masks):
            if not folder.is_dir():
                raise DataError(
                    f"the folder {folder} does not exist: expected Cityscapes' leftImg8bit and gtFine"
                )
        found[part] = _matched(
            images, masks, "*/*_leftImg8bit.png",
            lambda name: name.with_name(name.name.replace("_leftImg8bit.png", "_gtFine_labelIds.png")),
        )  # fmt: skip
    return found


def _matched(
    images: Path,
    masks: Path,
    pattern: str = "*",
    mask_of: Callable[[Path], Path] = lambda name: name.with_suffix(".png"),
) -> list[Pair]:
    """The images in a folder, sorted, each with its annotation."""
    files = sorted(path for path in images.glob(pattern) if path.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"the folder {images} has no image (looked for {pattern} with {', '.join(SUFFIXES)})")
    found = [Pair(path, masks / mask_of(path.relative_to(images))) for path in files]
    missing = [pair for pair in found if not pair.mask.is_file()]
    if missing:
        more = f" ({len(missing)} of {len(found)} images have none)" if len(missing) > 1 else ""
        raise DataError(
            f"the image {missing[0].image} has no annotation: expected the file {missing[0].mask}{more}"
        )
    return found


def _split(found: list[Pair], images: Path, seed: int) -> dict[str, Sequence[Pair]]:
    if len(found) < 3:
        raise DataError(f"the folder {images} has {len(found)} images: give at least three, to split them")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    held = max(1, round(len(found) / 10))
    val, test, train = order[:held], order[held : 2 * held], sorted(order[2 * held :])
    return {name: [found[i] for i in part] for name, part in (("train", train), ("val", val), ("test", test))}


def _labels(root: Path, found: dict[str, Sequence[Pair]], dense: Dense) -> Labels:
    names = _names(root)
    if names and dense.num_classes and len(names) != dense.num_classes:
        raise DataError(
            f"the file of names in {root} has {len(names)} classes, but --num-classes is "
            f"{dense.num_classes}: leave it out, or change the file"
        )
    if dense.num_classes and not names:
        names = [str(i) for i in range(dense.num_classes)]
    if not names:
        every = [pair for part in found.values() for pair in part]
        count = pairs.largest(every, IGNORED) + 1 - int(dense.ignore_zero)
        if count < 2:
            raise DataError(
                f"the annotations of {root} have {max(0, count)} classes: expected at least two, the numbers "
                f"from {int(dense.ignore_zero)} on"
            )
        names = [str(i) for i in range(count)]
    if len(names) > MOST:
        raise DataError(f"{root} has {len(names)} classes: annotations of 8 bits have at most {MOST}")
    return labels.counted(names, dense.ignore_zero)


def _names(root: Path) -> list[str]:
    """Those in a file beside the images; none without one."""
    try:
        if (root / NAMES).is_file():
            lines = (root / NAMES).read_text(encoding="utf-8").splitlines()
            return [line.strip() for line in lines if line.strip()]
        if (root / ADE_NAMES).is_file():
            lines = (root / ADE_NAMES).read_text(encoding="utf-8").splitlines()[1:]
            return [line.split("\t")[-1].partition(",")[0].strip() for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the names of the classes of {root} can't be read: {error}") from None
    return []
