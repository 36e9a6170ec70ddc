"""Stands for hypothesis where it is not installed: tests that draw cases with it are skipped, by name."""

import sys
from types import ModuleType

import pytest


def install():
    """From here on `from hypothesis import given, settings, strategies` gives this."""
    module = ModuleType("hypothesis")
    module.given = module.settings = lambda *args, **kwargs: lambda function: skipped
    module.strategies = Anything("hypothesis.strategies")
    sys.modules.update({"hypothesis": module, "hypothesis.strategies": module.strategies})


def skipped(*args, **kwargs):
    pytest.skip("hypothesis is not installed")


class Anything(ModuleType):
    def __getattr__(self, name):
        return Anything(name)

    def __call__(self, *args, **kwargs):
        return self
