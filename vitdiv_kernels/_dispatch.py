"""Which backend runs a call: the table behind `backend="auto"`, and what overrides it.

In order: the `backend` argument of the call; the innermost `use_backend`; the environment variable
VITDIV_BACKEND, read once at import; the table. Only the table falls back. The other three are explicit: when
the backend they name cannot run the call, the call raises.
"""

import os

from . import _native

BACKENDS = ("auto", "reference", "native", "triton")
OPERATIONS = ("pairwise_cosine", "attn_diversity", "reattention")

# The first row that matches the call, and whose backend is here, is taken.
TABLE = (
    # device, operation, condition, backend, reason
    ("*", "reattention", "dropout", "reference", "attention dropout is done by the reference operation only"),
    ("cpu", "*", None, "native", "compiled C++ kernels"),
    ("*", "*", None, "reference", "plain PyTorch, on every device"),
)

# Loaded here, once, so that no call and no torch.compile trace runs into the loading.
_NATIVE_MISSING = None if _native.library() is not None else _native.reason()


def missing(backend, operation, device, condition=None):
    """Why `backend` cannot run `operation` on this device type: a sentence, or None when it can."""
    if backend == "reference":
        return None
    if condition == "dropout":
        return f'attention dropout in training is done by backend="reference" only, not by "{backend}"'
    if backend == "triton":
        return 'the Triton kernels are not written yet; use backend="auto" or backend="reference"'
    if device != "cpu":
        return (
            f'native kernels run on CPU tensors only so far, got {device}; use backend="auto" or "reference"'
        )
    return _NATIVE_MISSING


def auto_choice(operation, device, condition=None):
    """What `auto` takes by the table: (backend, reason), the reason with what was passed over and why."""
    passed_over = ""
    for row_device, row_operation, row_condition, backend, reason in TABLE:
        if (
            row_device in ("*", device)
            and row_operation in ("*", operation)
            and row_condition in (None, condition)
        ):
            why_not = missing(backend, operation, device, condition)
            if why_not is None:
                return backend, reason + passed_over
            passed_over += f" ({backend} is not here: {why_not})"
    raise AssertionError("the last row of the table matches every call")


def resolve(operation, device, backend, condition=None):
    """The backend that runs this call; raises when an explicit choice cannot. `device` is a device type."""
    source = ""
    if backend == "auto" and _override is not None:
        backend, source = _override
    if backend == "auto":
        return auto_choice(operation, device, condition)[0]
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}{source}")
    why_not = missing(backend, operation, device, condition)
    if why_not is not None:
        error = ValueError if condition is not None else RuntimeError
        raise error(f'backend "{backend}"{source} cannot run {operation}: {why_not}')
    return backend


class use_backend:
    """Within the block, calls with `backend="auto"` take this backend: `with use_backend("reference"): ...`.

    The choice is explicit, so a call that the backend cannot run raises. It holds for all threads; blocks
    nest. `use_backend("auto")` gives the table back. Raises ValueError for an unknown name.
    """

    def __init__(self, backend):
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
        self.backend = backend

    def __enter__(self):
        global _override
        self._outer = _override
        _override = (self.backend, " (set by use_backend)")
        return self

    def __exit__(self, *exc):
        global _override
        _override = self._outer


def _from_environment():
    name = os.environ.get("VITDIV_BACKEND", "")
    if name not in BACKENDS and name != "":
        known = ", ".join(BACKENDS)
        raise ValueError(f"the environment variable VITDIV_BACKEND must be one of {known}, got {name!r}")
    return (name, " (set by the environment variable VITDIV_BACKEND)") if name else None


_override = _from_environment()
