"""AdamW's groups of parameters."""

from fnmatch import fnmatchcase
from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay for the network's matrices only: not for biases, norms, position embedding, class token.

    Nor for what the model itself names by `no_weight_decay`, as timm's do, with patterns such as pos_embed.*.
    """
    named = getattr(model, "no_weight_decay", None)
    kept = {"pos_embed", "cls_token", *(named() if callable(named) else ())}
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            vector = p.ndim < 2 or name.endswith(".bias")
            alone = vector or any(fnmatchcase(name, pattern) for pattern in kept)
            (rest if alone else decayed).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
