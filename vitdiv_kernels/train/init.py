"""Weights to start from."""

from pathlib import Path

from torch import nn

from .. import vit
from .errors import TrainError
from .segment.model import Segmenter


def start_from(model: nn.Module, path: Path) -> None:
    """Loads published weights, or those of a trainer's checkpoint, as `vit.load` does, whose warnings tell
    what was resized or left out.

    Raises TrainError for what can't be read, and with the names that are missing, unexpected or of another
    shape.
    """
    try:
        if isinstance(model, Segmenter):
            model.start_from(path)
        else:
            vit.load(path, model)
    except (OSError, ValueError, ImportError) as error:
        raise TrainError(str(error)) from None
