"""timm's transforms and its repeated augmentation, as a recipe says, such that runs repeat exactly."""

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..recipes import Recipe, with_timm
from .errors import TrainError
from .optional import needed

NAME = "the recipe's augmentation"


@dataclass(frozen=True)
class Transforms:
    """From PIL images to tensors [C, S, S]: in training, which is random, and else."""

    train: Callable[[Any], Tensor]
    test: Callable[[Any], Tensor]


def transforms(recipe: Recipe, image_size: int, channels: int) -> Transforms | None:
    """Those of timm, for images of that size; None for a recipe with the trainer's own. Raises TrainError."""
    if recipe.augmentation == "light":
        return None
    if recipe.mean is not None and len(recipe.mean) != channels:
        raise TrainError(
            f"mean and std must be for the {channels} channels of the model, got {list(recipe.mean)} and "
            f"{list(recipe.std or ())}"
        )
    needed("timm.data", f"{NAME} (augmentation timm)", "timm")
    recipe = replace(recipe, image_size=image_size)
    try:
        return Transforms(with_timm.transform(recipe), with_timm.transform(recipe, training=False))
    except (AssertionError, ValueError) as error:
        raise TrainError(f"timm can't make the augmentation of the recipe: {error}") from None


@contextlib.contextmanager
def seeded(number: int) -> Iterator[None]:
    """Random numbers of Python, NumPy and torch on the CPU by this one; afterwards they go on as before.

    timm and torchvision draw from all three.
    """
    import numpy as np

    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def seed_of(seed: int, step: int, place: int) -> int:
    """Of the random numbers of one image: the recipe's seed, the step, and its place in the whole batch."""
    return random.Random(f"{seed} {step} {place}").getrandbits(63)


def repeated(recipe: Recipe, count: int) -> Callable[[int], list[int]] | None:
    """The order of an epoch by timm's sampler, in which images come several times; None without repeats.

    It is that of one process, whose batches are then shared: the batches of several that take every so many
    of it are the same. Raises TrainError.
    """
    if recipe.repeats == 1:
        return None
    needed("timm.data.distributed_sampler", f"{NAME} (repeats {recipe.repeats})", "timm")
    sampler = with_timm.sampler(recipe, range(count), num_replicas=1, rank=0, selected_round=0)

    def order(epoch: int) -> list[int]:
        sampler.set_epoch(recipe.seed * 1_000_003 + epoch)
        return list(sampler)

    return order
