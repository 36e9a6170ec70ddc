"""`load`: published checkpoints, read into a model whole or not at all."""

import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fusing.api import names_of_new_mixes
from .configs import CONFIGS, ViTConfig
from .files import read
from .model import ViT

State = Mapping[str, Any]
Model = TypeVar("Model", bound=nn.Module)

# Where training scripts keep the weights, and their moving average.
WEIGHTS = "model", "state_dict"
AVERAGES = "model_ema", "state_dict_ema"
# What wrappers put before names, and timm's and torch's counters beside them.
PREFIXES = re.compile(r"^((module|_orig_mod)\.)+")
COUNTERS = "n_averaged"
# The talking heads of Gong et al.
RENAMED = {".attn.proj_pre.": ".attn.proj_l.", ".attn.proj_post.": ".attn.proj_w."}
HEADS = "head", "head_dist", "patch_head"
PREFIX_TOKENS = "cls_token", "dist_token", "reg_token"


@overload
def load(
    source: str | os.PathLike[str] | State,
    model: str | ViTConfig,
    *,
    ema: bool = False,
    strict: bool = True,
) -> ViT: ...
@overload
def load(
    source: str | os.PathLike[str] | State, model: Model, *, ema: bool = False, strict: bool = True
) -> Model: ...
def load(
    source: str | os.PathLike[str] | State,
    model: str | ViTConfig | nn.Module,
    *,
    ema: bool = False,
    strict: bool = True,
) -> nn.Module:
    """The model with the weights of a checkpoint: of DeepViT, DeiT, CaiT, timm, Diverse-ViT, Gong et al., or
    of this package's trainer.

    Weights are taken from under `model` or `state_dict` where they are, and `module.` before names is
    removed. Position embeddings of another image size are resized as timm does (bicubic, antialiased). Heads
    for another number of classes are dropped: those of the model keep their initial values. A warning tells
    of both. DeepViT-S and -L keep their factor of 0.5 in the blocks, so their weights stay as published.

    Args:
        source: a file of torch or safetensors, read without running anything in it, or a state dict.
        model: one of `CONFIGS` by name, a `ViTConfig`, or a module with timm's names, which is changed. Where
            `fuse` has given it mixes (`plain=True`) that the file has not, they become the identity.
        ema: take the moving average of the weights (`model_ema` or `state_dict_ema`, or that of a trainer's
            checkpoint).
        strict: False loads what is in both, and a warning lists what is missing and what is not used.

    Raises FileNotFoundError; ValueError for an unknown name, a file that is cut, damaged, or has pickled
    code, and for a checkpoint whose names or shapes are not the model's: it lists them, and the model is left
    as it was. Shapes must agree with strict=False, too.

    Example:
        >>> config = ViTConfig(image_size=32, dim=48, depth=2, heads=4, classes=10)
        >>> model = load({"state_dict": ViT(config).state_dict()}, config)
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    if isinstance(source, (str, os.PathLike)):
        name, state = str(os.fspath(source)), read(source)
    elif isinstance(source, Mapping):
        name, state = "the state dict", source
    else:
        raise TypeError(f"source must be a path or a state dict, got a {type(source).__name__}")
    target, called = _model(model)
    found = _weights(state, ema, name)
    expected = target.state_dict()
    if any(tensor.is_meta for tensor in expected.values()):
        raise ValueError("model must have memory, got one on the meta device: call model.to_empty first")
    weights, notes = _fitted(found, expected, getattr(target, "patch_embed", None))
    # of a file of the plain model, whose attentions take the identity as their mix
    new = names_of_new_mixes(target)
    if new.isdisjoint(weights):
        expected = {key: value for key, value in expected.items() if key not in new}
    differences = _differences(weights, expected, strict)
    if differences:
        raise ValueError(f"{name} does not fit {called}: {differences}{_looks_like(found)}")
    if not strict and (listed := _differences(weights, expected, True)):
        notes.append(listed)
    for note in notes:
        warnings.warn(f"{name}: {note}", stacklevel=2)
    target.load_state_dict(weights, strict=False)
    return target


def _model(model: str | ViTConfig | nn.Module) -> tuple[nn.Module, str]:
    """The module, and what to call it."""
    if isinstance(model, nn.Module):
        return model, f"this {type(model).__name__}"
    if isinstance(model, ViTConfig):
        return ViT(model), "the ViTConfig"
    if model not in list(CONFIGS):
        raise ValueError(
            f"model must be a ViTConfig, a module, or one of {', '.join(CONFIGS)}, got {model!r}"
        )
    return ViT(CONFIGS[model]), model


def _weights(state: State, ema: bool, name: str) -> dict[str, Tensor]:
    """The tensors by name, out of what wraps them."""
    parts = state.get("parts")  # of a checkpoint of the trainer, which keeps the average there
    if ema and isinstance(parts, Mapping) and isinstance(parts.get("ema"), Mapping):
        return _weights(parts["ema"], False, name)
    kept = [key for key in (*WEIGHTS, *AVERAGES) if isinstance(state.get(key), Mapping)]
    wanted = [key for key in (AVERAGES if ema else WEIGHTS) if key in kept]
    if wanted:
        return _weights(state[wanted[0]], False, name)
    if ema or kept:
        raise ValueError(
            f"{name} has no {' or '.join(AVERAGES if ema else WEIGHTS)} but {_first(state)}: "
            f"give ema={not ema} for the {'weights themselves' if ema else 'moving average'}"
        )
    strange = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if strange or not state:
        raise ValueError(
            f"{name} holds no state dict: expected tensors by name, by themselves or under "
            f"{', '.join((*WEIGHTS, *AVERAGES))}, got {_first(strange) or 'nothing'}"
        )
    plain = {PREFIXES.sub("", key): value for key, value in state.items() if key != COUNTERS}
    if len(plain) < len(state) - (COUNTERS in state):
        raise ValueError(f"{name} has the same names with and without module. before them")
    return plain


def _fitted(found: State, expected: State, patch_embed: Any) -> tuple[dict[str, Tensor], list[str]]:
    """What was found under the model's names and in its sizes, and a sentence for each that had to change."""
    weights, notes = _renamed(found, expected), []
    for head in HEADS:
        there, here = (tensors.get(f"{head}.weight") for tensors in (weights, expected))
        if there is None or here is None or there.shape == here.shape or there.shape[1:] != here.shape[1:]:
            continue
        notes.append(
            f"{head} is for {len(there)} classes and the model's for {len(here)}: it keeps its initial values"
        )
        parts = (f"{head}.weight", f"{head}.bias")
        weights |= {part: expected[part] for part in parts if part in expected}
    there, here = weights.get("pos_embed"), expected.get("pos_embed")
    if there is not None and here is not None and _other_positions(there, here):
        before = _prefix_and_grid(there, weights)
        after = _prefix_and_grid(here, expected, getattr(patch_embed, "grid_size", None))
        if before and after and before[0] == after[0]:
            weights["pos_embed"] = _resized(there, *before, after[1])
            (rows, columns), (new_rows, new_columns) = before[1], after[1]
            notes.append(
                f"pos_embed was resized from {rows} x {columns} to {new_rows} x {new_columns} patches"
            )
    return weights, notes


