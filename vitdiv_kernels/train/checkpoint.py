"""Checkpoints as files: written whole or not at all, read with a sentence for what is none."""

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import TrainError
from .files import replacing

STATE = ("model", "optimizer", "step", "rows")
MADE_WITH = ("recipe", "config", "classes")
GENERATORS = ("rng", "cuda_rng", "augment_rng")
PARTS = (*STATE, *MADE_WITH, *GENERATORS)
# what checkpoints of earlier releases do not have
ADDED: dict[str, Any] = {"data": None, "other_rng": [], "scaler": {}, "parts": {}}


def write(path: Path, state: dict[str, Any]) -> None:
    """Writes beside the path, then renames: a crash never leaves half a file. Raises TrainError."""
    with replacing(path) as file:
        torch.save(state, file)


def read(path: Path, parts: Iterable[str] = PARTS) -> dict[str, Any]:
    """What `write` wrote, on the CPU. Raises TrainError where one of the parts is not there."""
    state = tensors_of(path)
    absent = [name for name in parts if not isinstance(state, dict) or name not in state]
    if absent:
        raise TrainError(f"{path} is no checkpoint of this trainer: it has no {', '.join(absent)}")
    return ADDED | state


def tensors_of(path: Path) -> Any:
    """What a file of `torch.save` holds, on the CPU; nothing in it is run. Raises TrainError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise TrainError(f"there is no checkpoint {path}") from None
    except pickle.UnpicklingError as error:
        code = _code_in(path)
        if not code:
            raise TrainError(f"{path} is no checkpoint or a damaged one ({type(error).__name__})") from None
        raise TrainError(
            f"{path} holds more than tensors: {', '.join(code)}, which loading would run; nothing was run. "
            "Save its state dict alone"
        ) from None
    except Exception as error:
        raise TrainError(f"{path} is no checkpoint or a damaged one ({type(error).__name__})") from None


def _code_in(path: Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:
        return []


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
