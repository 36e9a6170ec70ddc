"""Checkpoints as files: written whole or not at all, read with a sentence for what is none."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..vit import files as weights
from .errors import TrainError
from .files import replacing

STATE = ("model", "optimizer", "step", "rows")
MADE_WITH = ("recipe", "config", "classes")
GENERATORS = ("rng", "cuda_rng", "augment_rng")
PARTS = (*STATE, *MADE_WITH, *GENERATORS)
DICTS = ("model", "recipe", "config", "task", "parts")
# what checkpoints of earlier releases do not have
ADDED: dict[str, Any] = {"data": None, "other_rng": [], "scaler": {}, "parts": {}}
ADDED["task"] = {"task": "classify"}


def write(path: Path, state: dict[str, Any]) -> None:
    """Writes beside the path, then renames: a crash never leaves half a file. Raises TrainError."""
    with replacing(path) as file:
        torch.save(state, file)


def read(path: Path, parts: Iterable[str] = PARTS) -> dict[str, Any]:
    """What `write` wrote, on the CPU. Raises TrainError where one of the parts is not there."""
    state = tensors_of(path)
    absent = [name for name in parts if name not in state]
    if absent:
        raise TrainError(f"{path} is no checkpoint of this trainer: it has no {', '.join(absent)}")
    whole = {**ADDED, **state}
    for name in DICTS:
        if name in whole and not isinstance(whole[name], Mapping):
            raise TrainError(
                f"{path} is no checkpoint of this trainer: its {name} must be a dict, got "
                f"{type(whole[name]).__name__}"
            )
    return whole


def tensors_of(path: Path) -> Mapping[str, Any]:
    """What a file of weights holds, on the CPU; nothing in it is run. Raises TrainError."""
    try:
        return weights.read(path)
    except FileNotFoundError:
        raise TrainError(f"there is no checkpoint {path}") from None
    except (ValueError, ImportError) as error:
        raise TrainError(str(error)) from None


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """A model's configuration with ranges as lists, which a checkpoint can hold and compare."""
    return config | {"reattention": list(config["reattention"])}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """`NAME THEN, now NOW; ...` of what is not the same; empty where all is."""
    names = [*now, *(name for name in then if name not in now)]
    return "; ".join(
        f"{name} {then.get(name)!r}, now {now.get(name)!r}"
        for name in names
        if now.get(name) != then.get(name)
    )
