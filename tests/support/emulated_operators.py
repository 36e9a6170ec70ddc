"""The package's operators over emulated CUDA kernels: "native" as CUDA tensors have it, on CPU tensors.

All host code is that of csrc/cuda/operators.h; only device and stream are left out.
"""

import contextlib
import functools
import os
from pathlib import Path

import elf
import pytest
import torch
from emulation_build import EMULATION, KERNELS, build

from vitdiv_kernels.ops import _operators

NAMESPACE = "vitdiv_emulated"
ORDERS = ["forward", "reverse", "random"]
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}  # that a block may have, by architecture
# What stands for arguments that a test leaves out.
DEFAULTS = dict(
    q2=None, k2=None, scale2=0.0, needs=[True, True, False, False], saved=torch.empty(0), include_self=False,
    for_backward=True, margin=0.0, normalise=True, eps=1e-8, needs_dx=True, needs_dy=False,
)  # fmt: skip


class Emulator:
    """The operators, as `emulator.two_gram_fwd(x, None, "square")`: arguments as in their schemas, DEFAULTS
    for what is left out. An output that nobody asked for has shape [0]."""

    def __init__(self):
        folder, self.kernels = Path(torch.__file__).parent, build(*KERNELS, name="kernels")
        libraries = [self.kernels, *(folder / f"lib/lib{name}.so" for name in ("c10", "torch_cpu", "torch"))]
        includes = [folder / "include", folder / "include/torch/csrc/api/include"]
        headers = sorted(EMULATION.glob("memory/*.h"))
        library = build(EMULATION / "operators.cpp", libraries=libraries, includes=includes, headers=headers)
        self.operators = {
            name: _operators.declare(NAMESPACE, operator, "native")
            for name, (operator, _) in with_kernels().items()
        }
        torch.ops.load_library(library)
        self.hooks = getattr(torch.ops, NAMESPACE)
        as_hardware = os.environ.get("VITDIV_EMULATION_ARITHMETIC") == "hardware"
        self.settings = dict(
            order="forward", seed=0, architecture=90, as_hardware=as_hardware, withheld=-1, workspace=32 << 20
        )
        self.configure()
        for name in self.operators:
            setattr(self, name, functools.partial(self.call, name))

    def call(self, name, *arguments, **options):
        op = self.operators[name].op
        names = [argument.name for argument in op._schema.arguments[len(arguments) :]]
        return op(*arguments, **options, **{x: DEFAULTS[x] for x in names if x not in options})

    def configure(self, order=None, seed=0, **others):
        """Set what is given: the order in which warps, lanes and blocks run; the architecture whose shared
        memory there is; as_hardware, whether tensor cores and approximate functions round as hardware does
        (arithmetic.h) or once; withheld, which of the tensors that kernels may touch lacks its end; the bytes
        that a workspace may have. As it was before at the end of a `with` statement; without one at the end
        of the test."""
        undo = contextlib.ExitStack()
        undo.callback(self._set, self.settings)
        self._set(self.settings | others | ({"order": order, "seed": seed} if order else {}))
        return undo

    def _set(self, settings):
        self.settings = settings
        order, seed, architecture, *others = settings.values()
        shared = SHARED_BYTES[architecture]
        self.hooks.configure(ORDERS.index(order), seed, shared, *others)

    @contextlib.contextmanager
    def counting(self):
        """A dict of what kernels do in the `with` statement, there at its end."""
        counts = {}
        self.hooks.take_counts()
        yield counts
        counts.update(self.hooks.take_counts())

    def recorded(self, call):
        """[(the kernel's mangled name, blocks, threads, bytes of shared memory, bytes of the arguments)]: the
        launches of a call, which do not run."""
        self.hooks.record(True)
        try:
            call()
            launches = [self.hooks.launch(i) for i in range(self.hooks.launches())]
        finally:
            self.hooks.record(False)
        return [
            (self.names[at], *numbers, arguments.numpy().tobytes()) for (at, *numbers), arguments in launches
        ]

    @functools.cached_property
    def names(self):
        """The mangled names of the emulated kernels, by their addresses."""
        library = elf.functions(self.kernels.read_bytes())
        places = Path("/proc/self/maps").read_text().splitlines()
        base = next(int(line.split("-")[0], 16) for line in places if line.endswith(str(self.kernels)))
        return {base + address: name for address, name in library.items()}


@functools.cache
def emulator():
    return Emulator()


def take_the_place_of_native(monkeypatch):
    """backend="native" means the emulated kernels, as long as the monkeypatch lasts."""
    for name, (_, table) in with_kernels().items():
        monkeypatch.setitem(table, "native", emulator().operators[name])


def need(operation):
    """Skip the tests of an operation that has no CUDA kernels."""
    names = [name for name in emulator().operators if operation_of(name) == operation]
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    if not names or not all(registered(f"{NAMESPACE}::{name}", "CPU") for name in names):
        pytest.skip(f"there is no CUDA kernel for {operation}")


def operation_of(name):
    """The operation whose folder declares this operator."""
    operator, _ = _operators.DECLARED[name]
    return operator.fakes["native"].__module__.split(".")[-2]


def with_kernels():
    """What is declared of the operators that have kernels of each backend, by name."""
    return {name: entry for name, entry in _operators.DECLARED.items() if "triton" in entry[1]}
