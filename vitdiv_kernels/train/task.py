"""What is learned: how a batch becomes losses, and what is measured in validation."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attach.objective import DiversityObjective
from ..losses import cutmix_shares
from . import cutmix, models
from .data import Data, ImageSet, load
from .evaluation import accuracy
from .loss_weights import mixes, objective_terms
from .options import chosen
from .parallel import Processes
from .recipe import Recipe
from .segment.settings import Dense

Autocast = Callable[[], torch.autocast]


class Classification:
    """Cross-entropy with label smoothing and CutMix, beside the diversity losses of the recipe."""

    name: ClassVar[str] = "classify"
    data: ClassVar[str] = "digits"  # by default
    metrics: ClassVar[tuple[str, ...]] = ("val_accuracy",)
    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, model: nn.Module, recipe: Recipe, device: torch.device, options: Dense | None = None
    ) -> None:
        if options is not None and options != Dense():
            given = [name for name, value in chosen(options).items() if value != getattr(Dense(), name)]
            options_of = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ValueError(f"{options_of} must be left out: they are of --task segment")
        self.model, self.recipe, self.device = model, recipe, device
        self.objective: DiversityObjective | None = None
        if recipe.losses:
            # for good, and before the model is compiled: forward passes without gradients leave no trace
            terms = objective_terms(recipe.losses, recipe.label_smoothing)
            self.objective = DiversityObjective(terms).attach(model)
        self.patches_mix = self.objective is not None and any(map(mixes, self.objective.terms.values()))
        if self.patches_mix:
            models.patch_size(model)  # refuses those that are not whole

    @staticmethod
    def load(spec: str, config: models.Config, seed: int, options: Dense) -> Data:
        """`digits` or `imagefolder:PATH`, for the model. Raises DataError."""
        return load(spec, config.image_size, config.channels, seed)

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

    def mixed(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, cutmix.Box | None]:
        """The images [B, C, H, W] mixed by CutMix, and its box; without CutMix the images and None."""
        if not self.recipe.cutmix:
            return images, None
        height, width = images.shape[-2:]
        box = cutmix.draw_box(height, width, self.recipe.cutmix, generator)
        return cutmix.mix(images, box), box

    def losses(
        self,
        forward: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        box: cutmix.Box | None = None,
        *,
        autocast: Autocast,
    ) -> dict[str, Tensor]:
        """Cross-entropy, each diversity loss unweighted, and `loss`, their weighted sum. A loss that is
        `with_task` changes the weight of the cross-entropy in it.

        Of images that CutMix has mixed at `box` the cross-entropies with the labels of both are weighted by
        their shares of the area.
        """
        size = images.shape[-2:]
        mixing = self._patch_labels(labels, box, size) if self.patches_mix else None
        with autocast():
            logits = forward(images)
        cross_entropy = self._cross_entropy(logits, labels)
        if box:
            share = cutmix.share_left(box, *size)
            others = self._cross_entropy(logits, labels.flip(0))
            cross_entropy = share * cross_entropy + (1 - share) * others
        total = cross_entropy
        terms: dict[str, Tensor] = {}
        if self.objective:
            with autocast():
                total, terms = self.objective(task=cross_entropy, mixing=mixing)
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

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.label_smoothing)

    def _patch_labels(
        self, labels: Tensor, box: cutmix.Box | None, size: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """labels, others and shares for patch_mixing; images that are not mixed have an empty box."""
        patch = models.patch_size(self.model)
        grid = [pixels // side for pixels, side in zip(size, patch, strict=True)]
        shares = cutmix_shares(box or (0, 0, 0, 0), image_size=size, grid=grid)
        return labels, labels.flip(0), shares.to(self.device, non_blocking=True)
