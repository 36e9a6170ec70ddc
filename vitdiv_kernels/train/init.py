"""Weights to start from."""

from pathlib import Path

from torch import Tensor, nn

from . import checkpoint
from .errors import TrainError


def start_from(model: nn.Module, path: Path) -> None:
    """Loads the weights of a state dict, or of a checkpoint with its weights under `model`.

    Raises TrainError with the names that are missing, unexpected or of another shape.
    """
    state = checkpoint.tensors_of(path)
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TrainError(f"{path} is no state dict: it must map names to tensors")
    own = model.state_dict()
    odd = {
        "lacks": [name for name in own if name not in state],
        "has, and the model has not,": [name for name in state if name not in own],
        "has with another shape": [
            f"{name} {list(state[name].shape)} for {list(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ],
    }
    if any(odd.values()):
        said = "; ".join(f"it {what} {_some(names)}" for what, names in odd.items() if names)
        raise TrainError(f"{path} does not fit the model: {said}")
    model.load_state_dict(state)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
