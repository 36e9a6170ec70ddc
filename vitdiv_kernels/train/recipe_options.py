"""The keys of a recipe as options of the command line: each changes the recipe that --recipe names."""

import argparse
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any, get_args

from .. import recipes
from ..recipes import Recipe
from ..recipes.files import Change, change, changed, value_of
from .errors import TrainError
from .loss_weights import as_recipe, parse_losses

DEFAULT = "plain"


def block_list(text: str) -> Any:
    """`8-11,15` as a list of blocks; any other text is for the recipe to judge."""
    blocks: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            return value_of(text)
        blocks += range(int(first), int(last or first) + 1)
    return sorted(set(blocks))


# what a text means that is not written as in a file
READ: dict[str, Callable[[str], Any]] = {
    "losses": lambda text: as_recipe(parse_losses(text)),
    "reattention": block_list,
}


class Given(argparse.Action):
    """Keeps key and text; recipes change in the order of the command line."""

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        text = "true" if self.nargs == 0 else values
        namespace.given = [*namespace.given, (self.dest, text, option_string)]


def options_of_recipes() -> dict[str, list[Field]]:
    """The keys that are options, by the titles under which they stand."""
    groups: dict[str, list[Field]] = {}
    for part in fields(Recipe):
        if part.metadata.get("help"):
            groups.setdefault(part.metadata["group"], []).append(part)
    return groups


def add_recipe_options(parser: argparse.ArgumentParser, default: str = DEFAULT) -> None:
    """Adds --recipe, --set, --print-recipe, and the options that are keys of a recipe."""
    group = parser.add_argument_group("the recipe, which the options below change in their order")
    group.add_argument(
        "--recipe", default=default, metavar="NAME|FILE.json", help=f"{', '.join(recipes.names())}, or a file"
    )
    group.add_argument(
        "--set", action=Given, default=argparse.SUPPRESS, metavar="KEY=VALUE",
        help="any key of the recipe, such as mixup=0.8 or losses.cosine.weight=0.1",
    )  # fmt: skip
    group.add_argument("--print-recipe", action="store_true", help="print the recipe as JSON, and end")
    plain = recipes.load(default)
    for title, parts in options_of_recipes().items():
        group = parser.add_argument_group(title)
        together: dict[str, argparse._ActionsContainer] = {}
        for part in parts:
            if other := part.metadata.get("instead_of"):
                both = group.add_mutually_exclusive_group()
                together |= {part.name: both, other: both}
        for part in parts:
            _add(together.get(part.name, group), part, getattr(plain, part.name))
    parser.set_defaults(given=[])


def _add(group: argparse._ActionsContainer, part: Field, value: Any) -> None:
    about = part.metadata
    shown = f" (default: {value})" if value not in (None, False) and value != {} else ""
    more: dict[str, Any] = {"nargs": 0} if part.default is False else {"metavar": about.get("metavar")}
    if about.get("alone"):
        more |= {"nargs": "?", "const": about["alone"]}
    option = about.get("option") or "--" + part.name.replace("_", "-")
    group.add_argument(
        option, dest=part.name, action=Given, default=argparse.SUPPRESS, help=about["help"] + shown, **more
    )


def chosen(args: argparse.Namespace) -> Recipe:
    """The recipe that the options choose and change. Raises TrainError, with file or option and key."""
    try:
        return changed(recipes.load(args.recipe), changes(args))
    except ValueError as error:
        raise TrainError(str(error), told_by_main=True) from None


def changes(args: argparse.Namespace) -> list[Change]:
    """What the options change. Raises ValueError."""
    texts = {part.name for part in fields(Recipe) if str in (part.type, *get_args(part.type))}
    made = []
    for key, text, option in args.given:
        where = f"{option} {text}"
        if key == "set":
            made.append(change(text, where))
            continue
        read = READ.get(key, str if key in texts else value_of)
        try:
            made.append(Change(where, key, read(text)))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return made


def said_by(args: argparse.Namespace, wrong: str) -> str:
    """What gives the key its value that a sentence begins with, else the model: an option, or the recipe."""
    first = wrong.partition(" ")[0]
    key = first if first in {part.name for part in fields(Recipe)} else "model"
    return next((c.where for c in reversed(changes(args)) if c.key == key), f"the recipe {args.recipe}")
