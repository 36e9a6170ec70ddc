"""A moving average of the weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from ..errors import TrainError
from ..logs import Row
from ..optional import needed
from .base import Part

if TYPE_CHECKING:
    from ..loop import Trainer


@dataclass
class Ema(Part):
    """timm's ModelEmaV3 with the recipe's `ema` as decay; validated beside the model."""

    name: ClassVar[str] = "ema"

    def takes_part(self, run: "Trainer") -> bool:
        if run.recipe.ema and run.fsdp:
            raise TrainError("--ema can't average what --fsdp shards: leave one out")
        return run.recipe.ema > 0

    def attach(self, run: "Trainer") -> None:
        timm = needed("timm.utils", "a moving average of the weights (ema)", "timm")
        self.average = timm.ModelEmaV3(run.model, decay=run.recipe.ema)

    def evaluated(self, run: "Trainer") -> Sequence[str]:
        return [f"{name}_ema" for name in run.task.metrics]

    def models(self, run: "Trainer") -> Mapping[str, nn.Module]:
        return {"moving average": self.average.module}

    def on_step(self, run: "Trainer", terms: Mapping[str, Any], indices: Sequence[int]) -> None:
        self.average.update(run.model)

    def on_eval(self, run: "Trainer", row: Row) -> None:
        row |= {f"{name}_ema": value for name, value in run.evaluate(self.average.module).items()}

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.average.module.state_dict()}

    def load_state_dict(self, run: "Trainer", state: dict[str, Any]) -> None:
        if "model" not in state:
            raise TrainError("the checkpoint has no moving average of the weights, which this run has (ema)")
        self.average.module.load_state_dict(state["model"])
