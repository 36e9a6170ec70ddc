"""The losses that an objective takes from a model, and one of them with its weight and its layers."""

import inspect
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor

from .. import _checks, losses

Layers = Sequence[int | str] | Literal["all"]


class Source(NamedTuple):
    """What a loss looks at, how many layers it takes (None: any number at once), and the layers by default.

    "patches" are the tokens that leave a block, without prefix tokens; "embeddings" are those after the final
    norm and, second, the output of patch_embed; "logits" are those of all patches, "regions" those of the
    mean patch of each region; "heads" are q and k.
    """

    kind: str
    number: int | None
    layers: Layers


LOSSES: dict[str, Source] = {
    "pairwise_cosine": Source("patches", 1, (-1,)),
    "patch_cross_cosine": Source("patches", 2, (0, -1)),
    "patch_contrast": Source("patches", 2, (0, -1)),
    "patch_mhs": Source("patches", 1, (-1,)),
    "patch_mgd": Source("patches", 1, (-1,)),
    "patch_soft_orthogonality": Source("patches", 1, (-1,)),
    "patch_condition_orthogonality": Source("patches", 1, (-1,)),
    "koleo": Source("patches", 1, (-1,)),
    "uniformity": Source("patches", 1, (-1,)),
    "neighbourhood_contrast": Source("embeddings", 1, (-1,)),
    "region_contrast": Source("patches", 1, (-1,)),
    "patch_mixing": Source("logits", 1, (-1,)),
    "region_mixing": Source("regions", 1, (-1,)),
    "attention_diversity": Source("heads", 1, (0,)),
    "head_cross_cosine": Source("heads", 2, (0, -1)),
    "head_contrast": Source("heads", 2, (0, -1)),
    "head_mhs": Source("heads", 1, (0,)),
    "head_mgd": Source("heads", 1, (0,)),
    "head_soft_orthogonality": Source("heads", 1, (0,)),
    "head_condition_orthogonality": Source("heads", 1, (0,)),
    "cos_reg": Source("maps", None, (0, 1, 2)),
    "weight_mhs": Source("weights", None, "all"),
    "weight_mgd": Source("weights", None, "all"),
    "weight_soft_orthogonality": Source("weights", None, "all"),
    "weight_condition_orthogonality": Source("weights", None, "all"),
}
EMBEDDINGS = "embeddings"  # among layers: the tokens that enter block 0
# patch_cross_cosine is pairwise_cosine of two sets: a name of its own tells how many layers are meant
_FUNCTIONS = {"patch_cross_cosine": losses.pairwise_cosine}


@dataclass(frozen=True)
class Term:
    """One loss, its weight, and where it is taken.

    Args:
        loss: a name in `LOSSES`; patch_cross_cosine is `pairwise_cosine` between two layers.
        weight: the factor in the total.
        layers: blocks, negative ones from the end, or "all"; None is the loss's own choice. For losses on
            patches "embeddings" among them is the tokens that enter block 0, with their positions. A loss of
            one layer is averaged over them; a loss of two takes exactly two.
        options: of the function of that name in `vitdiv_kernels.losses`.
        with_task: for patch_mixing: the task's loss, that of the class token, and those of the N patches are
            one mean, over N + 1 tokens. Where an objective is called with `task`, it multiplies the weight by
            N / (N + 1), and the task's loss by 1 / (N + 1).

    Raises ValueError or TypeError, with a sentence, for what does not fit.

    Example:
        >>> Term("attention_diversity", 1e-4, layers=[0, 1]).layers
        (0, 1)
    """

    loss: str
    weight: float = 1.0
    layers: Layers | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    with_task: bool = False

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"unknown loss {self.loss!r}: the objective has {', '.join(LOSSES)}")
        _checks.number(f"the weight of {self.loss}", self.weight)
        if not math.isfinite(self.weight):
            raise ValueError(f"the weight of {self.loss} must be finite, got {self.weight}")
        kind, number, default = LOSSES[self.loss]
        layers = default if self.layers is None else self.layers
        if layers != "all":
            named = (EMBEDDINGS,) if kind == "patches" else ()
            several = isinstance(layers, Iterable) and not isinstance(layers, str)
            numbers: list[Any] = [_layer(i, named) for i in layers] if several else []
            if not numbers or None in numbers:
                known = " or ".join(["block numbers", *map(repr, (*named, "all"))])
                raise ValueError(f"layers of {self.loss} must be {known}, got {layers!r}")
            layers = tuple(numbers)
        if number == 2 and (layers == "all" or len(layers) != 2):
            raise ValueError(f"layers of {self.loss} must be two blocks, got {layers!r}")
        object.__setattr__(self, "layers", layers)
        options = options_of(self.function)
        for name in self.options:
            if name not in options:
                raise ValueError(f"{self.loss} has no option {name!r}; its options are {', '.join(options)}")
        if self.options.get("reduction") == "none":
            raise ValueError(f"reduction of {self.loss} must be 'mean' or 'sum', got 'none'")
        if not isinstance(self.with_task, bool):
            raise TypeError(f"with_task of {self.loss} must be True or False, got {self.with_task!r}")
        if self.with_task and (kind != "logits" or self.options.get("reduction", "mean") != "mean"):
            raise ValueError(
                "with_task must be False but for patch_mixing with reduction 'mean', got "
                f"{self.with_task!r} for {self.loss}"
            )

    @property
    def function(self) -> Callable[..., Tensor]:
        return _FUNCTIONS.get(self.loss) or getattr(losses, self.loss)


def _layer(layer: Any, named: Sequence[str]) -> int | str | None:
    """A block number as an int, also one of NumPy, or a name among `named`; else None."""
    if isinstance(layer, str):
        return layer if layer in named else None
    try:
        return None if isinstance(layer, bool) else operator.index(layer)
    except TypeError:
        return None


def options_of(function: Callable[..., Tensor]) -> list[str]:
    """The names of its options, the arguments that are given by keyword only."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
