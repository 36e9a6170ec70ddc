"""Images to train on: scikit-learn's handwritten digits, or a folder of the user's own."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..recipes import Recipe
from .augmentation import Transforms, seed_of, seeded, transforms
from .decoding import in_eight_bits
from .errors import DataError
from .parallel import share

Samples = list[tuple[str, int]]  # path and class number
Batch = tuple[Tensor, Tensor]  # [B, C, S, S] and labels [B]
Draw = tuple[int, int]  # the number of an image, and the seed of its augmentation


@dataclass(frozen=True)
class Augment:
    """Random rotation (degrees), zoom (range of factors), shift (share of the image) and mirror image."""

    rotation: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)
    shift: float = 0.0
    mirror: bool = False
    padding: str = "zeros"

    def __call__(
        self,
        images: Tensor,
        generator: torch.Generator,
        places: list[int] | None = None,
        whole: int | None = None,
    ) -> Tensor:
        """images [B, C, S, S] -> the same shape; all randomness comes from the generator, on the CPU.

        Where the images are a part of a batch of `whole` images, at these places, it draws for the whole
        batch: they are what they would be in the whole.
        """
        u = torch.rand(5, whole or images.shape[0], generator=generator)
        if places is not None:
            u = u[:, places]
        angle = (2 * u[0] - 1) * math.radians(self.rotation)
        zoom = self.zoom[0] + u[1] * (self.zoom[1] - self.zoom[0])
        # affine_grid spans [-1, 1], twice the image's width
        dx, dy = (2 * u[2:4] - 1) * 2 * self.shift
        cos, sin = angle.cos() * zoom, angle.sin() * zoom
        flip = 1 - 2 * (u[4] < 0.5).float() if self.mirror else 1.0
        matrix = torch.stack([cos * flip, -sin, dx, sin * flip, cos, dy], -1).view(-1, 2, 3).to(images)
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode=self.padding, align_corners=False)


def unchanged(
    images: Tensor,
    generator: torch.Generator,
    places: list[int] | None = None,
    whole: int | None = None,
) -> Tensor:
    """In place of an `Augment`, of images that were augmented one by one."""
    return images


class Tensors(Dataset[tuple[Tensor, Tensor]]):
    """Images and labels in memory; takes lists of indices at once, so that a batch is one gather."""

    draws = False

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]

    def fingerprint(self) -> str:
        """Tells these images and labels from others."""
        return _fingerprint(len(self), (self.images.numpy(), self.labels.numpy()))


class ImageFiles(Dataset[tuple[Tensor, Tensor]]):
    """Image files (path, label), decoded when asked for; a broken one raises DataError with its name.

    With `own`, the transforms of a recipe, an image is asked for by its number alone, as in a test, or, as
    in training, by its number and a seed: the same pair gives the same image, in any process.
    """

    def __init__(
        self, samples: Samples, image_size: int, channels: int, own: Transforms | None = None
    ) -> None:
        self.samples, self.channels = samples, channels
        self.own, self.draws = own, own is not None
        self.transform = own.test if own else _light(image_size, channels)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int | Draw) -> tuple[Tensor, Tensor]:
        from PIL import Image

        number, seed = index if isinstance(index, tuple) else (index, None)
        path, label = self.samples[number]
        try:
            with Image.open(path) as image:
                decoded = in_eight_bits(image, self.channels)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"the image file {path} can't be read ({error}): repair or remove it") from None
        return self._transformed(decoded, seed), torch.tensor(label)

    def _transformed(self, image: Any, seed: int | None) -> Tensor:
        if self.own is None or seed is None:
            return self.transform(image)
        with seeded(seed):
            return self.own.train(image)

    def __getitems__(self, indices: Sequence[int | Draw]) -> tuple[Tensor, Tensor]:
        images, labels = zip(*(self[i] for i in indices), strict=True)
        return torch.stack(images), torch.stack(labels)

    def fingerprint(self) -> str:
        """Tells these files, by class folder and name, and their labels from others; they are not read."""
        names = (f"{Path(path).parent.name}/{Path(path).name} {label}\n" for path, label in self.samples)
        return _fingerprint(len(self), (name.encode() for name in names))


def _light(image_size: int, channels: int) -> Callable[[Any], Tensor]:
    """The square in the middle, with values from -1 to 1."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.Resize(image_size),
            transforms.CenterCrop(image_size),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * channels, [0.5] * channels),
        ]
    )


