"""What can be learned, by name."""

from .segment.task import Segmentation
from .task import Classification

TASKS: dict[str, type[Classification] | type[Segmentation]] = {
    kind.name: kind for kind in (Classification, Segmentation)
}
