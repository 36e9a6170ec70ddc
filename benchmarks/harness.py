"""What every benchmark shares: workloads, providers, and their alternating measurement.

A workload is one operation at one size. A provider is one way to compute it: a function of the workload's
named inputs, made by a maker without arguments that raises `Unavailable` where this way does not exist. All
providers of a workload take turns in one process, so that all of them share a slow minute of the machine.
"""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from measure import Call, Product, quantiles
from torch import Tensor

HERE = Path(__file__).resolve().parent
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16")}
# Largest relative distance from the first provider's output; beyond it a provider computes something else.
AGREEMENT = {"float32": 1e-3, "float64": 1e-6, "float16": 5e-2, "bfloat16": 1e-1}


class Unavailable(Exception):
    """This provider does not exist for this workload or on this machine; the message says why."""


@dataclass(frozen=True, eq=False)
class Workload:
    op: str
    variant: str
    shape: tuple[int, ...]
    arguments: tuple[str, ...]  # options of bench_<op>.py that give this workload
    inputs: Callable[[torch.device, torch.dtype], dict[str, Tensor]]  # those to differentiate require grad
    providers: dict[str, Callable[[], Callable[..., Tensor]]]
    flops: dict[str, int]  # of the operation, forward ("fwd") and backward ("bwd")
    products: dict[str, int] = field(default_factory=dict)  # of the flops, those of large products
    bounds: tuple[str, ...] = ()  # providers that compute less than the operation: no faster one is expected

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))

    def __str__(self) -> str:
        return " ".join(filter(None, (self.op, self.variant, self.size)))


@dataclass(frozen=True)
class Settings:
    dtype: str
    device: str
    repeats: int
    memory: bool
    floors: dict[int, tuple[float, float]]  # for each thread count: bytes and operations a second, measured


def standard_providers(plain: Callable[..., Tensor], package: Callable[..., Tensor]) -> dict:
    """eager and compile of the plain formula, the backends of the package's function."""
    return {
        "eager": lambda: plain,
        "compile": lambda: torch.compile(plain, fullgraph=True, dynamic=False),
        "reference": lambda: partial(package, backend="reference"),
        "native": lambda: partial(package, backend="native"),
        "triton": lambda: partial(package, backend="triton"),
    }


def measure(
    workload: Workload, providers: list[str], modes: list[str], settings: Settings
) -> tuple[list[dict], list[str]]:
    """One row for each provider, mode and thread count; and a sentence for each provider that failed."""
    all_rows, all_failures = [], []
    for rows, failures in measure_modes(workload, providers, modes, settings):
        all_rows += rows
        all_failures += failures
    return all_rows, all_failures


def measure_modes(
    workload: Workload, providers: list[str], modes: list[str], settings: Settings
) -> Iterator[tuple[list[dict], list[str]]]:
    """The same mode by mode, as soon as each is measured."""
    if "compile" in providers:
        torch.compiler.reset()  # a second size would otherwise get symbolic sizes and slower code
    inputs = _inputs(workload, settings.device, settings.dtype)
    for mode in modes:
        calls, failures = _prepared_calls(workload, providers, inputs, mode, settings)
        gemm = Product(torch.device(settings.device), DTYPES[settings.dtype]) if workload.products else None
        turns = calls | ({(None, threads): gemm for _, threads in calls} if gemm else {})
        samples = _alternate(turns, settings.repeats, desc=f"{workload} {mode}")
        gemm_seconds = {threads: samples.pop((name, threads)) for name, threads in turns if name is None}
        rows = []
        for (provider, threads), seconds in samples.items():
            row = {"op": workload.op, "variant": workload.variant, "provider": provider, "mode": mode}
            row |= {"shape": workload.size, "dtype": settings.dtype, "device": settings.device}
            row |= {"threads": threads, "repeats": settings.repeats}
            row["p20"], row["ms"], row["p80"] = (value * 1e3 for value in quantiles(seconds))
            bytes_a_second, flops_a_second = settings.floors[threads]
            row |= {"copy_gb_s": bytes_a_second / 1e9, "gemm_gflop_s": flops_a_second / 1e9}
            call = calls[provider, threads]
            row["floor_ms"] = 1e3 * _floor_seconds(workload, call, mode, bytes_a_second, flops_a_second)
            row["ratio_floor"] = row["floor_ms"] / row["ms"]
            if gemm:
                products = sum(workload.products[direction] for direction in mode.split("+"))
                rate = gemm.operations / quantiles(gemm_seconds[threads])[1]
                row["ratio_gemm"] = products / rate / (row["ms"] * 1e-3)
            if settings.memory and settings.device == "cuda":  # its allocator counts exactly, in any process
                row["peak_extra_mb"] = call.peak_extra_bytes() / 2**20
            elif settings.memory:
                here = {"dtype": settings.dtype, "device": settings.device, "threads": threads}
                row["peak_extra_mb"] = _peak_extra_mb_apart(workload, provider, mode, **here)
            row |= _on_a_gpu(call, f"{workload} {mode}: {provider}")
            rows.append(row)
        _add_ratios(rows)
        yield rows, failures


