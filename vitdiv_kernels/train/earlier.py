"""Checkpoints of earlier releases, read as those of today."""

from collections.abc import Mapping
from typing import Any

from .. import recipes
from .loss_weights import as_recipe
from .recipe_options import DEFAULT


def recipe_of_today(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe in a checkpoint. Earlier ones had fewer keys, whose defaults do what they did; `losses` were
    names and weights, and `init` named the weights to start from."""
    if "title" in saved:
        return dict(saved)
    recipe = dict(saved)
    changes = {"losses": as_recipe(recipe.pop("losses", {})), "weights": recipe.pop("init", None)}
    if isinstance(recipe.get("amp"), bool):
        changes["amp"] = "bf16" if recipe["amp"] else None
    return recipes.load(DEFAULT).as_dict() | recipe | changes
