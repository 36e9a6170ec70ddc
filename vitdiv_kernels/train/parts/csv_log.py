"""The log as CSV."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..logs import CsvFile, Row
from .base import Part

if TYPE_CHECKING:
    from ..loop import Trainer


@dataclass
class CsvLog(Part):
    """Each row at once, so that it is there when the run is killed."""

    name: ClassVar[str] = "csv"
    file_name: str = "log.csv"

    def takes_part(self, run: "Trainer") -> bool:
        return run.processes.main and run.folder is not None

    def attach(self, run: "Trainer") -> None:
        assert run.folder is not None
        self.file = CsvFile(run.folder / self.file_name)

    def on_log(self, run: "Trainer", row: Row) -> None:
        self.file.add(row, run.columns, run.rows)

    def on_end(self, run: "Trainer") -> None:
        self.file.close()
