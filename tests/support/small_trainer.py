"""A trainer of a small ViT on random images."""

import torch

from vitdiv_kernels.train.data import Augment, Data, Tensors
from vitdiv_kernels.train.loop import Trainer
from vitdiv_kernels.train.recipe import Recipe
from vitdiv_kernels.vit import ViT


def random_data(config, count=40, augment=None):
    """The same images each time, to train on, to validate and to test."""
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(count, config.channels, config.image_size, config.image_size, generator=generator)
    part = Tensors(images, torch.randint(0, config.classes, (count,), generator=generator))
    augment = augment or Augment(rotation=10, zoom=(0.9, 1.1), shift=0.1, mirror=True)
    return Data(part, part, part, [str(i) for i in range(config.classes)], augment)


def small_trainer(config, recipe=None, *, augment=None, **options):
    """Of that shape, with the recipe's steps and batch, or a few, and a row of the log for each step."""
    recipe = Recipe(**dict(steps=12, batch=8) | (recipe or {}))
    torch.manual_seed(recipe.seed)
    options = dict(log_every=1, eval_every=6) | options
    return Trainer(ViT(config), random_data(config, augment=augment), recipe, **options)
