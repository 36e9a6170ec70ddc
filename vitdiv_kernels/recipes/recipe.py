"""What a recipe holds: a dataclass whose fields are the keys of its file."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import Any, Literal, get_type_hints

from ..attach.terms import LOSSES, Term
from .fields import expected, fits, key

WHAT = "what to train"
# keys that only timm's augmentation reads
OF_TIMM = {
    *("random_crop", "hflip", "interpolation", "color_jitter", "auto_augment", "mean", "std", "test_crop"),
    *("erase_probability", "erase_mode", "erase_count"),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train a model: what `python -m vitdiv_kernels.train --recipe` does, and how the papers did.

    Args:
        title, source, notes: what it is; where the numbers are from; what differs, and what is not verified.
        results: what the source reports.
        data: "digits" or "imagefolder:PATH", to segment "scenes" or "segfolder:PATH"; None for data of the
            user's own, which `--data` names.
        model: a name in `vitdiv_kernels.vit.CONFIGS`, or "timm:NAME".
        image_size, drop_path, head_drop, reattention, init, mix_init: the side of the images; stochastic
            depth, growing to this in the last block; the dropout before each head; the blocks that re-attend,
            "all" or "none"; how the weights start, as `ViTConfig` has it. None is the model's own.
        weights: a checkpoint or state dict to start from; None for none.
        steps, epochs: how long to train; one of the two. An epoch has as many whole batches as the images
            give.
        batch: images of a step, of all processes.
        lr, lr_images: the highest learning rate; of a batch of other size than lr_images it is scaled. None
            takes lr as it is. See `learning_rate`; `Schedule` has that of each step.
        weight_decay, betas, eps: of AdamW; biases, norms, class token and positions do not decay.
        clip: largest norm of the gradient; 0 for none.
        warmup_epochs, warmup: epochs, or else the share of all steps, with a linear rise from warmup_lr.
        min_lr, cooldown_epochs: the cosine ends at min_lr, None for a hundredth of the highest, and so many
            epochs follow with it.
        lr_delay: by how many epochs the learning rate lags behind, where each epoch has one (see `Schedule`):
            1 in loops that set it after the epoch.
        ema: decay of the moving average of the weights; 0 for none.
        amp: "fp16", "bf16", or None.
        sync_bn: batch norm of all processes together.
        seed: of weights, batches, augmentation and split.
        augmentation: "timm", which is what the next keys say, or "light", the trainer's own: random zoom,
            shift and mirror image, beside which `override` refuses the next keys. The digits always have a
            light one.
        random_crop, hflip, interpolation, color_jitter, auto_augment: as `timm.data.create_transform` takes
            them. Its color_jitter has no effect beside auto_augment. None: no such augmentation.
        erase_probability, erase_mode, erase_count: random erasing.
        repeats: how often an image comes in an epoch (repeated augmentation); the epoch is not longer.
        mean, std: of the normalisation; None for none. test_crop: side of the middle crop by that of the
            resized test image.
        mixup, cutmix, mix_probability, cutmix_probability: the alphas, 0 for none; the probability to mix a
            batch; that of CutMix where both are on. cutmix may be None: 1 where patch_mixing is among the
            losses, and else 0.
        two_image_mixing: mix pairs of images by whole patches (`losses.mix_two_images`), after the others;
            None: where region_mixing is among the losses.
        label_smoothing: of the images' labels, and of the patches' where patch_mixing has no smoothing of its
            own.
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
    data: str | None = key(
        None,
        group=WHAT,
        help="digits, or imagefolder:PATH, with train and val in it, or its "
        "classes; to segment: scenes (of digits), or segfolder:PATH, with images and annotations",
    )
    model: str = key(
        ..., group=WHAT, help="the shape: a name below, or timm:NAME, a vision transformer of timm"
    )
    image_size: int | None = key(None, 1, 16384, group=WHAT, help="resize images to this")
    drop_path: float | None = key(None, 0, 0.99, group=WHAT, help="drop a branch with up to this probability")
    head_drop: float | None = key(None, 0, 0.99)
    reattention: Sequence[int] | Literal["all", "none"] | None = key(
        None, group=WHAT, help="blocks that re-attend: none, all, or such as 8-11", metavar="BLOCKS"
    )
    init: Literal["xavier", "timm"] | None = None
    mix_init: Literal["identity", "conv"] | None = None
    weights: str | None = key(
        None, group=WHAT, help="start from the weights in this checkpoint or state dict", option="--init",
        metavar="CHECKPOINT",
    )  # fmt: skip
    losses: Mapping[str, Mapping[str, Any]] = key(
        dict,
        help="none, diversity, or names and weights, such as cosine=0.5,koleo=0.1 or gong2021; the names are "
        "below",
        metavar="NAME=WEIGHT,...",
    )
    steps: int | None = key(None, 1, help="number of updates")
    epochs: int | None = key(None, 1, help="passes over the training images instead", instead_of="steps")
    batch: int = key(..., 1, help="images in a step, of all processes together")
    lr: float = key(..., 0, help="highest learning rate")
    lr_images: int | None = key(None, 1)
    weight_decay: float = key(..., 0, help="decay of the matrices")
    betas: Sequence[float] = (0.9, 0.999)
    eps: float = key(1e-8, 0)
    clip: float = key(0.0, 0, help="largest gradient norm; 0 for no limit")
    warmup_epochs: float | None = key(None, 0)
    warmup: float | None = key(None, 0, 1, help="share of the steps that warm up")
    warmup_lr: float = key(0.0, 0)
    min_lr: float | None = key(0.0, 0)
    cooldown_epochs: int = key(0, 0)
    lr_delay: int = key(0, 0)
    ema: float = key(
        0.0, 0, 1, help="decay of a moving average of the weights, which is validated, too; 0 for none",
        metavar="DECAY",
    )  # fmt: skip
    amp: Literal["fp16", "bf16"] | None = key(
        None, help="autocast: bf16 (--amp alone), or fp16 with scaled losses", alone="bf16"
    )
    sync_bn: bool = key(False, help="batch norm of all processes together, of the attention maps too")
    seed: int = key(0, 0, 2**32 - 1, help="of weights, batches, augmentation, split")
    augmentation: Literal["timm", "light"] = "timm"
    random_crop: Sequence[float] | None = key(None, 0, 1)
    hflip: float = key(0.0, 0, 1)
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    color_jitter: float | None = key(None, 0)
    auto_augment: str | None = None
    erase_probability: float = key(0.0, 0, 1)
    erase_mode: Literal["pixel", "rand", "const"] = "pixel"
    erase_count: int = key(1, 1, 1000)
    repeats: int = key(1, 1, 1000)
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = key(None, 1e-6)
    test_crop: float = key(1.0, 0.01, 1)
    mixup: float = key(
        0.0, 0, 1000, help="mix batches by mixup, with shares from Beta(ALPHA, ALPHA)", metavar="ALPHA"
    )
    cutmix: float | None = key(
        None, 0, 1000, metavar="ALPHA",
        help="mix batches by CutMix, with areas from Beta(ALPHA, ALPHA); 0 for none (default: 1 where "
        "patch_mixing is among the losses, else 0)",
    )  # fmt: skip
    mix_probability: float = key(1.0, 0, 1)
    cutmix_probability: float = key(0.5, 0, 1)
    two_image_mixing: bool | None = None
    label_smoothing: float = key(0.0, 0, 1, help="label smoothing, of patch_mixing's labels too")

    def __post_init__(self) -> None:
        for name, (hint, limits) in key_types().items():
            value = getattr(self, name)
            if not fits(value, hint, limits):
                raise ValueError(f"{name} must be {expected(hint, limits)}, got {value!r}")
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers of at least 0 and below 1, got {list(self.betas)}")
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
        self.terms()  # refuses what is none
        for loss, regions in (("patch_mixing", False), ("region_mixing", True)):
            if self._has(loss) and self.mixes_two_images is not regions:
                raise ValueError(
                    f"two_image_mixing must be {str(regions).lower()} with the loss {loss}, "
                    f"got {str(not regions).lower()}"
                )

    @property
    def learning_rate(self) -> float:
        """The highest one, of this batch: `lr * batch / lr_images`."""
        return self.lr * self.batch / self.lr_images if self.lr_images else self.lr

    @property
    def cutmix_alpha(self) -> float:
        """`cutmix`, or what its None means."""
        return float(self._has("patch_mixing")) if self.cutmix is None else self.cutmix

    @property
    def mixes_two_images(self) -> bool:
        """`two_image_mixing`, or what its None means."""
        return self._has("region_mixing") if self.two_image_mixing is None else self.two_image_mixing

    def terms(self) -> dict[str, Term]:
        """The configuration of a `DiversityObjective`; empty where the recipe has no such losses.

        A loss in the file is its name here with the keys "loss", of which `attach.terms.LOSSES` are the
        names, "weight", "layers", "options" and "with_task", as `vitdiv_kernels.Term` has them. In
        patch_mixing the option smoothing is label_smoothing unless it is given.
        """
        terms = {}
        for name, keys in self.losses.items():
            if not isinstance(keys, Mapping) or "loss" not in keys:
                raise ValueError(f"losses.{name} must have the key 'loss', one of {', '.join(LOSSES)}")
            known = [part.name for part in fields(Term)]
            for given in keys:
                if given not in known:
                    raise ValueError(f"losses.{name} has no key {given!r}: its keys are {', '.join(known)}")
            if not isinstance(keys.get("options", {}), Mapping):
                raise ValueError(f"losses.{name}.options must be names and values, got {keys['options']!r}")
            if not isinstance(keys["loss"], str):
                raise ValueError(f"losses.{name}.loss must be a text, got {keys['loss']!r}")
            try:
                terms[name] = term = Term(**keys)
            except (TypeError, ValueError) as error:
                raise ValueError(f"losses.{name}: {error}") from None
            if term.loss == "patch_mixing":
                options = {"smoothing": self.label_smoothing, **term.options}
                terms[name] = replace(term, options=options)
        return terms

    def as_dict(self) -> dict[str, Any]:
        """All of it in types of JSON, as a checkpoint can keep it and `parse` reads it."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()
        }

    def _has(self, loss: str) -> bool:
        return any(keys["loss"] == loss for keys in self.losses.values())


@cache
def key_types() -> dict[str, tuple[Any, tuple[float, float] | None]]:
    """Type and limits of each."""
    hints = get_type_hints(Recipe)
    return {part.name: (hints[part.name], part.metadata.get("limits")) for part in fields(Recipe)}
