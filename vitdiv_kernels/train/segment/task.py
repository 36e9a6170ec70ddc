"""Segmentation as a task of the trainer."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attach.objective import DiversityObjective
from ...attach.terms import LOSSES
from ...recipes import Recipe
from ..data import Data
from ..errors import DataError
from ..models import Config
from ..parallel import Processes
from . import measures
from .augment import IGNORED, Ragged
from .folder import load_segfolder
from .model import Segmenter
from .scenes import load_scenes
from .settings import Dense
from .windows import Windows

CHUNK = 32  # images that are read at once in validation


class Segmentation:
    """Cross-entropy of pixels with label smoothing, beside the diversity losses of the recipe.

    The cross-entropy is a mean over all pixels, to which ignored ones add nothing: shares of a batch then
    weigh the same, in one process and in several.

    Raises ValueError for losses that need labels of whole images, and for recipes that mix images or have
    timm's augmentation.
    """

    name: ClassVar[str] = "segment"
    default_recipe: ClassVar[str] = "scenes"
    default_data: ClassVar[str] = "scenes"
    metrics: ClassVar[tuple[str, ...]] = ("val_miou", "val_pixel_accuracy")
    next_step: ClassVar[str | None] = "python -m vitdiv_kernels.demo segment compares plain and diversified"

    def __init__(
        self, model: nn.Module, recipe: Recipe, device: torch.device, options: Dense | None = None
    ) -> None:
        self.model, self.recipe, self.device, self.options = model, recipe, device, options or Dense()
        config: Any = model.config
        size = config.image_size
        window = self.options.window or size
        self.windows = Windows(
            size, window, self.options.stride or max(1, 2 * window // 3), _resize(self.options, size)
        )
        self.classes: int = config.classes
        self.objective: DiversityObjective | None = None
        terms = recipe.terms()
        for name, term in terms.items():
            if LOSSES[term.loss].kind in ("logits", "regions"):
                raise ValueError(
                    f"the loss {name} ({term.loss}) labels the patches of whole images: --task segment takes "
                    "losses without labels, such as cosine=1,contrast=1"
                )
        if recipe.mixup or recipe.cutmix_alpha or recipe.mixes_two_images:
            raise ValueError(
                "mixup, cutmix and two_image_mixing must be off for --task segment: masks are not mixed"
            )
        if recipe.augmentation != "light":
            raise ValueError(
                "augmentation must be 'light' for --task segment, which crops images with their masks, got "
                f"{recipe.augmentation!r}: give --set augmentation=light"
            )
        if terms:
            self.objective = DiversityObjective(terms).attach(model)

    @staticmethod
    def load(spec: str, config: Config, recipe: Recipe, options: Dense) -> Data:
        """`scenes` or `segfolder:PATH`, for the model. Raises DataError."""
        kind, _, path = spec.partition(":")
        if spec == "scenes":
            if options.num_classes or options.ignore_zero:
                raise DataError("--num-classes and --ignore-zero are for a segfolder: leave them out")
            return load_scenes(config.image_size, config.channels, options)
        if kind == "segfolder" and path:
            return load_segfolder(Path(path), config.image_size, config.channels, recipe.seed, options)
        raise DataError(f"unknown data {spec!r} to segment: give scenes or segfolder:PATH")

    @staticmethod
    def make(config: Config, options: Dense) -> nn.Module:
        """The model, for as many classes as the config says. Raises TrainError."""
        return Segmenter(config, options.head, options.head_width)

    @property
    def terms(self) -> list[str]:
        """The names of the losses beside `loss`, in the order of the log."""
        return ["cross_entropy", *(self.objective.terms if self.objective else ())]

    def settings(self) -> dict[str, Any]:
        """What a run that goes on must have as it was, beside recipe and model."""
        return {"task": self.name, **asdict(self.options)}

    def augmented(
        self, data: Data, images: Any, labels: Any, generator: torch.Generator, *places: Any
    ) -> tuple[Tensor, Tensor]:
        """Crops of images and masks."""
        crop: Any = data.augment
        return crop(images, labels, generator, *places)

    @staticmethod
    def plain(data: Data, images: Any, labels: Any) -> Tensor:
        """Images [B, C, S, S] as the model takes them, without augmentation."""
        crop: Any = data.augment
        return crop.centres(images, labels)[0]

    def mixed(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, None]:
        """The images as they are."""
        return images, None

    def losses(
        self,
        forward: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        batch: None = None,
        *,
        autocast: Callable[[], torch.autocast],
    ) -> dict[str, Tensor]:
        """Cross-entropy, each diversity loss unweighted, and `loss`, their weighted sum."""
        with autocast():
            logits = forward(images)
        cross_entropy = (
            F.cross_entropy(
                logits.float(),
                labels.long(),
                ignore_index=IGNORED,
                label_smoothing=self.recipe.label_smoothing,
                reduction="sum",
            )
            / labels.numel()
        )
        total = cross_entropy
        terms: dict[str, Tensor] = {}
        if self.objective:
            with autocast():
                total, terms = self.objective(task=cross_entropy)
        return terms | {"cross_entropy": cross_entropy, "loss": total}

    @torch.no_grad()
    def confusion(self, model: nn.Module, data: Any, processes: Processes) -> Tensor:
        """The confusion matrix of all pixels [classes, classes], int64; all processes must call it.

        The model is in evaluation mode for it, and then in its own again.
        """
        was_training = model.training
        model.eval()
        # sharded weights are gathered by all in each forward pass, and images differ in how many they need
        sharded = hasattr(model, "set_requires_gradient_sync")
        rank, size = (0, 1) if sharded else (processes.rank, processes.size)
        counts = torch.zeros(self.classes, self.classes, dtype=torch.int64, device=self.device)
        for start in range(CHUNK * rank, len(data), CHUNK * size):
            images, masks = data.__getitems__(list(range(start, min(start + CHUNK, len(data)))))
            for image, mask in zip(*_groups(images, masks), strict=True):
                found = self.windows(model, image.to(self.device)).argmax(1)
                counts += measures.confusion(mask.to(self.device), found, self.classes)
        model.train(was_training)
        whole = counts.cpu()
        return whole if sharded else sum(processes.gather(whole), torch.zeros_like(whole))

    def evaluate(self, model: nn.Module, data: Any, processes: Processes) -> dict[str, float]:
        """Mean IoU and pixel accuracy of a model; all processes must call it."""
        counts = self.confusion(model, data, processes)
        values = measures.mean_iou(counts), measures.pixel_accuracy(counts)
        return dict(zip(self.metrics, values, strict=True))

    def summary(self, model: nn.Module, part: Any, what: str, data: Data, processes: Processes) -> list[str]:
        """Lines for the end of a run: mean IoU and pixel accuracy, and the IoU of each class."""
        counts = self.confusion(model, part, processes)
        accuracy = 100 * measures.pixel_accuracy(counts)
        lines = [
            f"{what} mean IoU {100 * measures.mean_iou(counts):.2f} %, pixel accuracy {accuracy:.2f} % "
            f"({len(part)} images)"
        ]
        for name, value in zip(data.classes, measures.iou(counts).tolist(), strict=True):
            lines.append(f"  {name:24s} IoU " + (f"{100 * value:6.2f} %" if value == value else "   none"))
        return lines

    @torch.no_grad()
    def predictions(self, model: nn.Module, data: Any, count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of the first images: the image [C, H, W], its mask and the prediction [H, W], on the CPU."""
        was_training = model.training
        model.eval()
        images, masks = data.__getitems__(list(range(min(count, len(data)))))
        found = []
        for image, mask in zip(images, masks, strict=True):
            logits = self.windows(model, image[None].to(self.device))
            found.append((image, mask, logits[0].argmax(0).to("cpu", torch.uint8)))
        model.train(was_training)
        return found


def _resize(options: Dense, image_size: int) -> int:
    return image_size if options.resize is None else options.resize


def _groups(images: Any, masks: Any) -> tuple[Any, Any]:
    """As they are in one batch, or one by one."""
    if isinstance(images, Ragged):
        return [image[None] for image in images], [mask[None] for mask in masks]
    return [images], [masks]
