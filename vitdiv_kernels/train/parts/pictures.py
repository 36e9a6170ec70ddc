"""Pictures of predictions."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import TrainError
from ..logs import Row
from ..options import number, option
from ..plots import pyplot
from ..segment.pictures import draw
from ..segment.task import Segmentation
from .base import Part

if TYPE_CHECKING:
    from ..loop import Trainer

DEFAULT = 4


@dataclass
class Pictures(Part):
    """The first validation images with truth and prediction, in predictions.png, after each validation."""

    name: ClassVar[str] = "pictures"
    pictures: int = option(
        DEFAULT,
        "of --task segment: validation images whose prediction is drawn in predictions.png; 0 for none",
        parse=number(int, 0),
    )

    def takes_part(self, run: "Trainer") -> bool:
        if not isinstance(run.task, Segmentation):
            if self.pictures != DEFAULT:
                raise TrainError("--pictures shows what --task segment predicts")
            return False
        # sharded weights are gathered by all processes
        return self.pictures > 0 and run.folder is not None and (run.processes.main or run.fsdp)

    def attach(self, run: "Trainer") -> None:
        pyplot("pictures of predictions (--pictures 0 leaves them out)")

    def on_eval(self, run: "Trainer", row: Row) -> None:
        assert isinstance(run.task, Segmentation)
        assert run.folder is not None
        rows = run.task.predictions(run.model, run.data.val, self.pictures)
        if run.processes.main:
            title = f"step {run.step}, mean IoU {100 * row[run.task.metrics[0]]:.1f} %"
            path = run.folder / "predictions.png"
            draw(rows, ("image", "truth", "prediction"), run.data.classes, title, path)
