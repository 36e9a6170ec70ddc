"""How long a recipe trains on so many images, and the learning rate of each step."""

import math
from dataclasses import dataclass

from .recipe import Recipe


@dataclass(frozen=True)
class Schedule:
    """The steps of a recipe.

    Args:
        recipe: what to train by.
        images: how many there are to train on; at least a batch.

    A recipe with epochs and warmup_epochs has one learning rate for each epoch, as the released loops have:
    those of timm's CosineLRScheduler. With lr_delay an epoch takes that of an earlier one, in the first
    epochs that of the first. Any other recipe has a learning rate for each step.

    Example:
        >>> from vitdiv_kernels import recipes
        >>> schedule = recipes.Schedule(recipes.load("deepvit_32b"), images=1_281_167)
        >>> schedule.per_epoch, schedule.steps, schedule.learning_rate(5 * 5004)
        (5004, 1551240, 0.00049966107...)
    """

    recipe: Recipe
    images: int

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch: whole batches."""
        return max(1, self.images // self.recipe.batch)

    @property
    def steps(self) -> int:
        """All of them, with those at the end that keep min_lr."""
        return self._falling + self.recipe.cooldown_epochs * self.per_epoch

    @property
    def by_epoch(self) -> bool:
        """Whether an epoch has one learning rate."""
        return self.recipe.epochs is not None and self.recipe.warmup_epochs is not None

    @property
    def _falling(self) -> int:
        """Steps of warm-up and cosine."""
        return self.recipe.steps or (self.recipe.epochs or 1) * self.per_epoch

    def learning_rate(self, step: int) -> float:
        """Of a step, counted from 0: a linear rise, half a cosine, and then min_lr."""
        recipe, top = self.recipe, self.recipe.learning_rate
        if self.by_epoch:
            # as in timm, the cosine begins with the first epoch of all, whose start the warm-up takes
            now, warm = max(0, step // self.per_epoch - recipe.lr_delay), recipe.warmup_epochs or 0.0
            if now < warm:
                return recipe.warmup_lr + now * (top - recipe.warmup_lr) / warm
            done = now / (recipe.epochs or 1)
        else:
            end, share = self._falling, recipe.warmup or 0.0
            rising = share * end if recipe.warmup_epochs is None else recipe.warmup_epochs * self.per_epoch
            warm = max(1, int(rising))
            if step < warm:
                return recipe.warmup_lr + (top - recipe.warmup_lr) * (step + 1) / warm
            done = (step - warm) / max(1, end - warm)
        height = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        if recipe.min_lr is None:
            return top * (0.01 + 0.99 * height)
        return recipe.min_lr + (top - recipe.min_lr) * height
