"""Which backend runs a call: the table behind `backend="auto"`, and what overrides it.

In order: the `backend` argument of the call; the innermost `use_backend`; the environment variable
VITDIV_BACKEND, read once at import; the table. Only the table falls back. The other three are explicit: when
the backend they name cannot run the call, the call raises.
"""

import contextvars
import functools
import importlib.util
import inspect
import os
import pkgutil
import re
from collections.abc import Callable
from typing import Any, TypeVar, get_args

import torch

from . import _native
from ._exporting import exporting
from ._types import Backend

BACKENDS = get_args(Backend)
# The folders of the families, ops/<family>/<operation>.
OPERATIONS = tuple(
    name
    for family in ("pairs", "maps")
    for _, name, is_package in pkgutil.iter_modules([os.path.join(os.path.dirname(__file__), "ops", family)])
    if is_package and not name.startswith("_")
)

# Conditions of a call that some backend cannot meet; at most one counts: export first, then dropout.
EXPORT = "export to ONNX or TorchScript"
DROPOUT = "dropout"
TRITON_HEADS = 32
MANY_HEADS = f"more than {TRITON_HEADS} heads"
_NO_OPERATORS = (
    'exports to ONNX and torch.jit.trace take backend="reference" only, not "{}": what they write must run '
    "without this package"
)
_UNSUPPORTED = {
    (EXPORT, "native"): _NO_OPERATORS.format("native"),
    (EXPORT, "triton"): _NO_OPERATORS.format("triton"),
    (DROPOUT, "native"): 'attention dropout in training is done by backend="reference" only, not by "native"',
    (DROPOUT, "triton"): 'attention dropout in training is done by backend="reference" only, not by "triton"',
    (MANY_HEADS, "triton"): (
        f"the Triton kernels hold the maps of at most {TRITON_HEADS} heads, of both layers together; use "
        'backend="reference" for more'
    ),
}

# The first row that matches the call, and whose backend is here, is taken.
TABLE = (
    # device, operation, condition, backend, reason
    ("*", "*", EXPORT, "reference", "what is exported must run without this package"),
    ("*", "reattention", DROPOUT, "reference", "attention dropout is done by the reference operation only"),
    ("cpu", "*", None, "native", "compiled C++ kernels"),
    ("cuda", "attention_gram", MANY_HEADS, "reference", f"Triton holds the maps of {TRITON_HEADS} heads"),
    ("cuda", "reattention", MANY_HEADS, "reference", f"Triton holds the maps of {TRITON_HEADS} heads"),
    ("cuda", "*", None, "triton", "Triton kernels"),
    ("*", "*", None, "reference", "plain PyTorch, on every device"),
)

# Loaded here, once, so that no call and no torch.compile trace runs into the loading.
_NATIVE_MISSING = None if _native.library() is not None else _native.reason()


# Before it tl.dot takes no float64, and no matrices of fewer than 16 rows or columns.
_FIRST_TRITON = 3, 5


def _no_triton(found):
    """Why Triton, whose importlib spec this is, cannot be used. Importing it would read TRITON_INTERPRET."""
    if found is None or found.origin is None:  # a folder of that name is no package
        return (
            "Triton is not installed: `pip install triton`, or a CUDA build of torch, brings it (Linux only)"
        )
    with open(found.origin, encoding="utf-8") as file:
        version = re.search(r"""^__version__ = ["'](\d+)\.(\d+)""", file.read(), re.MULTILINE)
    if version is None or tuple(map(int, version.groups())) >= _FIRST_TRITON:
        return None
    return (
        f"the Triton kernels need Triton {'.'.join(map(str, _FIRST_TRITON))} or newer, and this is "
        f"{'.'.join(version.groups())}: install torch 2.9 or newer for CUDA, which brings it"
    )


_TRITON_MISSING = _no_triton(importlib.util.find_spec("triton"))
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def missing(backend, device, condition=None, operation=None):
    """Why `backend` cannot run calls on this device: a sentence, or None when it can.

    `device` is a torch.device, or a device type, which stands for the current device. Without an operation,
    None says that it can run some.
    """
    return _UNSUPPORTED.get((condition, backend)) or _absent(backend, device, operation)


def _absent(backend, device, operation):
    if backend == "reference":
        return None
    if backend == "triton":
        # the device first: where there is no GPU, to install Triton does not help
        return _triton_absent_on(device) or _TRITON_MISSING
    kind = _type(device)
    if kind not in ("cpu", "cuda"):
        return f'native kernels run on CPU and CUDA tensors, got {kind}; use backend="auto" or "reference"'
    if _NATIVE_MISSING:
        return _NATIVE_MISSING
    return _native_absent_on_gpu(operation, device) if kind == "cuda" else _native_absent_on_cpu(operation)


