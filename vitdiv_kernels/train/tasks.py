"""What can be learned, by name."""

from collections.abc import Mapping
from typing import Any

from .segment.settings import Dense
from .segment.task import Segmentation
from .task import Classification

Kind = type[Classification] | type[Segmentation]
TASKS: dict[str, Kind] = {kind.name: kind for kind in (Classification, Segmentation)}


def restored(settings: Mapping[str, Any]) -> tuple[Kind, Dense]:
    """The task that a checkpoint holds as a dict, and its options."""
    options = {name: value for name, value in settings.items() if name != "task"}
    return TASKS[settings["task"]], Dense(**options)
