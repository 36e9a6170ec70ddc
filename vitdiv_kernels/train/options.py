"""Dataclasses whose fields are options of a command line."""

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Options = TypeVar("Options")


def option(
    default: Any,
    help: str,
    *,
    parse: Callable[[str], Any] | None = None,
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    alone: Any = None,
    given: str | None = None,
    instead_of: str | None = None,
) -> Any:
    """A field of a dataclass that is an option, too: `--its-name`, a flag where the default is False.

    Args:
        default: the field's, or a function without arguments that makes it.
        parse: makes the value of the text; it raises argparse.ArgumentTypeError.
        alone: the value of the option without a text; None if it needs one.
        given: the text that gives the default, shown in the help.
        instead_of: another field, which can't be given at the same time.
    """
    about = {"help": help, "parse": parse, "choices": choices, "metavar": metavar, "alone": alone}
    about |= {"given": given, "instead_of": instead_of}
    kind = "default_factory" if callable(default) else "default"
    return dataclasses.field(**{kind: default}, metadata=about)


def options_of(kind: type) -> list[dataclasses.Field]:
    """The fields that are options."""
    return [part for part in dataclasses.fields(kind) if "help" in part.metadata]


def add_options(group: argparse._ActionsContainer, kind: type) -> None:
    """Adds an option for each field of the dataclass that `option` made."""
    fields = options_of(kind)
    together: dict[str, argparse._ActionsContainer] = {}
    for part in fields:
        if part.metadata["instead_of"]:
            both = group.add_mutually_exclusive_group()
            together |= {part.name: both, part.metadata["instead_of"]: both}
    for part in fields:
        about, name = part.metadata, "--" + part.name.replace("_", "-")
        container = together.get(part.name, group)
        make = part.default_factory
        default = part.default if make is dataclasses.MISSING else make()
        if default is False:
            container.add_argument(name, action="store_true", help=about["help"])
            continue
        more = {name: about[name] for name in ("choices", "metavar") if about[name] is not None}
        if about["parse"]:
            more["type"] = about["parse"]
        if about["alone"] is not None:
            more |= {"nargs": "?", "const": about["alone"]}
        container.add_argument(name, default=about["given"] or default, help=about["help"], **more)


def collect(kind: type[Options], args: argparse.Namespace) -> Options:
    """An instance of the dataclass, with the options that were given."""
    return kind(**{part.name: getattr(args, part.name) for part in options_of(kind)})


def chosen(options: Any) -> dict[str, Any]:
    """The values of the fields that are options, by name."""
    return {part.name: getattr(options, part.name) for part in options_of(type(options))}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help where there is one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default is None or action.default is False
        return action.help or "" if silent else super()._get_help_string(action) or ""


class ListingFormatter(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Leaves the lines of the epilog as they are."""


def number(kind: type[int] | type[float], low: float, high: float = float("inf")) -> Callable[[str], float]:
    """An argparse type: a number of the kind from low to high, refused with a sentence."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high and math.isfinite(value):
                return value
        bound = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
        kind_of = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {kind_of} {bound}, got {text!r}")

    return parse
