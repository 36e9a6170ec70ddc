"""Reads files of weights; nothing in them is run."""

import argparse
import contextlib
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def read(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """What a file of torch or safetensors holds, on the CPU.

    Raises FileNotFoundError where there is no such file, ImportError where safetensors is not installed, and
    ValueError for a file that is cut, damaged or of another kind, and for one with objects of other classes
    than torch loads with `weights_only`. It is not unpickled then, so nothing of it runs. The options of a
    command line (`argparse.Namespace`), which the training scripts of DeiT and timm save, are let through.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            state = _safetensors(path) if path.suffix == ".safetensors" else _torch(path, file)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror or error}") from None
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds no state dict but a {type(state).__name__}: expected tensors by name")
    return state


def _torch(path: Path, file: Any) -> Any:
    try:
        _check_sums(file)
        with _namespaces():
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # of any kind: torch raises RuntimeError, EOFError, KeyError, IndexError and OSError for cut files
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise ValueError(
                f"{path} holds pickled code, {refused[1]}, and was not loaded: expected tensors, numbers and "
                "names. If you trust who made it, open it with torch.load(..., weights_only=False), and save "
                "and load its state dict alone"
            ) from None
        raise ValueError(
            f"{path} is cut or damaged, or no file of torch ({path.stat().st_size} bytes, "
            f"{type(error).__name__}): expected what torch.save writes; get it again"
        ) from None


def _check_sums(file: Any) -> None:
    """Raises BadZipFile for a record that is not as it was written: torch does not look at the checksums. 0
    stands for none; files of torch before 1.6 are no zip archives and have none."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                if record.CRC:
                    with archive.open(record) as content:
                        while content.read(1 << 20):
                            pass
    file.seek(0)


def _safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError(f"to read {path} safetensors must be installed: pip install safetensors") from None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is cut or damaged, or no file of safetensors: {error}") from None


@contextlib.contextmanager
def _namespaces() -> Any:
    """Lets argparse.Namespace through. Torch's context manager forgets, at its end, what was let through
    before it, too."""
    if argparse.Namespace in torch.serialization.get_safe_globals():
        yield
        return
    with torch.serialization.safe_globals([argparse.Namespace]):
        yield
