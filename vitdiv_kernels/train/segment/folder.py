"""Folders of images and annotations: ADE20K's layout, Cityscapes' names, or your own."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import Data
from ..errors import DataError
from ..parallel import current
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
    the annotations do. All images are opened, all annotations read. Raises DataError with a sentence, and
    warns of classes that have no pixel to train on.
    """
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"{root} {what}")
    if (root / "leftImg8bit").is_dir():
        if dense.ignore_zero or dense.num_classes:
            raise DataError("Cityscapes has its 19 classes: leave --num-classes and --ignore-zero out")
        found, meaning = _cityscapes(root), labels.cityscapes()
        counts = {name: pairs.check(part) for name, part in found.items()}
    else:
        found = _parts(root, seed)
        names = _names(root)  # before the annotations, which take longer
        counts = {name: pairs.check(part) for name, part in found.items()}
        meaning = _labels(root, names, counts, dense)
    sets = {name: PairFiles(root, part, meaning, channels) for name, part in found.items()}
    for name, part in sets.items():
        _check_labels(part, counts[name])
    _warn_of_absent(root, meaning, counts["train"])
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
        there = [folder / name for folder in (images, masks) for name in names if (folder / name).is_dir()]
        of_images, of_masks = ([path for path in there if path.parent == each] for each in (images, masks))
        if of_images and of_masks:
            found[part] = _matched(of_images[0], of_masks[0])
    known = [name for part in ("train", "val") for name in PARTS[part]]
    if not found and not any((images / name).is_dir() for name in known):
        return _split(_matched(images, masks), images, seed)
    absent = [part for part in ("train", "val") if part not in found]
    if absent:
        wanted, others = " or ".join(PARTS[absent[0]]), ", ".join(found) or "none"
        raise DataError(f"{root} has no folder {wanted} in images and annotations, but {others}")
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
    every = (path for path in images.glob(pattern) if path.suffix.lower() in SUFFIXES)
    files = sorted(path for path in every if not path.name.startswith("."))
    if not files:
        raise DataError(f"the folder {images} has no image (looked for {pattern} with {', '.join(SUFFIXES)})")
    found = [Pair(path, _in_any_case(masks / mask_of(path.relative_to(images)))) for path in files]
    missing = [pair for pair in found if not pair.mask.is_file()]
    if missing:
        more = f" ({len(missing)} of {len(found)} images have none)" if len(missing) > 1 else ""
        raise DataError(
            f"the image {missing[0].image} has no annotation: expected the file {missing[0].mask}{more}"
        )
    return found


def _in_any_case(path: Path) -> Path:
    """The file, or the same with its suffix in capitals, where only that is there."""
    capitals = path.with_suffix(path.suffix.upper())
    return capitals if not path.is_file() and capitals.is_file() else path


def _split(found: list[Pair], images: Path, seed: int) -> dict[str, Sequence[Pair]]:
    if len(found) < 3:
        raise DataError(f"the folder {images} has {len(found)} images: give at least three, to split them")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    held = max(1, round(len(found) / 10))
    val, test, train = order[:held], order[held : 2 * held], sorted(order[2 * held :])
    return {name: [found[i] for i in part] for name, part in (("train", train), ("val", val), ("test", test))}


def _labels(root: Path, names: list[str], counts: dict[str, Tensor], dense: Dense) -> Labels:
    if names and dense.num_classes and len(names) != dense.num_classes:
        raise DataError(
            f"the file of names in {root} has {len(names)} classes, but --num-classes is "
            f"{dense.num_classes}: leave it out, or change the file"
        )
    if dense.num_classes and not names:
        names = [str(i) for i in range(dense.num_classes)]
    if not names:
        found = torch.cat([*counts.values()]).sum(0)
        numbers = found[:IGNORED].nonzero().flatten().tolist()
        count = max(numbers, default=-1) + 1 - int(dense.ignore_zero)
        if count < 2:
            there = ", ".join(map(str, numbers)) or "none"
            raise DataError(
                f"the numbers in the annotations of {root} are {there} (255 is ignored): expected at least "
                f"two classes, from {int(dense.ignore_zero)} on"
            )
        names = [str(i) for i in range(count)]
    if len(names) > MOST:
        raise DataError(f"{root} has {len(names)} classes: annotations of 8 bits have at most {MOST}")
    return labels.counted(names, dense.ignore_zero)


def _check_labels(part: PairFiles, counts: Tensor) -> None:
    """Raises DataError for a number that is no class, and where no pixel has one. counts: [pairs, 256]."""
    wrong = counts[:, part.table == labels.OUT_OF_RANGE].any(1)
    if wrong.any():
        part.classes_of(part.pairs[int(wrong.nonzero()[0])].mask)
    known = (part.table != labels.OUT_OF_RANGE) & (part.table != IGNORED)
    if not counts[:, known].any():
        raise DataError(
            f"no pixel has a class in the {len(part)} annotations such as {part.pairs[0].mask}: all are "
            f"ignored; expected {part.labels.expected}"
        )


def _warn_of_absent(root: Path, meaning: Labels, counts: Tensor) -> None:
    seen = {int(meaning.table()[number]) for number in counts.sum(0).nonzero().flatten().tolist()}
    absent = [name for i, name in enumerate(meaning.names) if i not in seen]
    if absent and current().main:
        more = ", ..." if len(absent) > 10 else ""
        warnings.warn(
            f"{root}: of {len(meaning.names)} classes {len(absent)} have no pixel to train on: "
            f"{', '.join(absent[:10])}{more}",
            stacklevel=2,
        )


def _names(root: Path) -> list[str]:
    """Those in a file beside the images; none without one."""
    try:
        if (root / NAMES).is_file():
            lines = (root / NAMES).read_text(encoding="utf-8-sig").splitlines()
            return [line.strip() for line in lines if line.strip()]
        if (root / ADE_NAMES).is_file():
            lines = (root / ADE_NAMES).read_text(encoding="utf-8-sig").splitlines()[1:]
            return [line.split("\t")[-1].partition(",")[0].strip() for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the names of the classes of {root} can't be read: {error}") from None
    return []
