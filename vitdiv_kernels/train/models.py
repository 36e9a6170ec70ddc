"""The models that the trainer makes: shapes of the reference ViT, and vision transformers of timm."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..nn import ReAttention
from ..recipes import Recipe
from ..vit import CONFIGS, ViT, ViTConfig
from .errors import TrainError
from .optional import needed

# modules of timm's Attention that do the same in ReAttention
TAKEN_OVER = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")


@dataclass(frozen=True)
class TimmConfig:
    """A vision transformer of timm, with re-attention in the blocks that are listed."""

    timm: str
    image_size: int
    channels: int = 3
    classes: int = 1000
    drop_path: float = 0.0
    reattention: Sequence[int] = ()


Config = ViTConfig | TimmConfig


def chosen(recipe: Recipe) -> Config:
    """The configuration that the recipe names, with what it changes. Raises TrainError."""
    kind, _, name = recipe.model.partition(":")
    if kind == "timm" and name:
        return _chosen_of_timm(recipe, name)
    if recipe.model not in CONFIGS:
        raise TrainError(f"unknown model {recipe.model!r}: give timm:NAME, or one of {', '.join(CONFIGS)}")
    shape = CONFIGS[recipe.model]
    names = ("image_size", "drop_path", "head_drop", "init", "mix_init")
    changes: dict[str, Any] = {name: getattr(recipe, name) for name in names}
    changes["reattention"] = _blocks(recipe.reattention, shape.depth)
    try:
        return replace(shape, **{name: value for name, value in changes.items() if value is not None})
    except ValueError as error:
        raise TrainError(str(error)) from None


def _chosen_of_timm(recipe: Recipe, name: str) -> TimmConfig:
    timm = needed("timm", f"--model {recipe.model}", "timm")
    if not timm.is_model(name):
        similar = timm.list_models(f"{name[:8]}*")[:3]
        hint = f", such as {', '.join(similar)}" if similar else ""
        raise TrainError(
            f"timm {timm.__version__} has no model {name!r}: give one of timm.list_models(){hint}"
        )
    for key, kept in (("head_drop", 0), ("init", "timm"), ("mix_init", "identity")):
        if getattr(recipe, key) not in (None, kept):
            raise TrainError(
                f"{key} must be {kept} or null for a model of timm, got {getattr(recipe, key)!r}: "
                f"--set {key}=null"
            )
    channels, size = timm.get_pretrained_cfg(name).input_size[:2]
    config = TimmConfig(name, recipe.image_size or size, channels, drop_path=recipe.drop_path or 0.0)
    depth = len(blocks_of(_timm_model(config), name)) if recipe.reattention == "all" else 0
    return replace(config, reattention=_blocks(recipe.reattention, depth) or ())


def _blocks(given: Sequence[int] | str | None, depth: int) -> list[int] | None:
    if given is None:
        return None
    return list(range(depth if given == "all" else 0)) if isinstance(given, str) else sorted(set(given))


def make(config: Config) -> nn.Module:
    """The model, which keeps its configuration as `config`. Raises TrainError."""
    try:
        model: nn.Module = ViT(config) if isinstance(config, ViTConfig) else _timm_model(config)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, TrainError):
            raise
        said = str(error).partition("\n")[0]
        raise TrainError(f"the model can't be made for images of size {config.image_size} ({said})") from None
    if isinstance(config, ViTConfig):
        return model
    reattend(model, config.timm, config.reattention)
    model.config = config  # type: ignore[assignment]
    return model


def restored(config: dict[str, Any], path: Path) -> Config:
    """The configuration that the checkpoint at this path holds as a dict. Raises TrainError."""
    try:
        return TimmConfig(**config) if "timm" in config else ViTConfig(**config)
    except (TypeError, ValueError) as error:
        raise TrainError(
            f"{path} holds a model that this release can't make ({error}): read it by the one that wrote it"
        ) from None


def patch_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of a patch in pixels. Raises TrainError where patches are not whole."""
    config: Any = model.config
    if isinstance(config, TimmConfig):
        # by the grid: patch_size is of feature maps in hybrids, and a number in XCiT
        embed: Any = model.patch_embed
        stride = getattr(getattr(embed, "proj", None), "stride", (1, 1))
        if any(config.image_size % pixels for pixels in stride):
            raise TrainError(
                f"image_size must be a multiple of the patch ({stride[0]}) to label patches, "
                f"got {config.image_size}"
            )
        side = math.isqrt(embed.num_patches)
        rows, columns = getattr(embed, "grid_size", (side, side))
        return config.image_size // rows, config.image_size // columns
    return config.patch, config.patch


def blocks_of(model: nn.Module, name: str) -> list[nn.Module]:
    """The blocks of a model of timm. Raises TrainError where it has none."""
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Module) or not hasattr(model, "patch_embed"):
        raise TrainError(
            f"timm's {name} has no blocks and patch_embed: give a vision transformer, such as vit_*"
        )
    return list(blocks.children())


def reattend(model: nn.Module, name: str, indices: Sequence[int]) -> None:
    """Puts ReAttention in place of the attention of these blocks; weights and biases stay.

    Raises TrainError for a block that timm's Attention is not in, or that the model has not.
    """
    blocks = blocks_of(model, name)
    odd = [i for i in indices if not 0 <= i < len(blocks)]
    if odd:
        raise TrainError(f"reattention must list blocks from 0 to {len(blocks) - 1}, got {odd}")
    for i in indices:
        block: Any = blocks[i]
        old: Any = getattr(block, "attn", None)
        if type(old).__module__ != "timm.layers.attention" or type(old).__name__ != "Attention":
            raise TrainError(
                f"block {i} of timm's {name} has {type(old).__name__}: --reattention takes the place of "
                "timm's Attention only"
            )
        new = ReAttention(old.qkv.in_features, old.num_heads, attn_head_dim=old.head_dim)
        for part in TAKEN_OVER:
            if hasattr(old, part):
                setattr(new, part, getattr(old, part))
        block.attn = new


def _timm_model(config: TimmConfig) -> nn.Module:
    timm = needed("timm", f"--model timm:{config.timm}", "timm")
    options: dict[str, Any] = {"num_classes": config.classes, "in_chans": config.channels}
    options["img_size"] = config.image_size
    if config.drop_path:
        options["drop_path_rate"] = config.drop_path
    try:
        model = timm.create_model(config.timm, pretrained=False, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise TrainError(f"timm can't make {config.timm} with {options}: {error}") from None
    blocks_of(model, config.timm)
    embed: Any = model.patch_embed
    if getattr(embed, "num_patches", 1) < 1:
        patch = getattr(embed, "patch_size", "?")
        patch = patch[0] if isinstance(patch, tuple) else patch
        raise TrainError(
            f"image_size must be at least the patch ({patch}) of timm's {config.timm}, "
            f"got {config.image_size}"
        )
    return model
