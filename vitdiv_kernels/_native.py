"""Loads the compiled extension `vitdiv_kernels._C` once and remembers why it is not there."""

import importlib
import json
import os
import re
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch  # first: it loads the shared libraries that the extension is linked to

# The operators and their kernels, without Python: what a C++ program that runs an exported model loads.
OPERATORS = Path(__file__).with_name("libvitdiv.dylib" if sys.platform == "darwin" else "libvitdiv.so")


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _why_unusable(facts_file: Path) -> str | None:
    """What is known before importing the extension, which beside another torch may fail in obscure ways."""
    if not facts_file.exists():
        compiled = _compiled_elsewhere(facts_file.parent)
        if compiled is None:
            return (
                "the kernels are not compiled: run `pip install .` in the source tree, with a C++ compiler "
                "there"
            )
        return (
            f"Python took {facts_file.parent}, whose kernels are not compiled, and not the compiled copy in "
            f"{compiled}: start it in a folder other than {facts_file.parent.parent}, or compile the kernels "
            "here with `pip install --no-build-isolation -e .`"
        )
    facts = json.loads(facts_file.read_text())
    built_for = facts["torch"]
    if built_for is None:
        return facts["reason"]
    built, running = _minor(built_for), _minor(torch.__version__)
    if built != running:
        return (
            f"the kernels were compiled for torch {built}, but torch {running} is running: reinstall "
            "from the source tree with `pip install --no-build-isolation --no-deps .`"
        )
    modules = sorted(path.name for path in facts_file.parent.glob("_C.*"))
    if modules and not {f"_C{suffix}" for suffix in EXTENSION_SUFFIXES} & set(modules):
        return (
            f"the kernels were compiled for another Python, as {modules[0]}, and this one loads "
            f"_C{EXTENSION_SUFFIXES[0]}: reinstall with it, from the source tree, with "
            "`pip install --no-build-isolation --no-deps .`"
        )
    return None


def _compiled_elsewhere(package: Path) -> Path | None:
    """Another copy of the package on sys.path that has its kernels: the one that `pip install .` made.

    In a source tree `python -m` and `python -c` find the folder of sources first.
    """
    for entry in sys.path:
        other = Path(entry).absolute() / package.name
        facts = other / "_build.json"
        if os.path.isfile(facts) and json.loads(facts.read_text())["torch"] is not None:
            return other
    return None


def _load() -> tuple[ModuleType | None, str | None]:
    reason = _why_unusable(Path(__file__).with_name("_build.json"))
    if reason is None:
        try:
            return importlib.import_module("vitdiv_kernels._C"), None
        except ImportError as error:
            reason = f"the compiled kernels could not be loaded: {error}"
    warnings.warn(
        f"vitdiv_kernels runs on its slower reference backend: {reason}", RuntimeWarning, stacklevel=2
    )
    return None, reason


# At import and not at the first call, which torch.compile may be tracing. It takes about a millisecond.
_library, _reason = _load()


def library() -> ModuleType | None:
    """The compiled extension, or None if it cannot be used."""
    return _library


def reason() -> str | None:
    """One sentence on why `library()` is None; None if the extension is here."""
    return _reason


# The operations of csrc/kernels.def, which have compiled kernels, and CUDA kernels if those were built.
OPERATIONS = tuple(_library.kernels) if _library else ()
CUDA_OPERATIONS = OPERATIONS if _library and _library.with_cuda else ()


def runs_on(architectures: str, major: int, minor: int) -> bool:
    """Whether kernels for these architectures, in CMake's words, run on a GPU of this compute capability."""
    for number, suffix, real in re.findall(r"(\d+)([af]?)(-real)?", architectures):
        compiled, present = divmod(int(number), 10), (major, minor)
        if suffix == "a":
            fits = compiled == present
        elif suffix or real:  # machine code: a family's
            fits = compiled[0] == major and compiled <= present
        else:  # PTX beside it
            fits = compiled <= present
        if fits:
            return True
    return False