def _type(device):
    return device if isinstance(device, str) else device.type


def _native_absent_on_cpu(operation):
    if operation is None or operation in _native.OPERATIONS:
        return None
    return f'there is no compiled kernel for {operation}; use backend="auto" or "reference"'


def _native_absent_on_gpu(operation, device):
    architectures = _native.library().cuda_architectures
    if not architectures:
        return (
            "the kernels were compiled for CPUs only: install the CUDA toolkit, put nvcc on PATH and run "
            "`VITDIV_CUDA=1 pip install .` in the source tree"
        )
    if operation is not None and operation not in _native.CUDA_OPERATIONS:
        return f'there is no CUDA kernel for {operation}; use backend="auto" or "triton"'
    why_not = _gpu_unfit("CUDA", device)
    if why_not is not None:
        return why_not
    why_not = _driver_too_old()
    if why_not is not None:
        return why_not
    gpu = _properties(device)
    if not _native.runs_on(architectures, gpu.major, gpu.minor):
        return (
            f"the CUDA kernels were compiled for {architectures}, and {gpu.name} has compute capability "
            f"{gpu.major}.{gpu.minor}: reinstall from the source tree with TORCH_CUDA_ARCH_LIST="
            f"{gpu.major}.{gpu.minor}"
        )
    return None


# The first NVIDIA driver for each major version of CUDA. Within one, older drivers run newer runtimes.
_DRIVERS = {12: "525", 13: "580"}


def _driver_too_old():
    """torch may be of an older CUDA, and run: the kernels bring the runtime of their own nvcc."""
    library = _native.library()
    runtime, driver = library.cuda_runtime_version(), library.cuda_driver_version()
    major, latest = runtime // 1000, driver // 1000
    if latest >= major:
        return None
    needed = f" ({_DRIVERS[major]} or newer)" if major in _DRIVERS else ""
    return (
        f"the CUDA kernels were compiled with CUDA {major}.{runtime % 1000 // 10}, which needs an NVIDIA "
        f"driver for CUDA {major}{needed}, and the driver here is for CUDA {latest}.{driver % 1000 // 10}: "
        f"update the driver, or reinstall from the source tree with CUDACXX naming an nvcc of CUDA {latest}"
    )


def _triton_absent_on(device):
    kind = _type(device)
    if kind == "cpu":
        if _INTERPRETED:
            return None
        return (
            "the Triton kernels run on CUDA tensors; on CPU tensors only to test them, in Triton's slow "
            "interpreter, with TRITON_INTERPRET=1 in the environment from the start"
        )
    if kind != "cuda":
        return f"the Triton kernels run on CUDA tensors only, got {kind}"
    return _gpu_unfit("Triton", device)


def _gpu_unfit(kernels, device):
    if not torch.cuda.is_available():
        return "torch sees no CUDA device here"
    if torch.version.hip:
        return f"the {kernels} kernels are made for NVIDIA GPUs, and this is a ROCm build of torch"
    gpu = _properties(device)
    if gpu.major < 8:
        return (
            f"the {kernels} kernels need a GPU of compute capability 8.0 or newer (Ampere), and {gpu.name} "
            f"has {gpu.major}.{gpu.minor}"
        )
    return None


def _properties(device):
    index = None if isinstance(device, str) else device.index
    return torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)


def auto_choice(operation, device, condition=None):
    """What `auto` takes by the table: (backend, reason), the reason with what was passed over and why."""
    kind, passed_over = _type(device), ""
    for row_device, row_operation, row_condition, backend, reason in TABLE:
        if (
            row_device in ("*", kind)
            and row_operation in ("*", operation)
            and row_condition in (None, condition)
        ):
            why_not = missing(backend, device, condition, operation)
            if why_not is None:
                return backend, reason + passed_over
            passed_over += f" ({backend} is not here: {why_not})"
    raise AssertionError("the last row of the table matches every call")


def resolve(operation, device, backend, condition=None):
    """The backend that runs this call; raises when an explicit choice cannot.

    `device` is that of the tensors, as for `missing`.
    """
    source = ""
    if backend == "auto":
        choice = _current_choice()
        backend, source = choice.backend, choice.source
    if _exporting():
        condition = EXPORT
    if backend == "auto":
        return auto_choice(operation, device, condition)[0]
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}{source}")
    why_not = missing(backend, device, condition, operation)
    if why_not is not None:
        error = ValueError if (condition, backend) in _UNSUPPORTED else RuntimeError
        raise error(f'backend "{backend}"{source} cannot run {operation}: {why_not}')
    return backend


