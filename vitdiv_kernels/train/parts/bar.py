"""A progress bar."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..logs import Row, progress
from .base import Part

if TYPE_CHECKING:
    from ..loop import Trainer


@dataclass
class ProgressBar(Part):
    """One, of the first process, where tqdm is installed."""

    name: ClassVar[str] = "bar"

    def on_begin(self, run: "Trainer") -> None:
        self.open = contextlib.ExitStack()
        self.move = self.open.enter_context(progress(run.title, run.steps, run.step))
        self.metric = "-"

    def on_step(self, run: "Trainer", terms: Mapping[str, Any], indices: Sequence[int]) -> None:
        self.move(run.step)

    def on_eval(self, run: "Trainer", row: Row) -> None:
        self.metric = f"{100 * row[run.task.metrics[0]]:.1f} %"

    def on_log(self, run: "Trainer", row: Row) -> None:
        self.move(run.step, loss=f"{row['loss']:.3f}", validation=self.metric, **run.shown)

    def on_end(self, run: "Trainer") -> None:
        self.open.close()
