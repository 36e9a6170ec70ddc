"""How to train: the numbers of a run, and the learning rate that follows from them."""

import argparse
import math
from dataclasses import dataclass
from typing import Literal

from .loss_weights import parse_losses
from .options import number, option


def losses(text: str) -> dict[str, float]:
    """An argparse type: `parse_losses`."""
    try:
        return parse_losses(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


@dataclass(frozen=True)
class Recipe:
    """How to train; all of it is kept in checkpoints, and a resumed run must have the same.

    `losses` are names and weights, as of `loss_weights.parse_losses`. `cutmix` is the alpha of CutMix's Beta
    distribution, at most 1000; 0 mixes no images. None is 1 where patch_mixing is among the losses, by itself
    or in a preset, as its papers train, and else 0. `amp` may be True for bf16. A trainer turns `epochs`,
    where it is given, into `steps`. `batch` counts the images of all processes.
    """

    losses: dict[str, float] = option(
        dict,
        "none, diversity, or names and weights, such as cosine=0.5,koleo=0.1 or gong2021; the names are "
        "below",
        parse=losses,
        metavar="NAME=WEIGHT,...",
        given="none",
    )
    steps: int = option(1200, "number of updates", parse=number(int, 1))
    epochs: int | None = option(
        None, "passes over the training images instead", parse=number(int, 1), instead_of="steps"
    )
    batch: int = option(32, "images in a step, of all processes together", parse=number(int, 1))
    lr: float = option(1e-3, "highest learning rate", parse=number(float, 0))
    warmup: float = option(0.1, "share of the steps that warm up", parse=number(float, 0, 1))
    weight_decay: float = option(0.05, "decay of the matrices", parse=number(float, 0))
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = option(1.0, "largest gradient norm; 0 for no limit", parse=number(float, 0))
    label_smoothing: float = option(
        0.1, "label smoothing, of patch_mixing's labels too", parse=number(float, 0, 1)
    )
    cutmix: float | None = option(
        None,
        "mix the images of each batch by CutMix, with areas from Beta(ALPHA, ALPHA); 0 for none (default: 1 "
        "where patch_mixing is among the losses, else 0)",
        parse=number(float, 0, 1000),
        metavar="ALPHA",
    )
    amp: Literal["bf16", "fp16"] | bool | None = option(
        None,
        "autocast: bf16 (--amp alone), or fp16 with scaled losses",
        choices=("bf16", "fp16"),
        alone="bf16",
    )
    ema: float = option(
        0.0,
        "decay of a moving average of the weights, which is validated, too, such as 0.9999; 0 for none",
        parse=number(float, 0, 1),
        metavar="DECAY",
    )
    sync_bn: bool = option(False, "batch norm of all processes together, of the attention maps too")
    init: str | None = option(
        None, "start from the weights in this checkpoint or state dict", metavar="CHECKPOINT"
    )
    seed: int = option(0, "of weights, batches, augmentation, split", parse=number(int, 0))

    def __post_init__(self) -> None:
        if isinstance(self.amp, bool):
            object.__setattr__(self, "amp", "bf16" if self.amp else None)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then half a cosine down to a hundredth."""
    warm = max(1, int(recipe.warmup * recipe.steps))
    if step < warm:
        return recipe.lr * (step + 1) / warm
    done = (step - warm) / max(1, recipe.steps - warm)
    return recipe.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
