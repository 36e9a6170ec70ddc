"""What timm has for a recipe: the transform of images, the schedule, the sampler, the average of weights.

Each function raises ImportError, which names the extra, where timm is absent.
"""

import importlib
from typing import Any

import torch
from torch import nn

from .recipe import Recipe


def _timm(module: str) -> Any:
    try:
        return importlib.import_module(f"timm.{module}")
    except ModuleNotFoundError:
        raise ImportError(
            "recipes.with_timm needs timm, which is absent: pip install 'vitdiv-kernels[timm]'"
        ) from None


def transform(recipe: Recipe, training: bool = True) -> Any:
    """`timm.data.create_transform`: from a PIL image to a tensor, normalised and in training augmented."""
    create_transform = _timm("data").create_transform

    options: dict[str, Any] = {"mean": recipe.mean, "std": recipe.std} if recipe.mean else {}
    if not training:
        made = create_transform(
            recipe.image_size, interpolation="bicubic", crop_pct=recipe.test_crop, **options
        )
        return _normalised(made, recipe)
    # timm takes None for its own crops; of these two the largest square in the middle is left
    crop: dict[str, Any] = {"scale": recipe.random_crop}
    if recipe.random_crop is None:
        crop = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    made = create_transform(
        recipe.image_size,
        is_training=True,
        **crop,
        hflip=recipe.hflip,
        color_jitter=recipe.color_jitter,
        auto_augment=recipe.auto_augment,
        interpolation=recipe.interpolation,
        re_prob=recipe.erase_probability,
        re_mode=recipe.erase_mode,
        re_count=recipe.erase_count,
        **options,
    )
    return _normalised(made, recipe)


def _normalised(made: Any, recipe: Recipe) -> Any:
    """Without timm's own normalisation, that of ImageNet, where the recipe has none."""
    if recipe.mean is None:
        made.transforms = [part for part in made.transforms if type(part).__name__ != "Normalize"]
    return made


def schedule(recipe: Recipe, optimizer: torch.optim.Optimizer) -> Any:
    """`timm.scheduler.CosineLRScheduler` of an optimizer that was made with `recipe.learning_rate`.

    Call `step(epoch)` before each of the epochs 0 to `epochs + cooldown_epochs - 1`, which then has one
    learning rate: that is DeepViT's loop. The loops of DeiT and of those who took it over call it after the
    epoch, so that there all but the first have the learning rate of the epoch before. Raises ValueError for a
    recipe in steps.
    """
    if recipe.epochs is None or recipe.warmup_epochs is None:
        raise ValueError(
            "timm's schedule takes a recipe with epochs and warmup_epochs, got one with steps or warmup"
        )
    return _timm("scheduler").CosineLRScheduler(
        optimizer,
        t_initial=recipe.epochs,
        lr_min=recipe.min_lr,
        warmup_t=recipe.warmup_epochs,
        warmup_lr_init=recipe.warmup_lr,
    )


def sampler(recipe: Recipe, images: Any, **processes: Any) -> Any:
    """`timm.data.distributed_sampler.RepeatAugSampler` with the recipe's repeats; None without.

    processes: its num_replicas and rank.
    """
    if recipe.repeats == 1:
        return None
    module = _timm("data.distributed_sampler")
    return module.RepeatAugSampler(images, num_repeats=recipe.repeats, **processes)


def average(recipe: Recipe, model: nn.Module) -> Any:
    """`timm.utils.ModelEmaV3` with the recipe's decay; None without."""
    return _timm("utils").ModelEmaV3(model, decay=recipe.ema) if recipe.ema else None
