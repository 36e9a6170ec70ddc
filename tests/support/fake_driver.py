"""A GPU for Triton to compile for and launch on, where there is none: what is launched there does nothing."""

from types import SimpleNamespace

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class FakeDriver:
    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 1 << 20},
            # module, function, registers, spills, threads of a block at most
            load_binary=lambda *arguments: (None, None, 0, 0, 1024),
        )

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target

    def launcher_cls(self, source, metadata):
        return lambda *arguments: None


def install(capability):
    """For all launches of this process from now on, on a GPU of this capability (80, 90, ..)."""
    driver.set_active(FakeDriver(capability))


def record(launched):
    """From now on `launched(module, kernel, specialization)` is called for each launch; nothing is compiled.

    The specialization is all that `JITFunction.preload` needs to compile what the launch would have: a text,
    the same for two launches exactly where one compiled kernel serves both.
    """

    def hook(*, fn, compile, **_):
        launched(fn.module, fn.jit_function.__name__, compile["specialization_data"])
        return True

    knobs.runtime.jit_cache_hook = hook
