"""`python -m vitdiv_kernels.info`: versions, which backends are here, and what `backend="auto"` takes."""

import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import __version__, _dispatch, _native

DEVICES = ("cpu", "cuda")


def report() -> str:
    """Versions; backends, with the reason for each absent one; what `auto` takes per operation and device."""
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
        ("native, CPU", _here_or_not("native", "cpu", _cpu_facts)),
        ("native, CUDA", _here_or_not("native", "cuda", _cuda_facts) + _cuda_build()),
        ("triton, CUDA", _here_or_not("triton", "cuda", _triton_facts)),
        ("triton, CPU", _here_or_not("triton", "cpu", lambda: "in Triton's interpreter, for tests")),
    ]
    return "Backends\n" + _table(rows)


def _here_or_not(backend: str, device: str, facts: Callable[[], str]) -> str:
    why_not = _dispatch.missing(backend, device)
    return f"absent: {why_not}" if why_not else f"here: {facts()}"


def _cpu_facts() -> str:
    library: Any = _native.library()
    limit, threads = os.environ.get("VITDIV_CPU_CAPABILITY", "not set"), library.num_threads()
    return (
        f"compiled for torch {library.built_for_torch}; instruction set {library.cpu_capability()} "
        f"(processor: {torch.backends.cpu.get_cpu_capability().lower()}, VITDIV_CPU_CAPABILITY: {limit}); "
        f"{threads} thread{'s' * (threads != 1)}"
    )


def _cuda_facts() -> str:
    return f"on {_gpu()}"


def _cuda_build() -> str:
    """What was compiled for GPUs, which a machine without one can tell, too."""
    if not _native.CUDA_OPERATIONS:
        return ""
    operations = ", ".join(_native.CUDA_OPERATIONS)
    library: Any = _native.library()
    return f"; compiled for {library.cuda_architectures}: {operations}"


def _triton_facts() -> str:
    return f"triton {_installed('triton')} on {_gpu()}"


def _gpu() -> str:
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}"


def _auto() -> str:
    rows = []
    for operation in _dispatch.OPERATIONS:
        for device in DEVICES:
            for condition in (None, *_conditions(operation, device)):
                case = ", ".join(filter(None, (operation, device, condition)))
                rows.append((case, "{}: {}".format(*_dispatch.auto_choice(operation, device, condition))))
    for _, operation, condition, backend, reason in _dispatch.TABLE:
        if condition and operation == "*":
            rows.append((f"every operation, {condition}", f"{backend}: {reason}"))
    override = os.environ.get("VITDIV_BACKEND")
    unless = f", were it not for VITDIV_BACKEND={override}" if override else ""
    return f'What backend="auto" takes{unless}\n{_table(rows)}'


def _conditions(operation: str, device: str) -> list[str]:
    """The conditions for which the table has a row of this operation."""
    return [
        condition
        for row_device, row_operation, condition, _, _ in _dispatch.TABLE
        if condition and row_device in ("*", device) and row_operation == operation
    ]


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:{width}}  {text}" for name, text in rows)


if __name__ == "__main__":
    print(report())
