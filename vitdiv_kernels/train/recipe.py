"""How to train: the numbers of a run, and the learning rate that follows from them."""

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Recipe:
    """How to train; all of it is kept in checkpoints, and a resumed run must have the same.

    `losses` are names and weights, as of `loss_weights.parse_losses`. `cutmix` is the alpha of CutMix's Beta
    distribution, at most 1000; 0 mixes no images. None is 1 where patch_mixing is among the losses, by itself
    or in a preset, as its papers train, and else 0.
    """

    steps: int = 1200
    batch: int = 32
    lr: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    label_smoothing: float = 0.1
    cutmix: float | None = None
    losses: dict[str, float] = field(default_factory=dict)
    amp: bool = False
    seed: int = 0


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then half a cosine down to a hundredth."""
    warm = max(1, int(recipe.warmup * recipe.steps))
    if step < warm:
        return recipe.lr * (step + 1) / warm
    done = (step - warm) / max(1, recipe.steps - warm)
    return recipe.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
