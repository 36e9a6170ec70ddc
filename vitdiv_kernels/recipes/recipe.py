"""What a recipe holds: a dataclass whose fields are the keys of its file."""

import math
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..attach.terms import LOSSES, Term


def _limit(default: Any, low: float, high: float = math.inf) -> Any:
    """A field that is a number from low to high; without a default where that is `...`."""
    return field(**({} if default is ... else {"default": default}), metadata={"limits": (low, high)})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a paper trains a model.

    Args:
        title, source, notes: what it is; where the numbers are from; what differs, and what is not verified.
        results: what the source reports.
        data: "digits", or None for data of the user's own.
        model, image_size, drop_path, head_drop: a name in `vitdiv_kernels.vit.CONFIGS`, the side of the
            images, stochastic depth, growing to this in the last block, and the dropout before each head.
        init, mix_init: how the model starts, as `ViTConfig` has them.
        steps, epochs: how long to train; one of the two.
        batch: images of a step, of all processes.
        lr, lr_images: the highest learning rate; of a batch of other size than lr_images it is scaled. None
            takes lr as it is. See `learning_rate`.
        weight_decay, betas, eps: of AdamW; biases, norms, class token and positions do not decay.
        clip: largest norm of the gradient; 0 for none.
        warmup_epochs, warmup: epochs, or else the share of all steps, with a linear rise from warmup_lr.
        min_lr, cooldown_epochs: the cosine ends at min_lr, and so many epochs follow with it.
        ema: decay of the moving average of the weights; 0 for none.
        amp: "fp16", "bf16", or None.
        random_crop, hflip, interpolation, color_jitter, auto_augment: as `timm.data.create_transform` takes
            them. Its color_jitter has no effect beside auto_augment. None: no such augmentation.
        erase_probability, erase_mode, erase_count: random erasing.
        repeats: how often an image comes in an epoch (repeated augmentation); the epoch is not longer.
        mean, std: of the normalisation; None for none. test_crop: side of the middle crop by that of the
            resized test image.
        mixup, cutmix, mix_probability, cutmix_probability: the alphas, 0 for none; the probability to mix a
            batch; that of CutMix where both are on.
        two_image_mixing: mix pairs of images by whole patches (`losses.mix_two_images`), after the others.
        label_smoothing: of the images' labels.
        losses: terms of a `DiversityObjective` by name: see `terms`.

    Raises ValueError, with a sentence, for a wrong type or a number out of range.

    Example:
        >>> from vitdiv_kernels import recipes
        >>> recipe = recipes.load("diverse_vit_deit_small")
        >>> recipe.learning_rate, recipe.terms()["cosine"].weight
        (0.001, 0.5)
    """

    title: str
    source: str
    notes: Sequence[str] = ()
    results: str = ""
    data: str | None = None
    model: str
    image_size: int = _limit(..., 1)
    drop_path: float = _limit(0.0, 0, 0.99)
    head_drop: float = _limit(0.0, 0, 0.99)
    init: Literal["xavier", "timm"] = "timm"
    mix_init: Literal["identity", "conv"] = "identity"
    steps: int | None = _limit(None, 1)
    epochs: int | None = _limit(None, 1)
    batch: int = _limit(..., 1)
    lr: float = _limit(..., 0)
    lr_images: int | None = _limit(None, 1)
    weight_decay: float = _limit(..., 0)
    betas: Sequence[float] = _limit((0.9, 0.999), 0, 1)
    eps: float = _limit(1e-8, 0)
    clip: float = _limit(0.0, 0)
    warmup_epochs: float | None = _limit(None, 0)
    warmup: float | None = _limit(None, 0, 1)
    warmup_lr: float = _limit(0.0, 0)
    min_lr: float = _limit(0.0, 0)
    cooldown_epochs: int = _limit(0, 0)
    ema: float = _limit(0.0, 0, 1)
    amp: Literal["fp16", "bf16"] | None = None
    random_crop: Sequence[float] | None = _limit(None, 0, 1)
    hflip: float = _limit(0.0, 0, 1)
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    color_jitter: float | None = _limit(None, 0)
    auto_augment: str | None = None
    erase_probability: float = _limit(0.0, 0, 1)
    erase_mode: Literal["pixel", "rand", "const"] = "pixel"
    erase_count: int = _limit(1, 1)
    repeats: int = _limit(1, 1)
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = _limit(None, 1e-6)
    test_crop: float = _limit(1.0, 0.01, 1)
    mixup: float = _limit(0.0, 0, 1000)
    cutmix: float = _limit(0.0, 0, 1000)
    mix_probability: float = _limit(1.0, 0, 1)
    cutmix_probability: float = _limit(0.5, 0, 1)
    two_image_mixing: bool = False
    label_smoothing: float = _limit(0.0, 0, 1)
    losses: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        hints = get_type_hints(Recipe)
        for part in fields(self):
            value = getattr(self, part.name)
            limits = part.metadata.get("limits")
            if not _fits(value, hints[part.name]) or not _within(value, limits):
                raise ValueError(f"{part.name} must be {_expected(hints[part.name], limits)}, got {value!r}")
            if isinstance(value, list):
                object.__setattr__(self, part.name, tuple(value))
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, got {list(self.betas)}")
        crop = self.random_crop
        if crop is not None and not (len(crop) == 2 and 0 < crop[0] <= crop[1]):
            raise ValueError(
                f"random_crop must be the smallest and the largest share of the image, got {list(crop)}"
            )
        for one, other in (("steps", "epochs"), ("warmup_epochs", "warmup")):
            if (getattr(self, one) is None) == (getattr(self, other) is None):
                raise ValueError(
                    f"{one} or {other} must be given, one of the two, got {one} {getattr(self, one)} and "
                    f"{other} {getattr(self, other)}"
                )
        if (self.mean is None) != (self.std is None) or len(self.mean or ()) != len(self.std or ()):
            raise ValueError(
                f"mean and std must be given together, for as many channels, got {self.mean} and {self.std}"
            )
        losses = [term.loss for term in self.terms().values()]
        for loss, regions in (("patch_mixing", False), ("region_mixing", True)):
            if loss in losses and self.two_image_mixing is not regions:
                raise ValueError(
                    f"two_image_mixing must be {str(regions).lower()} with the loss {loss}, "
                    f"got {str(not regions).lower()}"
                )

    @property
    def learning_rate(self) -> float:
        """The highest one, of this batch: `lr * batch / lr_images`."""
        return self.lr * self.batch / self.lr_images if self.lr_images else self.lr

    def terms(self) -> dict[str, Term]:
        """The configuration of a `DiversityObjective`; empty where the recipe has no such losses.

        A loss in the file is its name here with the keys "loss", of which `attach.terms.LOSSES` are the
        names, "weight", "layers", "options" and "with_task", as `vitdiv_kernels.Term` has them.
        """
        terms = {}
        for name, keys in self.losses.items():
            if not isinstance(keys, Mapping) or "loss" not in keys:
                raise ValueError(f"losses.{name} must have the key 'loss', one of {', '.join(LOSSES)}")
            known = [part.name for part in fields(Term)]
            for key in keys:
                if key not in known:
                    raise ValueError(f"losses.{name} has no key {key!r}: its keys are {', '.join(known)}")
            if not isinstance(keys.get("options", {}), Mapping):
                raise ValueError(f"losses.{name}.options must be names and values, got {keys['options']!r}")
            if not isinstance(keys["loss"], str):
                raise ValueError(f"losses.{name}.loss must be a text, got {keys['loss']!r}")
            try:
                terms[name] = Term(**keys)
            except (TypeError, ValueError) as error:
                raise ValueError(f"losses.{name}: {error}") from None
        return terms

    def as_dict(self) -> dict[str, Any]:
        """All of it in types of JSON, as a checkpoint can keep it and `parse` reads it."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()
        }


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value, as JSON gives it, is of the type."""
    kind = get_origin(hint)
    if kind in (Union, types.UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if kind is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if kind is Sequence:
        return isinstance(value, (list, tuple)) and all(_fits(one, get_args(hint)[0]) for one in value)
    if kind is Mapping:
        return isinstance(value, Mapping)
    if hint is float:
        # an integer of JSON may be larger than every float
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and -sys.float_info.max <= value <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _within(value: Any, limits: tuple[float, float] | None) -> bool:
    if limits is None or value is None:
        return True
    values = value if isinstance(value, (list, tuple)) else [value]
    return all(limits[0] <= one <= limits[1] for one in values)


def _expected(hint: Any, limits: tuple[float, float] | None) -> str:
    """The type in words, with its limits."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    words = []
    for one in options:
        if get_origin(one) is Literal:
            words += [repr(text) for text in get_args(one)]
        elif get_origin(one) is Sequence:
            words.append("a list of texts" if get_args(one)[0] is str else "a list of numbers")
        elif get_origin(one) is Mapping:
            words.append("names and their losses")
        else:
            names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
            words.append(names.get(one, "null"))
    if limits:
        low, high = limits
        number = max(i for i, word in enumerate(words) if word != "null")
        words[number] += f" of at least {low}" if high == math.inf else f" from {low} to {high}"
    return " or ".join(words)
