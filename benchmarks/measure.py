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

from vitdiv_kernels.demo import meters

MODES = ("fwd", "bwd", "fwd+bwd")
QUICK_SAMPLE_S = 5e-3
MAX_CALLS_A_SAMPLE = 500
GRAPH_REPLAYS = 11
WALL_SAMPLE_S = 10e-3


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
        self.clock = clock_of(self._device())

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
        """Mean seconds of `number` calls in a row; on a GPU of the device, whatever the host takes.

        In mode "bwd" every timed backward has a forward of its own, run before the clock starts: retain_graph
        would keep alive what a backward normally frees, and compiled graphs refuse it.
        """
        with torch.set_grad_enabled(self.mode != "fwd"):
            while (seconds := self.clock(self._calls(number))) is None:
                pass
        return seconds / number

    def _calls(self, number: int) -> list[Callable]:
        if self.mode == "bwd":
            outs = [self.forward() for _ in range(number)]
            return [lambda out=out: self.backward(out) for out in outs]
        return [self.once] * number

    def once(self):
        """The whole of a call: the forward, and in mode "fwd+bwd" the backward."""
        out = self.forward()
        return out if self.mode == "fwd" else self.backward(out)

    def graph_seconds(self) -> float | None:
        """Median device seconds of a replay of the call as a CUDA graph; None on a CPU and in mode "bwd".

        Raises what torch raises where the call cannot be captured.
        """
        if self.clock.gpu is None or self.mode == "bwd":
            return None
        with torch.set_grad_enabled(self.mode != "fwd"):
            replay = self.clock.gpu.capture(self.once)
        samples = []
        while len(samples) < GRAPH_REPLAYS:
            seconds = self.clock([replay])
            samples += [] if seconds is None else [seconds]
        return statistics.median(samples)

    def wall_seconds(self) -> float | None:
        """Median seconds by the wall of a call among calls in a row, as a training loop makes them: what the
        host takes to queue it, or the device to run it, whichever is more. None where `graph_seconds` is.
        """
        if self.clock.gpu is None or self.mode == "bwd":
            return None
        number, samples = 1, []
        with torch.set_grad_enabled(self.mode != "fwd"):
            for _ in range(4):
                self.clock.gpu.synchronize()
                start = self.clock.gpu.now()
                for _ in range(number):
                    self.once()
                self.clock.gpu.synchronize()
                samples.append((self.clock.gpu.now() - start) / number)
                number = max(1, min(MAX_CALLS_A_SAMPLE, math.ceil(WALL_SAMPLE_S / samples[0])))
        return statistics.median(samples[1:])

    def calls_a_sample(self) -> int:
        """How many calls make a sample long enough for the clock; one on a GPU, to find its L2 cold."""
        if self.clock.gpu is not None:
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
        meter = _CudaMeter(self._device()) if self._device().type == "cuda" else meters.ResidentSet()
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


class CpuClock:
    gpu = None
    __call__ = staticmethod(meters.seconds)


class GpuClock:
    """Seconds of the device, with its L2 cold and all calls queued before the first begins.

    The device sleeps while the host queues; where it wakes too early the sample holds time of the host, and
    the next sleep is longer. `waits` says that no sleep was long enough: the calls wait for the device.
    """

    LONGEST = 60e-3

    def __init__(self, gpu: "Gpu"):
        self.gpu, self.pause, self.waits = gpu, 1e-3, False

    def __call__(self, calls: list[Callable]) -> float | None:
        """Seconds that the calls take; None when the device woke too early, for a longer sleep next time."""
        start, end = self.gpu.event(), self.gpu.event()
        self.gpu.flush()
        self.gpu.sleep(self.pause)
        start.record()
        for call in calls:
            call()
        early = start.query()
        end.record()
        end.synchronize()
        if early and self.pause < self.LONGEST:
            self.pause *= 2
            return None
        self.waits = early
        return start.elapsed_time(end) * 1e-3


class Gpu:
    """What the clock asks of a GPU, for which the tests put a simulated one."""

    now = staticmethod(time.perf_counter)

    def event(self):
        return torch.cuda.Event(enable_timing=True)

    def flush(self) -> None:
        """Writes more than any L2 holds, so that nothing of the last call stays in it."""
        torch.empty(2**30, dtype=torch.int8, device="cuda").zero_()

    def sleep(self, seconds: float) -> None:
        torch.cuda._sleep(int(seconds * 2e9))  # clocks, of which a GPU has at most about 2e9 a second

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def capture(self, call: Callable) -> Callable:
        """A function that replays `call` as a CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay


def clock_of(device: torch.device) -> CpuClock | GpuClock:
    return GpuClock(Gpu()) if device.type == "cuda" else CpuClock()


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
        self.clock = clock_of(device)

    def seconds(self, number: int) -> float:
        call = partial(torch.mm, self.a, self.b, out=self.out)
        while (seconds := self.clock([call] * number)) is None:
            pass
        return seconds / number

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
