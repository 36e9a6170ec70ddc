"""The hooks that a part of a run may have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from ..logs import Row

if TYPE_CHECKING:
    from ..loop import Trainer


@dataclass
class Part:
    """Told what a run does. Every method may be left out; `run` is the trainer.

    No file of an earlier run may be touched before `on_step`, `on_eval`, `on_log` or `on_save`. Parts that
    only write take part in the first process; those whose methods all processes must call say so in
    `takes_part`.
    """

    name: ClassVar[str]  # of its state in the checkpoint

    def takes_part(self, run: "Trainer") -> bool:
        """Whether this process has it."""
        return run.processes.main

    def attach(self, run: "Trainer") -> None:
        """The trainer is being made: its model is on the device, and not wrapped yet."""

    def evaluated(self, run: "Trainer") -> Sequence[str]:
        """Columns of the log that its `on_eval` fills."""
        return ()

    def models(self, run: "Trainer") -> Mapping[str, nn.Module]:
        """Models beside the trained one that are worth testing at the end, by what they are."""
        return {}

    def on_begin(self, run: "Trainer") -> None:
        """Training begins, or goes on."""

    def on_step(self, run: "Trainer", terms: Mapping[str, Any], indices: Sequence[int]) -> None:
        """After each update: the losses of this process, and the numbers of the batch's images."""

    def on_eval(self, run: "Trainer", row: Row) -> None:
        """After a validation, whose results are in the row."""

    def on_log(self, run: "Trainer", row: Row) -> None:
        """A row of the log, the last of `run.rows`."""

    def on_save(self, run: "Trainer", path: Path) -> None:
        """After a checkpoint was written."""

    def on_end(self, run: "Trainer") -> None:
        """Training ends, by an error, too."""

    def state_dict(self) -> dict[str, Any]:
        """What goes into the checkpoint: numbers, texts, tensors, and lists and dicts of them."""
        return {}

    def load_state_dict(self, run: "Trainer", state: dict[str, Any]) -> None:
        """What `state_dict` gave, or {} where the checkpoint has nothing of this part; `run.step` is set."""
