"""`python -m vitdiv_kernels.info`: what is installed, which backends are here, and what `backend="auto"` takes."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__, _dispatch, _native

DEVICES = ("cpu", "cuda")


def report() -> str:
    """Versions, backends with the reason for each absent one, and the choice of `auto` per operation and device."""
    return "\n\n".join([_versions(), _backends(), _auto()])


def _versions() -> str:
    rows = [
        ("vitdiv_kernels", f"{__version__} in {os.path.dirname(__file__)}"),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        ("numpy", _installed("numpy")),
        ("triton", _installed("triton")),
        ("threads", f"{torch.get_num_threads()} (torch.set_num_threads)"),
    ]
    return _table(rows)


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _backends() -> str:
    rows = [
        ("reference", "here: plain PyTorch, every device"),
        ("native, CPU", _here_or_not("native", "cpu", _native_facts)),
        ("native, CUDA", _here_or_not("native", "cuda", _native_facts)),
        ("triton", _here_or_not("triton", "cuda", lambda: f"triton {_installed('triton')}")),
    ]
    return "Backends\n" + _table(rows)


def _here_or_not(backend: str, device: str, facts) -> str:
    # Any operation will do: a backend has all of them or none.
    why_not = _dispatch.missing(backend, _dispatch.OPERATIONS[0], device)
    return f"absent: {why_not}" if why_not else f"here: {facts()}"


def _native_facts() -> str:
    library = _native.library()
    limit = os.environ.get("VITDIV_CPU_CAPABILITY", "not set")
    return (
        f"compiled for torch {library.built_for_torch}; instruction set {library.cpu_capability()} "
        f"(processor: {torch.backends.cpu.get_cpu_capability().lower()}, VITDIV_CPU_CAPABILITY: {limit}); "
        f"{library.num_threads()} threads"
    )


def _auto() -> str:
    conditions = dict.fromkeys(
        condition for _, _, condition, _, _ in _dispatch.TABLE if condition is not None
    )
    rows = []
    for operation in _dispatch.OPERATIONS:
        for device in DEVICES:
            usual = _dispatch.auto_choice(operation, device)
            rows.append((f"{operation}, {device}", "{}: {}".format(*usual)))
            for condition in conditions:
                choice = _dispatch.auto_choice(operation, device, condition)
                if choice != usual:
                    rows.append((f"{operation}, {device}, {condition}", "{}: {}".format(*choice)))
    override = os.environ.get("VITDIV_BACKEND")
    title = 'What backend="auto" takes'
    if override:
        title += f", were it not for VITDIV_BACKEND={override}"
    return f"{title}\n{_table(rows)}"


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:{width}}  {text}" for name, text in rows)


if __name__ == "__main__":
    print(report())