ImageSet = Tensors | ImageFiles


def _fingerprint(count: int, parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return f"{count} ({digest.hexdigest()[:12]})"


@dataclass(frozen=True)
class Data:
    """Data sets of (image [C, S, S] float32, class number), class names, and the fitting augmentation."""

    train: ImageSet
    val: ImageSet
    test: ImageSet | None
    classes: Sequence[str]
    augment: Callable[..., Tensor]

    def fingerprint(self) -> dict[str, str]:
        """Number and hash of the images of each part."""
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {name: part.fingerprint() for name, part in parts.items() if part is not None}


def load(spec: str, image_size: int, channels: int, seed: int = 0, recipe: Recipe | None = None) -> Data:
    """`digits` or `imagefolder:PATH` as images [channels, image_size, image_size]. Raises DataError.

    Images of a folder are augmented as the recipe says; without one lightly.
    """
    kind, _, path = spec.partition(":")
    if spec == "digits":
        if (channels, image_size) != (1, 8):
            raise DataError(
                f"the digits are 1x8x8 images but the model takes {channels}x{image_size}x{image_size}: "
                "use other data, --data imagefolder:PATH, or a model for digits, such as digits24"
            )
        return load_digits()
    if kind == "imagefolder" and path:
        return load_imagefolder(Path(path), image_size, channels, seed, recipe)
    other = " (scenes and segfolder:PATH are for --task segment)" if kind in ("scenes", "segfolder") else ""
    raise DataError(f"unknown data {spec!r}: give digits or imagefolder:PATH{other}")


def load_digits() -> Data:
    """The 1,797 digits of scikit-learn: 1,149 to train on, 288 to choose by, 360 to report.

    The split is always the same, with each class in proportion.
    """
    try:
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise DataError(
            "the digits come with scikit-learn, which is absent: pip install 'vitdiv-kernels[demo]'"
        ) from None

    digits = datasets.load_digits()
    rest, test = train_test_split(range(1797), test_size=360, stratify=digits.target, random_state=0)
    train, val = train_test_split(rest, test_size=288, stratify=digits.target[rest], random_state=0)
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    parts = [Tensors(images[part], labels[part]) for part in (train, val, test)]
    augment = Augment(rotation=10, zoom=(0.9, 1.1), shift=1 / 8)
    return Data(parts[0], parts[1], parts[2], [str(i) for i in range(10)], augment)


def load_imagefolder(
    root: Path, image_size: int, channels: int, seed: int = 0, recipe: Recipe | None = None
) -> Data:
    """PATH/CLASS/IMAGE, split 80/10/10 by the seed; or PATH/{train,val,test}/CLASS/IMAGE.

    `test` may be absent; without `val` a tenth of `train` is held out. Images are resized to cover the square
    and cropped at its centre, or what the recipe says.
    """
    if not root.is_dir():
        raise DataError(
            f"the image folder {root} does not exist" if not root.exists() else f"{root} is not a folder"
        )
    try:
        import torchvision  # noqa: F401
    except ImportError:
        raise DataError(
            "image folders need torchvision, which is absent: pip install 'vitdiv-kernels[imagefolder]'"
        ) from None
    except RuntimeError as error:
        raise DataError(
            f"torchvision does not load ({error}): install the one made for torch {torch.__version__}"
        ) from None

    if (root / "train").is_dir():
        classes, train = _scan(root / "train")
        given = {name: _scan(root / name) for name in ("val", "test") if (root / name).is_dir()}
        for name, (names, _) in given.items():
            if names != classes:
                odd = sorted(set(names) ^ set(classes))
                raise DataError(
                    f"{root}: train and {name} must have the same classes, but differ in {', '.join(odd)}"
                )
        if "val" in given:
            val = given["val"][1]
        else:
            train, val = _hold_out(train, 0.1, seed)
        test = given["test"][1] if "test" in given else None
    else:
        classes, samples = _scan(root)
        train, test = _hold_out(samples, 0.1, seed)
        train, val = _hold_out(train, 1 / 9, seed)
    own = transforms(recipe, image_size, channels) if recipe else None
    parts = [ImageFiles(part, image_size, channels, own) for part in (train, val, test or [])]
    light = Augment(zoom=(0.6, 1.0), shift=0.1, mirror=True, padding="reflection")
    augment = unchanged if own else light
    return Data(parts[0], parts[1], parts[2] if test else None, classes, augment)


def _scan(root: Path) -> tuple[list[str], Samples]:
    """The class names under root and its (file, label) pairs, in sorted order."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(folders) < 2:
        raise DataError(
            f"{root} must have one sub-folder for each class, at least two, but has {len(folders)}"
        )
    samples = []
    for label, folder in enumerate(folders):
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file())
        if not files:
            raise DataError(
                f"the class folder {folder} has no image (looked for {', '.join(IMG_EXTENSIONS)})"
            )
        samples += [(str(p), label) for p in files]
    return [p.name for p in folders], samples


def _hold_out(samples: Samples, share: float, seed: int) -> tuple[Samples, Samples]:
    """Moves the share of each class, at least one image, from samples to a second list, by the seed."""
    generator = torch.Generator().manual_seed(seed)
    kept, held = [], []
    for label in sorted({label for _, label in samples}):
        mine = [s for s in samples if s[1] == label]
        if len(mine) < 2:
            raise DataError(
                f"the class of {mine[0][0]} has too few images to split: give at least three in each class"
            )
        order = torch.randperm(len(mine), generator=generator).tolist()
        count = max(1, round(share * len(mine)))
        held += [mine[i] for i in order[:count]]
        kept += [mine[i] for i in order[count:]]
    return kept, held


class StepBatches:
    """The index lists of steps start..stop: for each epoch a permutation, or what `order` gives for it.

    It depends on the seed and the epoch alone, so a run can start at any step.
    """

    def __init__(
        self,
        size: int,
        batch: int,
        seed: int,
        start: int,
        stop: int,
        order: Callable[[int], list[int]] | None = None,
    ) -> None:
        self.size, self.batch, self.seed, self.start, self.stop = size, batch, seed, start, stop
        self.per_epoch = size // batch
        self.order = order or self._permutation

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        order_of = None
        for step in range(self.start, self.stop):
            epoch, i = divmod(step, self.per_epoch)
            if epoch != order_of:
                order, order_of = self.order(epoch), epoch
            yield order[i * self.batch : (i + 1) * self.batch]

    def _permutation(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.size, generator=generator).tolist()


class Shares:
    """What one process of several takes of each of these batches; with `draws` each image with a seed."""

    def __init__(self, steps: StepBatches, rank: int, size: int, draws: bool = False) -> None:
        self.steps, self.draws = steps, draws
        self.places = share(steps.batch, rank, size)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[Any]]:
        for step, indices in enumerate(self.steps, self.steps.start):
            mine = [indices[place] for place in self.places]
            if self.draws:
                seeds = (seed_of(self.steps.seed, step, place) for place in self.places)
                yield list(zip(mine, seeds, strict=True))
            else:
                yield mine


def batches_of(
    data: ImageSet, steps: StepBatches | Shares, workers: int = 0, pin_memory: bool = False
) -> Iterator[Batch]:
    """The batches of those steps, read by `workers` processes; an error in one is its sentence here, too."""
    # A generator of its own: a loader without one takes a number from the global state at each start, and
    # resuming is a start.
    loader = DataLoader(
        data, batch_sampler=steps, collate_fn=_as_it_is, num_workers=workers, pin_memory=pin_memory,
        generator=torch.Generator(),
    )  # fmt: skip
    try:
        yield from loader
    except DataError as error:
        # the loader raises it again with the whole traceback of the worker as its message
        name = f"{DataError.__module__}.{DataError.__qualname__}: "
        raise DataError(str(error).rpartition(name)[2].strip()) from None


def _as_it_is(batch: Any) -> Any:
    return batch
