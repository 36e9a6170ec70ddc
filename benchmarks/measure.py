"""Time and memory of one differentiable call, forward and backward truly apart, on the CPU or on CUDA."""

import gc
import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

MODES = ("fwd", "bwd", "fwd+bwd")
QUICK_SAMPLE_S = 5e-3
MAX_CALLS_A_SAMPLE = 500


class Call:
    """A function of named tensors in one mode.

    In mode "fwd" nothing requires grad, so no provider works for a backward that never comes. In the other
    modes the inputs that require grad are differentiated, from an output gradient made once by `prepare`.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: dict[str, Tensor], mode: str):
        self.function = function
        self.mode = mode
        self.inputs = {name: x.detach() for name, x in inputs.items()} if mode == "fwd" else inputs
        self.leaves = [x for x in self.inputs.values() if x.requires_grad]
        self.grad_out = None

    def prepare(self) -> Tensor:
        """Run twice, so that compilation and first-touch costs are paid; return the output, detached."""
        with torch.set_grad_enabled(self.mode != "fwd"):
            out = self.forward()
            self.grad_out = torch.randn_like(out)
            if self.mode != "fwd":
                self.backward(out)
                self.backward(self.forward())
            else:
                out = self.forward()
        return out.detach()

    def forward(self) -> Tensor:
        return self.function(**self.inputs)

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        # a provider that is only a bound may leave inputs out
        return torch.autograd.grad(out, self.leaves, self.grad_out, allow_unused=True)

    def seconds(self, number: int) -> float:
        """Mean seconds of `number` calls in a row.

        In mode "bwd" every timed backward has a forward of its own, run before the clock starts: retain_graph
        would keep alive what a backward normally frees, and compiled graphs refuse it.
        """
        with torch.set_grad_enabled(self.mode != "fwd"):
            if self.mode == "bwd":
                outs = [self.forward() for _ in range(number)]
                calls = [lambda out=out: self.backward(out) for out in outs]
            elif self.mode == "fwd":
                calls = [self.forward] * number
            else:
                calls = [lambda: self.backward(self.forward())] * number
            return _clock(self._device())(calls) / number

    def calls_a_sample(self) -> int:
        """How many calls make a sample long enough for the clock; one on a GPU, to find its L2 cold."""
        if self._device().type == "cuda":
            return 1
        # By the wall: a quick backward after a slow forward must not cost hundreds of forwards.
        start = time.perf_counter()
        self.seconds(1)
        whole = time.perf_counter() - start
        return max(1, min(MAX_CALLS_A_SAMPLE, math.ceil(QUICK_SAMPLE_S / whole)))

    def peak_extra_bytes(self) -> int:
        """Highest memory held during the call beyond inputs, outputs and gradients.

        In mode "bwd" what the forward saved counts too: it is held while the backward runs.
        """
        gc.collect()
        meter = _CudaMeter(self._device()) if self._device().type == "cuda" else _ResidentSetMeter()
        with torch.set_grad_enabled(self.mode != "fwd"):
            before = meter.current()
            meter.reset_peak()
            results = [self.forward()]
            if self.mode == "bwd":
                meter.reset_peak()
            if self.mode != "fwd":
                results += self.backward(results[0])
            peak = meter.peak()
        return max(0, peak - before - sum(x.numel() * x.element_size() for x in results if x is not None))

    def _device(self) -> torch.device:
        return next(iter(self.inputs.values())).device


def _clock(device: torch.device) -> Callable[[list[Callable]], float]:
    return _cuda_seconds if device.type == "cuda" else _cpu_seconds


def _cpu_seconds(calls: list[Callable]) -> float:
    gc.disable()
    try:
        start = time.perf_counter()
        for call in calls:
            call()
        return time.perf_counter() - start
    finally:
        gc.enable()


def _cuda_seconds(calls: list[Callable]) -> float:
    # More than any L2, so that nothing of the last call stays in it, and enough to keep the device busy while
    # we queue: what is measured is the device's time, not Python's.
    torch.empty(2**30, dtype=torch.int8, device="cuda").zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


class _ResidentSetMeter:
    """Linux's own figures of the resident set. They mean something only if freed blocks go back to the kernel
    at once: run under MALLOC_MMAP_THRESHOLD_=65536."""

    def current(self) -> int:
        return self._status("VmRSS")

    def peak(self) -> int:
        return self._status("VmHWM")

    def reset_peak(self) -> None:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")

    @staticmethod
    def _status(key: str) -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024


class _CudaMeter:
    def __init__(self, device: torch.device):
        self.device = device

    def current(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)


class Product:
    """One large matrix product, sampled in turn with the calls: a shared machine changes by the minute."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        n = 8192 if device.type == "cuda" else 1024
        self.a, self.b = (torch.randn(n, n, device=device).to(_arithmetic(device, dtype)) for _ in range(2))
        self.out = torch.empty_like(self.a)
        self.operations = 2 * n**3

    def seconds(self, number: int) -> float:
        call = partial(torch.mm, self.a, self.b, out=self.out)
        return _clock(self.a.device)([call] * number) / number

    def calls_a_sample(self) -> int:
        return 1


def copy_bytes_per_second(device: torch.device) -> float:
    """Bytes read plus bytes written a second by a copy far larger than any cache."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    seconds = _median_seconds("target.copy_(source)", source=source, target=target)
    return 2 * source.numel() * source.element_size() / seconds


def gemm_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of one large square matrix product; on the CPU in the dtype of the arithmetic."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(_arithmetic(device, dtype)) for _ in range(2))
    return 2 * n**3 / _median_seconds("torch.mm(a, b)", torch=torch, a=a, b=b)


def _arithmetic(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if device.type == "cpu" and dtype.itemsize == 2 else dtype


def _median_seconds(statement: str, **names) -> float:
    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.3).median


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """20th percentile, median, 80th percentile."""
    if len(samples) == 1:
        return (samples[0],) * 3
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return fifths[0], statistics.median(samples), fifths[3]
