"""What fused re-attention saves: time and peak memory of a training step of four DeepViT-32 blocks."""

import argparse
import contextlib
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from .. import use_backend
from ..vit.model import CONFIGS, Block, ViT

VARIANTS = ("published", "reference", "native")
MEGABYTE = 1e6


class PublishedReAttention(nn.Module):
    """Re-attention as DeepViT published it: all maps through a 1 x 1 Conv2d and a BatchNorm2d."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.reatten_matrix = nn.Conv2d(num_heads, num_heads, 1)
        self.var_norm = nn.BatchNorm2d(num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        maps = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        maps = self.var_norm(self.reatten_matrix(maps))
        return self.proj((maps @ v).transpose(1, 2).flatten(2))


def training_step(variant: str, batch: int = 16, depth: int = 4) -> Callable[[int], None]:
    """A function that runs one step (forward, backward, AdamW) of `depth` DeepViT-32 blocks.

    The tokens are [batch, 197, 384], float32. The function's argument limits the step to the first so many
    images.
    """
    torch.manual_seed(0)
    config = replace(CONFIGS["deepvit_32b"], depth=depth, reattention=range(depth))
    if variant == "published":
        attention = [PublishedReAttention(config.dim, config.heads) for _ in range(depth)]
        blocks = nn.Sequential(*(Block(config.dim, attn, config.mlp_ratio, 0.0) for attn in attention))
    else:
        blocks = nn.Sequential(*ViT(config).blocks)
    optimizer = torch.optim.AdamW(blocks.parameters(), lr=1e-4, fused=True)
    tokens, dy = torch.randn(2, batch, 197, config.dim)

    def step(images: int = batch) -> None:
        optimizer.zero_grad(set_to_none=True)
        with contextlib.nullcontext() if variant == "published" else use_backend(variant):
            blocks(tokens[:images]).backward(dy[:images])
        optimizer.step()

    return step


def median_times(variants, batch: int = 16, depth: int = 4, rounds: int = 5) -> dict[str, float]:
    """Median milliseconds of a step; the variants take turns in one process, after an untimed step each."""
    steps = {variant: training_step(variant, batch, depth) for variant in variants}
    for step in steps.values():
        step()
    times = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant, step in steps.items():
            start = time.perf_counter()
            step()
            times[variant].append(1e3 * (time.perf_counter() - start))
    return {variant: statistics.median(values) for variant, values in times.items()}


def _resident(name: str) -> float | None:
    """VmRSS (now) or VmHWM (highest since the last reset), in MB; None where the kernel does not tell."""
    try:
        with open("/proc/self/status") as status:
            return int(re.search(rf"{name}:\s+(\d+) kB", status.read())[1]) * 1024 / MEGABYTE
    except (OSError, TypeError):
        return None


def _reset_peak() -> bool:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def peak_memory(variant: str, batch: int, depth: int) -> dict:
    """How far one step raises the resident set of this process, in MB, and how that was found.

    Weights, optimizer state and libraries are not counted: a step on one image has made them resident. Meant
    for a process of its own, whose allocator keeps nothing from earlier steps.
    """
    step = training_step(variant, batch, depth)
    step(1)
    before, exact = _resident("VmRSS"), _reset_peak()
    step()
    if before is not None and exact:
        return {
            "megabytes": _resident("VmHWM") - before,
            "method": "resident-set peak above weights and optimizer state",
        }
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MEGABYTE
    return {"megabytes": peak, "method": "highest resident set, all included"}


def peak_memory_apart(variant: str, batch: int = 16, depth: int = 4) -> dict:
    """`peak_memory` in a fresh process with as many threads as this one."""
    command = [
        sys.executable,
        "-m",
        "vitdiv_kernels.demo.cost",
        variant,
        str(batch),
        str(depth),
        str(torch.get_num_threads()),
    ]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m vitdiv_kernels.demo.cost", description=peak_memory.__doc__
    )
    parser.add_argument("variant", choices=VARIANTS)
    for name, default in (("batch", 16), ("depth", 4), ("threads", 2)):
        parser.add_argument(name, type=int, nargs="?", default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(json.dumps(peak_memory(arguments.variant, arguments.batch, arguments.depth)))
