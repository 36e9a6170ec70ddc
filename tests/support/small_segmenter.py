"""A trainer that segments small random images, and folders of such images with annotations."""

from functools import partial

import torch
from small_trainer import small_recipe

from vitdiv_kernels.train.data import Data, Tensors
from vitdiv_kernels.train.loop import Trainer
from vitdiv_kernels.train.segment.augment import IGNORED, Crop
from vitdiv_kernels.train.segment.settings import Dense
from vitdiv_kernels.train.segment.task import Segmentation
from vitdiv_kernels.vit import ViTConfig

SMALL = ViTConfig(8, 1, patch=2, overlap=1, dim=16, depth=4, heads=2, mlp_ratio=2.0, classes=3, pos_std=0.2)
CROP = Crop(8, scale=(0.8, 1.25), mirror=True)


def random_masks(config, count=24, size=None):
    """The same images and masks each time; some pixels are ignored."""
    generator = torch.Generator().manual_seed(5)
    size = size or config.image_size
    images = torch.rand(count, config.channels, size, size, generator=generator)
    masks = (images[:, 0] * config.classes).to(torch.uint8)
    masks[torch.rand(masks.shape, generator=generator) < 0.1] = IGNORED
    part = Tensors(images, masks)
    return Data(part, part, part, [str(i) for i in range(config.classes)], CROP)


def small_segmenter(config=SMALL, recipe=None, *, dense=None, size=None, **options):
    """With the recipe's steps and batch, or a few, and a row of the log for each step."""
    recipe = small_recipe("scenes", **dict(steps=6, batch=8, lr=1e-3) | (recipe or {}))
    torch.manual_seed(recipe.seed)
    dense = dense or Dense()
    options = dict(log_every=1, eval_every=3) | options
    model = Segmentation.make(config, dense)
    task = partial(Segmentation, options=dense)
    return Trainer(model, random_masks(config, size=size), recipe, task=task, **options)


def save(path, pixels):
    """Writes [H, W] or [H, W, 3], uint8, as an image."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).save(path)


def write_pairs(images, masks, count=4, labels=(0, 1, 2), shape=(10, 12), suffix=".jpg", first=0):
    """Images and annotations with these labels, in columns."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.tensor(labels, dtype=torch.uint8).repeat(shape[1])[: shape[1]]
    for i in range(first, first + count):
        pixels = torch.randint(0, 256, (*shape, 3), generator=generator, dtype=torch.uint8)
        save(images / f"{i}{suffix}", pixels)
        save(masks / f"{i}.png", columns.expand(shape).contiguous())