def _on_a_gpu(call: Call, name: str) -> dict[str, float | None]:
    """Columns that are empty on a CPU, where the time of the device and by the wall are the same."""
    if call.clock.gpu is None:
        return {}
    wall = call.wall_seconds()
    if call.clock.waits:
        print(f"{name} waits for the device: its ms hold time of the host", file=sys.stderr, flush=True)
    try:
        device = call.graph_seconds()
    except Exception as error:  # of many kinds: only the column stays empty
        said = " ".join(str(error).split())[:300]
        print(f"{name} is not captured as a CUDA graph: {said}", file=sys.stderr, flush=True)
        device = None
    return {"device_ms": device and 1e3 * device, "wall_ms": wall and 1e3 * wall}


def _inputs(workload: Workload, device: str, dtype: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return workload.inputs(torch.device(device), DTYPES[dtype])


def _prepared_calls(
    workload, providers, inputs, mode, settings
) -> tuple[dict[tuple[str, int], Call], list[str]]:
    calls, failures, first = {}, [], None
    for threads, provider in itertools.product(settings.floors, providers):
        torch.set_num_threads(threads)
        try:
            call = Call(workload.providers[provider](), inputs, mode)
            out = call.prepare().double()
        except Exception as error:  # of many kinds, and none keeps the others from being measured
            said = " ".join(str(error).split())[:300]
            failures.append(f"{workload} {mode}: {provider} fails: {type(error).__name__}: {said}")
            continue
        first = out if first is None else first
        distance = ((out - first).norm() / first.norm()).item()
        if provider not in workload.bounds and not distance <= AGREEMENT[settings.dtype]:
            away = f"is {distance:.1e} away from the output of {next(iter(calls))[0]}"
            failures.append(f"{workload} {mode}: {provider} {away}, relative: no speed reported")
            continue
        calls[provider, threads] = call
    return calls, failures


def _alternate(
    calls: dict[tuple[str | None, int], Call | Product], repeats: int, desc: str
) -> dict[tuple[str | None, int], list[float]]:
    """Rounds in which each call is sampled once, each round from another starting point."""
    samples = {key: [] for key in calls}
    numbers = {}
    for (provider, count), call in calls.items():
        torch.set_num_threads(count)
        numbers[provider, count] = call.calls_a_sample()
    order = list(calls)
    bar = progress_bar(total=repeats * len(order), desc=desc)
    for _ in range(repeats):
        for provider, count in order:
            call = calls[provider, count]
            torch.set_num_threads(count)
            # What a change of provider costs is not this call's: memory that the other gave back to the
            # kernel (a third of a quick backward's time), and an OpenMP team of another size.
            call.seconds(1)
            samples[provider, count].append(call.seconds(numbers[provider, count]))
            bar.update()
        order = order[1:] + order[:1]
    bar.close()
    return samples


def progress_bar(total: int, desc: str):
    """A progress bar on a terminal, where tqdm is installed."""
    if not sys.stderr.isatty() or importlib.util.find_spec("tqdm") is None:
        return SimpleNamespace(update=lambda: None, close=lambda: None)
    from tqdm import tqdm

    return tqdm(total=total, desc=desc, leave=False)


def _floor_seconds(
    workload: Workload, call: Call, mode: str, bytes_a_second: float, flops_a_second: float
) -> float:
    """No schedule is faster: inputs read and results written once a direction, operations at GEMM speed."""
    read = sum(x.numel() * x.element_size() for x in call.inputs.values())
    written = {
        "fwd": call.grad_out.numel() * call.grad_out.element_size(),
        "bwd": sum(x.numel() * x.element_size() for x in call.leaves),
    }
    directions = mode.split("+")
    traffic = sum(read + written[direction] for direction in directions)
    traffic += written["fwd"] if "bwd" in directions else 0  # the output's gradient is read
    return max(
        traffic / bytes_a_second, sum(workload.flops[direction] for direction in directions) / flops_a_second
    )


def _peak_extra_mb_apart(workload: Workload, provider: str, mode: str, **settings) -> float:
    """Peak extra MB, measured in a process of its own, where no other provider has left memory behind."""
    command = [
        sys.executable,
        str(HERE / f"bench_{workload.op}.py"),
        *workload.arguments,
        "--peak-memory-only",
    ]
    command += ["--providers", provider, "--modes", mode]
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{workload}: memory of {provider} {mode} could not be measured:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])["peak_extra_mb"]


def peak_extra_mb(
    workload: Workload, provider: str, mode: str, *, dtype: str, device: str, threads: int
) -> float:
    """Peak memory of one provider beyond inputs, outputs and gradients, measured in this process."""
    torch.set_num_threads(threads)
    call = Call(workload.providers[provider](), _inputs(workload, device, dtype), mode)
    call.prepare()
    return call.peak_extra_bytes() / 2**20


def _add_ratios(rows: list[dict]) -> None:
    """The other provider's time over this row's, in the same mode and with as many threads."""
    times = {(row["provider"], row["mode"], row["threads"]): row["ms"] for row in rows}
    for row, other in itertools.product(rows, ("eager", "compile")):
        time = times.get((other, row["mode"], row["threads"]))
        row[f"ratio_{other}"] = time and time / row["ms"]
