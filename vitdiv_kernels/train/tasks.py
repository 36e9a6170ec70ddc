"""What can be learned, by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import TrainError
from .segment.settings import Dense
from .segment.task import Segmentation
from .task import Classification

Kind = type[Classification] | type[Segmentation]
TASKS: dict[str, Kind] = {kind.name: kind for kind in (Classification, Segmentation)}


def restored(settings: Mapping[str, Any], path: Path) -> tuple[Kind, Dense]:
    """The task that the checkpoint at this path holds as a dict, and its options. Raises TrainError."""
    options = {name: value for name, value in settings.items() if name != "task"}
    if settings.get("task") not in TASKS:
        raise TrainError(
            f"{path} holds the task {settings.get('task')!r}: this release has {', '.join(TASKS)}"
        )
    try:
        return TASKS[settings["task"]], Dense(**options)
    except (TypeError, ValueError) as error:
        raise TrainError(f"{path} holds a task that this release does not have: {error}") from None
