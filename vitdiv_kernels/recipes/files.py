"""Recipes from files: those of the package by name, or one of the user's own."""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NamedTuple, get_args

from .recipe import OF_TIMM, Recipe, key_types

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The recipes of the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def load(name_or_path: str | Path) -> Recipe:
    """A recipe of the package by its name, or one from a JSON file.

    Args:
        name_or_path: one of `names()`, or the path of a file. What has a folder or ends in ".json" is a path.

    Raises TypeError for what is neither, and ValueError, with a sentence that names the file, what was found
    and what was expected: for an unknown name, a file that is absent or is not JSON, a key that no recipe has
    or that is there twice, a key that is missing, and a value of the wrong type.

    Example:
        >>> from vitdiv_kernels import recipes
        >>> recipes.load("deepvit_32b").mixup
        0.1
    """
    if not isinstance(name_or_path, (str, Path)):
        raise TypeError(f"name_or_path must be a name or a path, got {type(name_or_path).__name__}")
    path = Path(name_or_path)
    if isinstance(name_or_path, str) and path.name == name_or_path and path.suffix != ".json":
        if name_or_path not in names():
            raise ValueError(
                f"there is no recipe {name_or_path!r}: give one of {', '.join(names())}, or the path of a "
                "JSON file, such as ./mine.json"
            )
        path = _FOLDER / f"{name_or_path}.json"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text in UTF-8: {error.reason} at byte {error.start}") from None
    try:
        content = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} must be JSON: {error.msg} in line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise ValueError(f"{path} must be a recipe, got lists or objects within each other") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return parse(content, str(path))


def parse(content: Any, where: str = "the recipe") -> Recipe:
    """A recipe of the keys and values of its file. Raises ValueError, in which `where` names it."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must hold an object with the keys of a recipe, got {_shown(content)}")
    known = [part.name for part in fields(Recipe)]
    for key in content:
        if key not in known:
            raise ValueError(f"{where} has the unknown key {key!r}: the keys are {', '.join(known)}")
    needed = [p.name for p in fields(Recipe) if p.default is MISSING and p.default_factory is MISSING]
    missing = [name for name in needed if name not in content]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}: a recipe must have {', '.join(needed)}")
    try:
        return Recipe(**content)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def override(recipe: Recipe, settings: Sequence[str], where: str = "--set") -> Recipe:
    """The recipe with other values: each setting is "key=value", the value as in the file.

    "losses.NAME.KEY=value" sets a key of a loss, "losses.NAME=null" takes a loss away. Texts need no quotes.
    Raises ValueError, in which `where` names the option.

    Example:
        >>> from vitdiv_kernels import recipes
        >>> recipe = recipes.load("deit_small")
        >>> recipes.override(recipe, ["lr=1e-4", "auto_augment=null"]).lr
        0.0001
    """
    return changed(recipe, [change(setting, f"{where} {setting}") for setting in settings])


class Change(NamedTuple):
    """A value for a key, with dots for a key of a loss; `where` says in errors where it was given."""

    where: str
    key: str
    value: Any


def change(setting: str, where: str) -> Change:
    """Of "key=value". Raises ValueError."""
    name, sign, text = setting.partition("=")
    name = name.strip()
    if not sign or not all(name.split(".")):
        raise ValueError(f"{where}: must be key=value, such as lr=1e-4, got no key or no '='")
    try:
        value = value_of(text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    hint = key_types().get(name, (None, None))[0]
    # a text that is a number in JSON, such as a title
    if isinstance(value, (int, float)) and str in (hint, *get_args(hint)):
        value = text
    return Change(where, name, value)


def value_of(text: str) -> Any:
    """What a text is in JSON, a number that JSON writes otherwise, such as .5, or else the text. Raises
    ValueError for a key that comes twice, and for lists within each other without end."""
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except json.JSONDecodeError:
        pass
    except RecursionError:
        raise ValueError("must be a value, got lists or objects within each other") from None
    except ValueError:
        if text.lstrip().startswith(("{", "[")):
            raise
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            number = kind(text)
            return number if -math.inf < number < math.inf else text
    return text


def changed(recipe: Recipe, changes: Sequence[Change]) -> Recipe:
    """The recipe after these changes, in their order. Raises ValueError."""
    if not changes:
        return recipe
    content = json.loads(json.dumps(recipe.as_dict()))
    wrong = None  # the first change that does not fit, which a later one may mend
    for where, name, value in changes:
        path = _path(name, content["losses"])
        place = content
        for depth, step in enumerate(path[:-1]):
            if (path[0], depth, step) == ("losses", 2, "options"):
                place.setdefault(step, {})
            if not isinstance(place.get(step), dict):
                raise ValueError(f"{where}: {_no_place(path, depth, content['losses'])}")
            place = place[step]
        if value is None and path[0] == "losses" and len(path) == 2:
            if place.pop(path[1], None) is None:
                raise ValueError(f"{where}: {_no_place(path, 1, place)}")
            continue
        place[path[-1]] = value
        # one of two takes the other's place
        for pair in (("steps", "epochs"), ("warmup", "warmup_epochs")):
            if path[0] in pair and value is not None:
                content[pair[1 - pair.index(path[0])]] = None
        try:
            parse(content, where)
        except ValueError as error:
            wrong = wrong or error
    try:
        made = parse(content, changes[-1].where)
    except ValueError as error:
        raise wrong or error from None
    for where, name, _ in changes if made.augmentation == "light" else ():
        if name in OF_TIMM:
            raise ValueError(
                f"{where}: {name} has no effect with augmentation light: add --set augmentation=timm, "
                "or leave it out"
            )
    return made


def _no_place(path: Sequence[str], depth: int, losses: Any) -> str:
    """What is wrong with a path of keys of which this one is not there."""
    if path[0] != "losses" or depth != 1:
        return f"there is no {path[depth]!r} to set a key of"
    name = path[1]
    return (
        f"the recipe has no loss {name!r} but {', '.join(losses) or 'none'}: add one by "
        f'losses.{name}={{"loss": "koleo"}}'
    )


def _path(name: str, losses: Any) -> list[str]:
    """The keys within each other that a name means: names of losses may have dots."""
    first, _, rest = name.partition(".")
    found = [loss for loss in losses if f"{rest}.".startswith(f"{loss}.")] if isinstance(losses, dict) else []
    if first != "losses" or not found:
        return name.split(".")
    loss = max(found, key=len)
    return [first, loss, *rest[len(loss) + 1 :].split(".")] if rest != loss else [first, loss]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict. Raises ValueError for a key that comes twice, of which JSON keeps the last in silence."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice: {_shown(found[key])} and {_shown(value)}")
        found[key] = value
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"numbers must be finite, got {text}")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
