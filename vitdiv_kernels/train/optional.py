"""Packages of extras, which may be absent."""

import importlib
from typing import Any

import torch

from .errors import TrainError


def needed(package: str, what: str, extra: str) -> Any:
    """The module. Raises TrainError, which names the extra, where it is absent or does not load."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.partition(".")[0]
        raise TrainError(
            f"{what} needs {name}, which is absent: pip install 'vitdiv-kernels[{extra}]'"
        ) from None
    except RuntimeError as error:
        raise TrainError(
            f"{what} needs {package}, which does not load ({str(error).splitlines()[0]}): install the "
            f"torchvision made for torch {torch.__version__}"
        ) from None
