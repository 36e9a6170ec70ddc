"""The papers' recipes, as files that a person can read and override: model, losses, optimizer, images.

They are JSON: the standard library of Python 3.10 reads it, and TOML from 3.11 on only.
"""

from .files import load, names, override, parse
from .mixing import Mixed, mix
from .recipe import Recipe
from .schedule import Schedule

__all__ = ["Mixed", "Recipe", "Schedule", "load", "mix", "names", "override", "parse"]
