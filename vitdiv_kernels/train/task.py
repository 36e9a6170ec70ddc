"""What is learned: how a batch becomes losses, and what is measured in validation."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attach.objective import DiversityObjective
from ..recipes import Mixed, Recipe, mix
from . import models
from .data import Data, ImageSet, load
from .evaluation import accuracy
from .options import chosen
from .parallel import Processes
from .segment.settings import Dense

Autocast = Callable[[], torch.autocast]


class Classification:
    """Cross-entropy with label smoothing, of images that the recipe mixes, beside its diversity losses."""

    name: ClassVar[str] = "classify"
    default_recipe: ClassVar[str] = "plain"
    default_data: ClassVar[str] = "digits"
    metrics: ClassVar[tuple[str, ...]] = ("val_accuracy",)
    next_step: ClassVar[str | None] = None  # a sentence after a run on the default data

    def __init__(
        self, model: Any, recipe: Recipe, device: torch.device, options: Dense | None = None
    ) -> None:
        if options is not None and options != Dense():
            given = [name for name, value in chosen(options).items() if value != getattr(Dense(), name)]
            options_of = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ValueError(f"{options_of} must be left out: they are of --task segment")
        self.model, self.recipe, self.device = model, recipe, device
        self.objective: DiversityObjective | None = None
        if terms := recipe.terms():
            # for good, and before the model is compiled: forward passes without gradients leave no trace
            self.objective = DiversityObjective(terms).attach(model)
        losses = {term.loss for term in terms.values()}
        self.patches_mix = "patch_mixing" in losses
        self.mixes = bool(recipe.mixup or recipe.cutmix_alpha or recipe.mixes_two_images)
        # refuses patches that are not whole
        self.patch = models.patch_size(model) if self.patches_mix or recipe.mixes_two_images else None

    @staticmethod
    def load(spec: str, config: models.Config, recipe: Recipe, options: Dense) -> Data:
        """`digits` or `imagefolder:PATH`, for the model. Raises DataError."""
        return load(spec, config.image_size, config.channels, recipe.seed, recipe)

    @staticmethod
    def make(config: models.Config, options: Dense) -> nn.Module:
        """The model, for as many classes as the config says. Raises TrainError."""
        return models.make(config)

    def settings(self) -> dict[str, Any]:
        """What a run that goes on must have as it was, beside recipe and model."""
        return {"task": self.name}

    @property
    def terms(self) -> list[str]:
        """The names of the losses beside `loss`, in the order of the log."""
        return ["cross_entropy", *(self.objective.terms if self.objective else ())]

    def augmented(
        self, data: Data, images: Tensor, labels: Tensor, generator: torch.Generator, *places: Any
    ) -> tuple[Tensor, Tensor]:
        """Images and labels; the images are augmented."""
        return data.augment(images, generator, *places), labels

    @staticmethod
    def plain(data: Data, images: Tensor, labels: Tensor) -> Tensor:
        """Images [B, C, S, S] as the model takes them, without augmentation."""
        return images

    def mixed(
        self, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Mixed | None]:
        """The images [B, C, H, W] mixed as the recipe says, with their labels; or the images and None.

        It takes one number of the generator, whatever B is.
        """
        if not self.mixes:
            return images, None
        draws = torch.Generator().manual_seed(int(torch.randint(2**63 - 1, (), generator=generator)))
        classes, grid = self.model.config.classes, self._grid(images)
        batch = mix(self.recipe, images, labels, classes=classes, grid=grid, generator=draws)
        return batch.images, batch

    def losses(
        self,
        forward: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        batch: Mixed | None = None,
        *,
        autocast: Autocast,
    ) -> dict[str, Tensor]:
        """Cross-entropy, each diversity loss unweighted, and `loss`, their weighted sum. A loss that is
        `with_task` changes the weight of the cross-entropy in it.

        Of images that were mixed all labels are those of `batch`.
        """
        mixing = regions = None
        if batch is not None:
            mixing, regions = batch.mixing, batch.regions
        elif self.patches_mix:
            mixing = labels, labels, torch.ones(math.prod(self._grid(images)), device=self.device)
        with autocast():
            logits = forward(images)
        if batch is not None:
            cross_entropy = F.cross_entropy(logits.float(), batch.targets)
        else:
            smoothing = self.recipe.label_smoothing
            cross_entropy = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
        total = cross_entropy
        terms: dict[str, Tensor] = {}
        if self.objective:
            with autocast():
                total, terms = self.objective(task=cross_entropy, mixing=mixing, regions=regions)
        return terms | {"cross_entropy": cross_entropy, "loss": total}

    def evaluate(self, model: nn.Module, data: ImageSet, processes: Processes) -> dict[str, float]:
        """The metrics of a model; all processes must call it."""
        return {self.metrics[0]: accuracy(model, data, self.device, processes=processes)}

    def summary(
        self, model: nn.Module, part: ImageSet, what: str, data: Data, processes: Processes
    ) -> list[str]:
        """Lines for the end of a run."""
        share = accuracy(model, part, self.device, processes=processes)
        return [f"{what} accuracy {100 * share:.2f} % ({len(part)} images)"]

    def _grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches; one for all where no loss and no mixing asks for them."""
        if self.patch is None:
            return 1, 1
        return images.shape[-2] // self.patch[0], images.shape[-1] // self.patch[1]
