"""How many images a second, and how much memory."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..logs import CsvFile, Row
from .base import Part

if TYPE_CHECKING:
    from ..loop import Trainer


@dataclass
class Speed(Part):
    """Measured between two rows of the log, with reading and without validating and saving: speed.csv.

    Its numbers differ from run to run, so that they are not in the log, which does not.
    """

    name: ClassVar[str] = "speed"

    def takes_part(self, run: "Trainer") -> bool:
        return run.processes.main and run.folder is not None

    def attach(self, run: "Trainer") -> None:
        assert run.folder is not None
        self.file = CsvFile(run.folder / "speed.csv")
        self.rows: list[Row] = []

    def on_begin(self, run: "Trainer") -> None:
        self.since: tuple[int, float] | None = None
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(run.device)

    def on_step(self, run: "Trainer", terms: Mapping[str, Any], indices: Sequence[int]) -> None:
        if self.since is None:  # the first step of a process compiles and warms up
            self.since = run.step, run.seconds

    def on_log(self, run: "Trainer", row: Row) -> None:
        if self.since is None or run.step == self.since[0]:
            return
        images = (run.step - self.since[0]) * run.recipe.batch
        speed = images / (run.seconds - self.since[1])
        self.since = run.step, run.seconds
        run.measured |= {"images_per_second": speed, "peak_memory_mb": peak_memory(run.device) / 1e6}
        run.shown["images"] = f"{speed:.0f}/s"
        self.rows.append({"step": run.step} | {name: round(value, 1) for name, value in run.measured.items()})
        self.file.add(self.rows[-1], list(self.rows[-1]), self.rows)

    def on_end(self, run: "Trainer") -> None:
        self.file.close()

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, run: "Trainer", state: dict[str, Any]) -> None:
        self.rows = state.get("rows", [])


def peak_memory(device: torch.device) -> float:
    """Bytes: of a GPU those of tensors; else the largest resident set of this process, nan on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
