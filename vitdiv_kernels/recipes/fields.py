"""Keys of a recipe: fields of a dataclass that know which values they take, and how they are said."""

import math
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, Literal, Union, get_args, get_origin


def key(
    default: Any,
    low: float | None = None,
    high: float = math.inf,
    *,
    help: str | None = None,
    group: str = "how to train it",
    **about: Any,
) -> Any:
    """A field; of one with a default of `...` a value must be given.

    Args:
        low, high: limits of a number.
        help, group, about: makes it an option of the trainer's command line, too: what it is; under which
            title it stands; its `option`, `metavar` and `choices`, where these are not by its name and type,
            `alone`, the text that the option means without one, and `instead_of`, another key that can't be
            given at the same time.
    """
    limits = None if low is None else (low, high)
    made: dict[str, Any] = {"metadata": {"limits": limits, "help": help, "group": group} | about}
    if default is not ...:
        made |= {"default_factory" if callable(default) else "default": default}
    return field(**made)


def fits(value: Any, hint: Any, limits: tuple[float, float] | None) -> bool:
    """Whether a value, as JSON gives it, is of the type and within the limits."""
    return _of_type(value, hint) and _within(value, limits)


def expected(hint: Any, limits: tuple[float, float] | None) -> str:
    """The type in words, with its limits."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    words = []
    numbers = 0
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    several = {int: "a list of whole numbers", float: "a list of numbers", str: "a list of texts"}
    for one in options:
        if get_origin(one) is Literal:
            words += [repr(text) for text in get_args(one)]
        elif get_origin(one) is Mapping:
            words.append("names and their losses")
        elif get_origin(one) is Sequence:
            words.append(several[get_args(one)[0]])
        else:
            words.append(names.get(one, "null"))
        if "number" in words[-1]:
            numbers = len(words) - 1
    if limits:
        low, high = limits
        words[numbers] += f" of at least {low}" if high == math.inf else f" from {low} to {high}"
    return " or ".join(words)


def _of_type(value: Any, hint: Any) -> bool:
    kind = get_origin(hint)
    if kind in (Union, types.UnionType):
        return any(_of_type(value, one) for one in get_args(hint))
    if kind is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if kind is Sequence:
        return isinstance(value, (list, tuple)) and all(_of_type(one, get_args(hint)[0]) for one in value)
    if kind is Mapping:
        return isinstance(value, Mapping)
    if hint is float:
        # an integer of JSON may be larger than every float
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and -sys.float_info.max <= value <= sys.float_info.max
    if hint is int:
        # up to what a float holds exactly, since learning rates are computed from some
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 2**53
    return isinstance(value, hint)


def _within(value: Any, limits: tuple[float, float] | None) -> bool:
    if limits is None or value is None or isinstance(value, str):
        return True
    values = value if isinstance(value, (list, tuple)) else [value]
    return all(limits[0] <= one <= limits[1] for one in values)
