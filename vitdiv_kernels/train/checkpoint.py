"""Checkpoints as files: written whole or not at all, read with a sentence for what is none."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .errors import TrainError

STATE = ("model", "optimizer", "step", "rows")
MADE_WITH = ("recipe", "config", "classes")
GENERATORS = ("rng", "cuda_rng", "augment_rng")
PARTS = (*STATE, *MADE_WITH, *GENERATORS)


def write(path: Path, state: dict[str, Any]) -> None:
    """Writes beside the path, then renames: a crash never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def read(path: Path, parts: Iterable[str] = PARTS) -> dict[str, Any]:
    """What `write` wrote, on the CPU. Raises TrainError where one of the parts is not there."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise TrainError(f"there is no checkpoint {path}") from None
    except Exception as error:
        raise TrainError(f"{path} is no checkpoint or a damaged one ({type(error).__name__})") from None
    absent = [name for name in parts if not isinstance(state, dict) or name not in state]
    if absent:
        raise TrainError(f"{path} is no checkpoint of this trainer: it has no {', '.join(absent)}")
    return state


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """A ViTConfig's fields with ranges as lists, which a checkpoint can hold and compare."""
    return config | {"reattention": list(config["reattention"])}
