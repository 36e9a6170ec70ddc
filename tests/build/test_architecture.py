"""The rooms of the package: imports go one way, and nobody takes what is private to another folder."""

import ast

import pytest
from places import ROOT

PACKAGE = ROOT / "vitdiv_kernels"
# A folder imports from those above it, from its own subfolders and from the modules of the package itself.
ROOMS = (
    "", "ops", "ops/pairs", "ops/maps", "losses", "nn", "fusing", "attach", "recipes", "vit", "train", "demo",
)  # fmt: skip
# Modules that stand at the top for their users, and belong to a room.
DOORS = {"__init__": "attach", "info": "attach", "report": "demo"}


def room_of(path):
    """The innermost of ROOMS that this file is in, and the folder itself."""
    folder = path.parent.relative_to(PACKAGE).as_posix()
    folder = "" if folder == "." else folder
    if folder == "" and path.stem in DOORS:
        return DOORS[path.stem]
    return max((room for room in ROOMS if f"{folder}/".startswith(f"{room}/" if room else "")), key=len)


def imported(path):
    """The modules of the package that a file imports, as paths, with the name that it takes of each."""
    package = ["vitdiv_kernels", *path.parent.relative_to(PACKAGE).parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module or "").split(".")
            for alias in node.names:
                yield module(list(filter(None, base)), alias.name)


def module(base, name):
    folder = PACKAGE.joinpath(*base[1:])
    for path in (
        folder / f"{name}.py",
        folder / name / "__init__.py",
        folder.with_suffix(".py"),
        folder / "__init__.py",
    ):
        if path.exists():
            return path, name
    raise AssertionError(f"no module {'.'.join(base)} with {name}")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent.name != "__pycache__")


def wrong_way(path, target):
    return ROOMS.index(room_of(target)) > ROOMS.index(room_of(path))


def taken_from_another(path, target):
    """Whether the module is private to a folder that this file is not in."""
    folder = target.parent
    if target.stem == "__init__":
        folder, private = folder.parent, folder.name.startswith("_")
    else:
        private = target.stem.startswith("_")
    return private and not path.is_relative_to(folder)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path):
    for target, name in imported(path):
        assert not wrong_way(path, target), f"{name} of {target}"
        assert not taken_from_another(path, target), f"{name} of {target}"
        assert name.startswith("__") or not name.startswith("_") or target.stem == name, f"{name} of {target}"


def test_what_goes_the_wrong_way_is_seen():
    assert wrong_way(PACKAGE / "ops/maps/reattention/api.py", PACKAGE / "losses/dense.py")
    assert wrong_way(PACKAGE / "ops/_launch.py", PACKAGE / "ops/pairs/_tiles.py")
    assert not wrong_way(PACKAGE / "losses/dense.py", PACKAGE / "_checks.py")
    assert taken_from_another(PACKAGE / "attach/monitor.py", PACKAGE / "losses/_common.py")
    assert taken_from_another(PACKAGE / "ops/pairs/two_gram/api.py", PACKAGE / "ops/maps/_triton/__init__.py")
    assert not taken_from_another(PACKAGE / "ops/pairs/two_gram/api.py", PACKAGE / "ops/_operators.py")


def test_what_is_learned_does_not_know_how_runs_go():
    """Tasks are given to the loop: they take no part of it."""
    train = PACKAGE / "train"
    runs = {train / f"{name}.py" for name in ("cli", "loop", "report", "state", "tasks")}
    for path in (train / "task.py", *(train / "segment").glob("*.py")):
        taken = {target for target, _ in imported(path)}
        assert not taken & runs, path
        assert not any(target.is_relative_to(train / "parts") for target in taken), path
