"""What a trainer keeps in a checkpoint, and what a run that goes on must have as it was."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import recipes
from ..recipes import Recipe
from . import checkpoint, models, parallel, wrapping
from .earlier import recipe_of_today
from .errors import TrainError
from .loss_weights import in_json

if TYPE_CHECKING:
    from .loop import Trainer


# keys of a recipe that a run may go on without: names, and what configuration and images tell themselves
NAMES = {"title", "source", "notes", "results", "data", "model"}


def settled(recipe: Recipe) -> dict[str, Any]:
    """Its keys and values, with what it leaves to its losses, and all keys of these."""
    return recipe.as_dict() | {
        "losses": in_json(recipe.terms()),
        "cutmix": recipe.cutmix_alpha,
        "two_image_mixing": recipe.mixes_two_images,
    }


def made_with(run: "Trainer") -> dict[str, Any]:
    """What a run that goes on must have as it was."""
    config: Any = run.model.config
    return {
        "recipe": settled(run.recipe),
        "config": checkpoint.plain(asdict(config)),
        "classes": list(run.data.classes),
        "data": run.data.fingerprint(),
        "task": run.task.settings(),
    }


def flat(made: dict[str, Any]) -> dict[str, Any]:
    """As one mapping of names to values, to compare."""
    data = {f"{part} images": value for part, value in (made.get("data") or {}).items()}
    recipe = {name: value for name, value in made["recipe"].items() if name not in NAMES}
    return made["task"] | recipe | made["config"] | {"classes": made["classes"]} | data


def gathered(run: "Trainer") -> dict[str, Any]:
    """The state; all processes must call it, and the main one writes it."""
    made = made_with(run)
    generators = run.processes.gather((torch.get_rng_state(), _cuda_states(run)))
    return {
        "model": wrapping.whole(run.model.state_dict()),
        "optimizer": wrapping.whole(run.optimizer.state_dict()),
        "step": run.step,
        "rows": run.rows,
        **{name: made[name] for name in checkpoint.MADE_WITH},
        "rng": generators[0][0],
        "cuda_rng": generators[0][1],
        "augment_rng": run.augment_rng.get_state(),
        "data": made["data"],
        "other_rng": generators[1:],
        "scaler": run.scaler.state_dict(),
        "parts": {part.name: state for part in run.parts if (state := part.state_dict())},
        "task": made["task"],
    }


def restore(run: "Trainer", path: Path) -> None:
    """Gives the trainer the state in a checkpoint. Raises TrainError for one of another run."""
    with run.processes.together():
        state = checkpoint.read(path)
        _check_same(run, state, path)
    _load_model(run, state["model"], path)
    parameters = run.parameters
    optimizer = state["optimizer"]
    for i, values in optimizer["state"].items():
        optimizer["state"][i] = {name: wrapping.like(value, parameters[i]) for name, value in values.items()}
    run.optimizer.load_state_dict(optimizer)
    run.step, run.rows = state["step"], state["rows"]
    if state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
    _restore_generators(run, state)
    for part in run.parts:
        part.load_state_dict(run, state["parts"].get(part.name, {}))


def _check_same(run: "Trainer", state: dict[str, Any], path: Path) -> None:
    now = made_with(run)
    try:
        recipe = settled(recipes.parse(recipe_of_today(state["recipe"]), str(path)))
    except ValueError as error:
        raise TrainError(f"the recipe of {error}") from None
    config = checkpoint.plain(asdict(models.restored(state["config"], path)))
    then = state | {"recipe": recipe, "config": config}
    if state["data"] is None:
        now = now | {"data": None}
    changed = checkpoint.differences(flat(then), flat(now))
    if changed:
        raise TrainError(f"{path} was made with {changed}: resume with the same, or start anew")


def _load_model(run: "Trainer", saved: dict[str, Any], path: Path) -> None:
    own = run.model.state_dict()
    try:
        run.model.load_state_dict(
            {name: wrapping.like(value, own.get(name, value)) for name, value in saved.items()}
        )
    except RuntimeError as error:
        raise TrainError(f"{path} does not fit its own configuration: {error}") from None


def _cuda_states(run: "Trainer") -> list[torch.Tensor]:
    if run.device.type != "cuda":
        return []
    # of several processes each has one device
    return (
        torch.cuda.get_rng_state_all() if run.processes.size == 1 else [torch.cuda.get_rng_state(run.device)]
    )


def _restore_generators(run: "Trainer", state: dict[str, Any]) -> None:
    run.augment_rng.set_state(state["augment_rng"])
    saved = [(state["rng"], state["cuda_rng"]), *state["other_rng"]]
    if run.processes.rank >= len(saved):
        parallel.reseed(run.recipe.seed, run.step, run.processes.rank)
        return
    cpu, cuda = saved[run.processes.rank]
    torch.set_rng_state(cpu)
    if run.device.type == "cuda" and cuda:
        if run.processes.size == 1 and len(cuda) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(cuda)
        else:
            torch.cuda.set_rng_state(cuda[0], run.device)
