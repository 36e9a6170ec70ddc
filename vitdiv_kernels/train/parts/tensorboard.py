"""The log for TensorBoard."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..files import writing
from ..logs import Row
from ..optional import needed
from ..options import option
from .base import Part

if TYPE_CHECKING:
    from ..loop import Trainer


@dataclass
class TensorBoard(Part):
    """The numbers of each row, and speed and memory, as scalars."""

    name: ClassVar[str] = "tensorboard"
    tensorboard: bool = option(False, "write the log for TensorBoard, too, into --out/tensorboard")

    def takes_part(self, run: "Trainer") -> bool:
        return self.tensorboard and run.processes.main and run.folder is not None

    def attach(self, run: "Trainer") -> None:
        needed("tensorboard", "--tensorboard", "tensorboard")
        self.make = needed("torch.utils.tensorboard", "--tensorboard", "tensorboard").SummaryWriter
        self.writer: Any = None

    def on_log(self, run: "Trainer", row: Row) -> None:
        assert run.folder is not None
        with writing(run.folder / "tensorboard"):
            if self.writer is None:
                # of a run that was killed, its rows after the checkpoint are hidden
                self.writer = self.make(run.folder / "tensorboard", purge_step=run.step)
            for name, value in (row | run.measured).items():
                if name != "step" and value != "":
                    self.writer.add_scalar(name, value, run.step)
            self.writer.flush()

    def on_end(self, run: "Trainer") -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None
