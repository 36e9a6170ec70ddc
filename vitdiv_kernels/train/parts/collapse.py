"""The collapse monitor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...attach.monitor import CollapseMonitor, read_records, write_records
from ..errors import TrainError
from ..files import writing
from ..options import number, option
from .base import Part

if TYPE_CHECKING:
    from ..loop import Trainer


@dataclass
class Collapse(Part):
    """A CollapseMonitor, whose records go to collapse.csv."""

    name: ClassVar[str] = "collapse"
    monitor_every: int = option(
        0, "steps between measurements of collapse, kept in collapse.csv; 0 for none", parse=number(int, 0)
    )

    def takes_part(self, run: "Trainer") -> bool:
        # sharded weights are gathered by all processes, which then measure the same
        return self.monitor_every > 0 and (run.processes.main or run.fsdp)

    def attach(self, run: "Trainer") -> None:
        self.csv = run.folder / "collapse.csv" if run.folder is not None and run.processes.main else None
        try:
            self.monitor = CollapseMonitor(run.model, every=self.monitor_every)
        except (TypeError, ValueError) as error:
            raise TrainError(str(error)) from None

    def on_begin(self, run: "Trainer") -> None:
        self.current = False  # whether the file has the records of this run and no others

    def on_step(self, run: "Trainer", terms: Mapping[str, Any], indices: Sequence[int]) -> None:
        if self.csv is not None and not self.current:
            self._write_anew()
        if run.step % self.monitor_every:
            return
        # the first images of the batch, which other processes may have
        batch = run.data.train.__getitems__(list(indices[: self.monitor.images]))
        images = run.task.plain(run.data, *batch)
        if run.fsdp:
            run.processes.share_buffers(run.model)
        new = self.monitor.measure(images, run.step)
        if self.csv is not None:
            with writing(self.csv):
                self.csv.parent.mkdir(parents=True, exist_ok=True)
                write_records(self.csv, new, append=len(self.monitor.records) > len(new))

    def load_state_dict(self, run: "Trainer", state: dict[str, Any]) -> None:
        if self.csv is None or not self.csv.exists():
            return
        try:
            records = read_records(self.csv)
        except ValueError as error:
            raise TrainError(str(error)) from None
        self.monitor.records = [record for record in records if record["step"] <= run.step]

    def _write_anew(self) -> None:
        """Without the records of steps after the checkpoint, which are made again."""
        if self.csv is None:
            return
        with writing(self.csv):
            if self.monitor.records:
                part = self.csv.with_name(self.csv.name + ".part")
                write_records(part, self.monitor.records)
                part.replace(self.csv)
            else:
                write_records(self.csv, [])
        self.current = True
