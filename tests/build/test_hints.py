"""Every public function, class and method tells the types of its arguments and of what it returns."""

import importlib
import inspect

import vitdiv_kernels
from vitdiv_kernels import losses, nn

MODULES = [
    *(f"attach.{name}" for name in ("families", "monitor", "objective", "parts", "terms")),
    *(f"train.{name}" for name in ("augmentation", "checkpoint", "cli", "data", "earlier")),
    *(f"train.{name}" for name in ("logs", "loop", "loss_weights", "recipe_options", "report")),
    *(f"train.{name}" for name in ("evaluation", "files", "init", "models", "optimizer", "options")),
    "train.decoding",
    *(f"train.segment.{name}" for name in ("augment", "folder", "heads", "labels", "measures", "model")),
    *(f"train.segment.{name}" for name in ("pairs", "pictures", "scenes", "settings", "task", "windows")),
    *(f"train.{name}" for name in ("parallel", "parts.base", "settings", "state", "task", "tasks")),
    *("fusing.api", "fusing.report", "info", "train.wrapping"),
    *(f"recipes.{name}" for name in ("fields", "files", "mixing", "recipe", "schedule", "with_timm")),
    *(f"vit.{name}" for name in ("checkpoints", "configs", "files", "model", "parts")),
    *(f"ops.pairs.{name}.api" for name in ("pairwise_cosine", "pairwise_rows", "two_gram")),
    *(f"ops.maps.{name}.api" for name in ("attention_gram", "reattention")),
]


def public():
    """Names and objects: those in __all__ of the packages, and those that other modules define."""
    for package in (vitdiv_kernels, losses, nn):
        yield from ((name, getattr(package, name)) for name in package.__all__)
    for name in MODULES:
        module = importlib.import_module(f"vitdiv_kernels.{name}")
        for attribute, value in vars(module).items():
            if not attribute.startswith("_") and getattr(value, "__module__", None) == module.__name__:
                yield f"{name}.{attribute}", value


def functions():
    for name, value in public():
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            for attribute, member in vars(value).items():
                member = getattr(member, "__func__", getattr(member, "fget", member))
                if inspect.isfunction(member) and (attribute == "__init__" or not attribute.startswith("_")):
                    yield f"{name}.{attribute}", member


def without_hints(function):
    parameters = list(inspect.signature(function).parameters.values())
    if "." in function.__qualname__ and "<locals>" not in function.__qualname__:
        parameters = parameters[1:]  # self
    names = [p.name for p in parameters if p.annotation is p.empty]
    return names + ["return"] * (inspect.signature(function).return_annotation is inspect.Signature.empty)


FUNCTIONS = dict(functions())


def test_all_of_them_are_found():
    assert len(FUNCTIONS) > 120
    assert {"reattention", "koleo", "CollapseMonitor.measure", "train.loop.Trainer.fit"} <= set(FUNCTIONS)


def test_hints_are_complete():
    missing = {name: without_hints(function) for name, function in FUNCTIONS.items()}
    assert {name: names for name, names in missing.items() if names} == {}


def test_what_has_no_hints_is_seen():
    def function(x, y: int): ...

    assert without_hints(function) == ["x", "return"]