def _exporting():
    # torch.jit.trace is also what torch.onnx.export(dynamo=False) runs
    return torch.jit.is_tracing() or (exporting() and _exporting_to_onnx())


def _exporting_to_onnx():
    return torch.onnx.is_in_onnx_export()  # takes microseconds: it imports


# What torch.compiler.assume_constant_result sets, without its import of torch._dynamo. The exporter tries
# with dynamo what failed without it, and dynamo takes is_in_onnx_export for False.
_exporting_to_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]


_innermost: contextvars.ContextVar[Any] = contextvars.ContextVar("vitdiv_kernels.use_backend")


class _Choice:
    """A backend, or "auto" for the table; who asked for it; the choice outside of its block."""

    def __init__(self, backend, source="", outer=None):
        self.backend, self.source, self.outer = backend, source, outer

    # The choice of the innermost block of this thread or task; without one this choice itself, which a
    # property hands to `get` as the default. torch.compile cannot trace ContextVar.get, but it guards on the
    # value of a property whose getter is in C, and compiles anew for another one.
    innermost = property(_innermost.get)


_traced: Any = None  # the choice of the innermost block that torch.compile is tracing


def _current_choice():
    if torch.compiler.is_dynamo_compiling() and _traced is not None:
        return _traced
    return _environment.innermost


Function = TypeVar("Function", bound=Callable[..., Any])


class use_backend:
    """Within the block, calls with `backend="auto"` take this backend: `with use_backend("reference"): ...`.

    The choice is explicit, so a call that the backend cannot run raises. Blocks nest, and one object may be
    entered several times; `use_backend("auto")` gives the table back. Also a decorator, of functions and of
    `async def` functions.

    It holds for the thread or asyncio task that entered the block, and for tasks that are created in it.
    Threads that are started in it do not see it (on free-threaded Python 3.14 and newer they do); nor do
    autograd's own threads, in which the backward of CUDA tensors computes checkpointed blocks again: there
    `checkpoint(..., context_fn=lambda: (nullcontext(), use_backend(...)))` helps. For a whole program set
    VITDIV_BACKEND. A generator that yields within the block leaves the choice to its caller until it goes on.

    torch.compile traces blocks that are made in the compiled function, and compiles a function anew when it
    is called in another block.

    Raises:
        ValueError: an unknown name.
        TypeError: as a decorator, what is not a function, and generator functions: write the block in them.

    Example:
        >>> with use_backend("reference"):
        ...     loss = pairwise_cosine(torch.randn(2, 16, 32))
    """

    def __init__(self, backend: Backend) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
        self.backend = backend

    # Without a token, which ContextVar.reset wants from the thread that set it: an object may be in several.
    def __enter__(self) -> "use_backend":
        global _traced
        source = " (set by use_backend)"
        if torch.compiler.is_dynamo_compiling():  # which does not trace ContextVar.set
            _traced = _Choice(self.backend, source, _traced)
        else:
            _innermost.set(_Choice(self.backend, source, _environment.innermost))
        return self

    def __exit__(self, *exc: object) -> None:
        global _traced
        if torch.compiler.is_dynamo_compiling():
            _traced = _traced.outer
        else:
            _innermost.set(_environment.innermost.outer or _environment)

    def __call__(self, function: Function) -> Function:
        backend = self.backend
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError("use_backend cannot decorate a generator function: write the block inside of it")
        if inspect.isclass(function) or not callable(function):
            kind = "a class" if inspect.isclass(function) else type(function).__name__
            raise TypeError(f"use_backend decorates functions, got {kind}")
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def decorated(*args, **kwargs):
                with use_backend(backend):
                    return await function(*args, **kwargs)

        else:

            @functools.wraps(function)
            def decorated(*args, **kwargs):
                with use_backend(backend):  # made here, where torch.compile can trace it
                    return function(*args, **kwargs)

        return decorated  # type: ignore[return-value]


def _from_environment():
    name = os.environ.get("VITDIV_BACKEND", "")
    if name not in BACKENDS and name != "":
        known = ", ".join(BACKENDS)
        raise ValueError(f"the environment variable VITDIV_BACKEND must be one of {known}, got {name!r}")
    return _Choice(name, " (set by the environment variable VITDIV_BACKEND)") if name else _Choice("auto")


_environment = _from_environment()
