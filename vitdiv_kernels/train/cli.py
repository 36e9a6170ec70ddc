"""What the command lines share."""

import argparse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help where there is one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


def number(kind: type, low: float, high: float = float("inf")):
    """An argparse type: a number of the kind from low to high, refused with a sentence."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            bound = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(
                f"must be {'a whole' if kind is int else 'a'} number {bound}, got {text!r}"
            )
        return value

    return parse
