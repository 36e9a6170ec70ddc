"""A trainer of a small ViT on random images."""

from dataclasses import replace

import pytest
import torch

from vitdiv_kernels import recipes
from vitdiv_kernels.train.data import Augment, Data, Tensors
from vitdiv_kernels.train.loop import Trainer
from vitdiv_kernels.train.loss_weights import as_recipe
from vitdiv_kernels.vit import ViT


def random_data(config, count=40, augment=None):
    """The same images each time, to train on, to validate and to test."""
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(count, config.channels, config.image_size, config.image_size, generator=generator)
    part = Tensors(images, torch.randint(0, config.classes, (count,), generator=generator))
    augment = augment or Augment(rotation=10, zoom=(0.9, 1.1), shift=0.1, mirror=True)
    return Data(part, part, part, [str(i) for i in range(config.classes)], augment)


def small_recipe(base="plain", /, **keys):
    """A recipe with other values; losses as names and weights, as the command line has them."""
    if "losses" in keys:
        keys["losses"] = as_recipe(keys["losses"])
    return replace(recipes.load(base), **keys)


def small_trainer(config, recipe=None, *, augment=None, **options):
    """Of that shape, with the recipe's steps and batch, or a few, and a row of the log for each step."""
    recipe = small_recipe(**dict(steps=12, batch=8) | (recipe or {}))
    torch.manual_seed(recipe.seed)
    options = dict(log_every=1, eval_every=6) | options
    return Trainer(ViT(config), random_data(config, augment=augment), recipe, **options)


def assert_same_run(rows, weights, other_rows, other_weights, rel=2e-4):
    """Rows of the log and state dicts of two runs are the same within rounding."""
    for row, other in zip(rows, other_rows, strict=True):
        assert list(row) == list(other)
        for name, value in other.items():
            assert row[name] == (value if value == "" else pytest.approx(value, rel=rel)), name
    for (name, value), other in zip(weights.items(), other_weights.values(), strict=True):
        if name.endswith("qkv.bias"):
            continue  # the gradient of keys' biases is rounding noise, which AdamW scales up
        value, other = torch.as_tensor(value), torch.as_tensor(other)
        torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-4, msg=name)
