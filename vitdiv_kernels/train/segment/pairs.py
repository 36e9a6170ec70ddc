"""Images and annotations in files."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..decoding import has_sixteen_bits, in_eight_bits
from ..errors import DataError
from ..logs import progress
from ..optional import needed
from ..parallel import current
from .augment import Ragged
from .labels import OUT_OF_RANGE, Labels

ONE_CHANNEL = ("L", "P")  # of PIL: grey, or numbers in a palette, 8 bits each
ORIENTATION = 0x0112  # the tag of EXIF; from 5 on rows become columns
MANY = 1000  # files, from which on a bar is shown


@dataclass(frozen=True)
class Pair:
    image: Path
    mask: Path


@contextlib.contextmanager
def opened(path: Path, kind: str) -> Iterator[Any]:
    """The file as an image of PIL. Raises DataError for one that can't be read, also later, while it is."""
    pil = needed("PIL.Image", "--data segfolder:PATH", "imagefolder")
    try:
        with pil.open(path) as image:
            yield image
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, pil.DecompressionBombError) as error:
        raise DataError(f"the {kind} file {path} can't be read ({error}): repair or remove it") from None


def channels_last(image: Any, channels: int) -> Tensor:
    """The bytes of an image of PIL, [H, W, channels]."""
    width, height = image.size
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, channels)


def numbers_of(path: Path) -> Tensor:
    """The numbers in an annotation, [H, W], uint8. Raises DataError."""
    with opened(path, "annotation") as image:
        check_mode(path, image)
        return channels_last(image, 1)[..., 0]


def check_mode(path: Path, image: Any) -> None:
    if image.mode not in ONE_CHANNEL:
        raise DataError(
            f"the annotation {path} is of mode {image.mode} (Pillow's name): expected 8 bits and one channel "
            "or a palette, the number of a class in each pixel"
        )


def turned(image: Any) -> bool:
    """Whether EXIF says to turn or mirror the image of PIL: viewers do, and so do tools that annotate."""
    # getexif alone would decode a PNG
    return "exif" in image.info and image.getexif().get(ORIENTATION, 1) != 1


def upright(image: Any) -> Any:
    """The image of PIL, turned as its EXIF says."""
    if not turned(image):
        return image
    return needed("PIL.ImageOps", "--data segfolder:PATH", "imagefolder").exif_transpose(image)


def _size(image: Any) -> tuple[int, int]:
    """Width and height of the image of PIL when it is upright; reads no pixels."""
    width, height = image.size
    return (height, width) if turned(image) and image.getexif()[ORIENTATION] >= 5 else (width, height)


def check(pairs: Sequence[Pair]) -> Tensor:
    """Opens all images and reads all annotations: how many pixels have each number, [pairs, 256].

    Raises DataError for a pair of different sizes, an image of more than 16 bits, an annotation that has not
    one channel of 8 bits, and what can't be read.
    """
    found = []
    with bar("files", len(pairs)) as move, ThreadPoolExecutor() as pool:  # PIL decodes without Python's lock
        for done, counts in enumerate(pool.map(_checked, pairs), 1):
            found.append(counts)
            move(done)
    return torch.stack(found)


def _checked(pair: Pair) -> Tensor:
    with opened(pair.image, "image") as image, opened(pair.mask, "annotation") as mask:
        has_sixteen_bits(image)
        check_mode(pair.mask, mask)
        expected = _size(image)
        if mask.size != expected:
            how = " when turned as its EXIF says" if turned(image) else ""
            raise DataError(
                f"the annotation {pair.mask} has {mask.size[0]} x {mask.size[1]} pixels: expected "
                f"{expected[0]} x {expected[1]}, as its image {pair.image} has{how}"
            )
    with opened(pair.mask, "annotation") as mask:
        return torch.tensor(mask.histogram(), dtype=torch.int32)


def bar(label: str, total: int) -> contextlib.AbstractContextManager[Any]:
    """A progress bar, for many files and in the first process."""
    if total < MANY or not current().main:
        return contextlib.nullcontext(lambda done: None)
    return progress(label, total)


class PairFiles(Dataset[tuple[Tensor, Tensor]]):
    """Image files with their annotations, decoded when asked for: [C, H, W] float32 from -1 to 1, and classes
    or 255 [H, W] uint8.

    A broken file and a number that is no class raise DataError with its name.
    """

    draws = False  # crops are drawn for whole batches

    def __init__(self, root: Path, pairs: Sequence[Pair], labels: Labels, channels: int) -> None:
        self.root, self.pairs, self.labels = root, pairs, labels
        self.table, self.channels = labels.table(), channels

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self.pairs[index]
        with opened(pair.image, "image") as image:
            pixels = channels_last(in_eight_bits(upright(image), self.channels), self.channels)
        mask = self.classes_of(pair.mask)
        if mask.shape != pixels.shape[:2]:
            raise DataError(f"{pair.image} or {pair.mask} was changed while the run reads them")
        return pixels.permute(2, 0, 1).float() / 127.5 - 1, mask

    def __getitems__(self, indices: list[int]) -> tuple[Ragged, Ragged]:
        images, masks = zip(*(self[i] for i in indices), strict=True)
        return Ragged(images), Ragged(masks)

    def classes_of(self, path: Path) -> Tensor:
        """[H, W], uint8. Raises DataError for a number that is no class."""
        numbers = numbers_of(path)
        classes = self.table[numbers.long()]
        wrong = classes == OUT_OF_RANGE
        if wrong.any():
            found = numbers[wrong].unique().tolist()
            row, column = wrong.nonzero()[0].tolist()
            raise DataError(
                f"the annotation {path} has the label {', '.join(map(str, found[:5]))}"
                f"{' and others' if len(found) > 5 else ''} ({int(wrong.sum())} pixels, the first at row "
                f"{row}, column {column}): expected {self.labels.expected}"
            )
        return classes.to(torch.uint8)

    def fingerprint(self) -> str:
        """Tells these files, by their names, and the meaning of labels from others; they are not read."""
        digest = hashlib.sha256(repr(sorted(self.labels.numbers.items())).encode())
        for pair in self.pairs:
            names = [path.relative_to(self.root).as_posix() for path in (pair.image, pair.mask)]
            digest.update(f"{' '.join(names)}\n".encode())
        return f"{len(self)} ({digest.hexdigest()[:12]})"