def _renamed(found: State, expected: State) -> dict[str, Tensor]:
    weights = {}
    for key, value in found.items():
        for theirs, ours in RENAMED.items():
            if key not in expected:
                key = key.replace(theirs, ours)
        weights[key] = value
    return weights


def _other_positions(there: Tensor, here: Tensor) -> bool:
    """Whether the two [1, positions, D] differ in their positions alone."""
    alike = there.ndim == here.ndim == 3 and there.shape[::2] == here.shape[::2]
    return alike and there.shape != here.shape


def _prefix_and_grid(
    pos_embed: Tensor, tensors: State, grid: tuple[int, int] | None = None
) -> tuple[int, tuple[int, int]] | None:
    """How many positions are those of prefix tokens, and rows and columns of the others; None where they are
    no square. Not in all models do prefix tokens have positions."""
    positions = pos_embed.shape[1]
    if grid is not None:
        return positions - grid[0] * grid[1], grid
    tokens = sum(tensors[name].shape[-2:-1].numel() for name in PREFIX_TOKENS if name in tensors)
    for prefix in (tokens, 0):
        side = math.isqrt(max(0, positions - prefix))
        if side * side == positions - prefix > 0:
            return prefix, (side, side)
    return None


def _resized(pos_embed: Tensor, prefix: int, grid: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """As timm's resample_abs_pos_embed."""
    patches = pos_embed[:, prefix:].float().unflatten(1, grid).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=new, mode="bicubic", antialias=True)
    return torch.cat([pos_embed[:, :prefix], patches.flatten(2).mT.to(pos_embed.dtype)], 1)


def _differences(weights: State, expected: State, names: bool) -> str:
    """What of the weights does not fit, else "": other shapes; with `names` what is missing or unexpected."""
    shapes = [
        f"{key} {list(weights[key].shape)}, expected {list(expected[key].shape)}"
        for key in expected
        if key in weights and weights[key].shape != expected[key].shape
    ]
    parts = {
        "missing": [key for key in expected if key not in weights] if names else [],
        "unexpected": [key for key in weights if key not in expected] if names else [],
        "of other shapes": shapes,
    }
    return "; ".join(f"{kind}: {_first(keys)}" for kind, keys in parts.items() if keys)


def _first(keys: Iterable[str], most: int = 6) -> str:
    keys = list(map(str, keys))
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _looks_like(found: State) -> str:
    """Half a sentence with the names of the configs that the tensors fit; else ""."""
    if "head.weight" not in found or found["head.weight"].ndim != 2:
        return ""
    classes, dim = found["head.weight"].shape
    fitting = []
    for name, config in CONFIGS.items():
        if config.dim == dim and f"blocks.{config.depth - 1}.norm1.weight" in found:
            with torch.device("meta"):
                expected = ViT(replace(config, classes=classes)).state_dict()
            if not _differences(_renamed(found, expected), expected, True):
                fitting.append(name)
    return f". It fits {' and '.join(fitting)} of CONFIGS" if fitting else ""
