"""What fused re-attention saves: time and peak memory of a training step of four DeepViT-32 blocks."""

import contextlib
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from .. import use_backend
from ..vit import CONFIGS, ViT
from ..vit.model import Block
from . import meters

Variant = Literal["published", "reference", "native"]


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


def training_step(variant: Variant, batch: int = 16, depth: int = 4) -> Callable[..., None]:
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


def median_times(
    variants: Sequence[Variant], batch: int = 16, depth: int = 4, rounds: int = 5
) -> dict[Variant, float]:
    """Median milliseconds of a step; the variants take turns in one process, after an untimed step each."""
    steps = {variant: training_step(variant, batch, depth) for variant in variants}
    for step in steps.values():
        step()
    rows = [{variant: 1e3 * meters.seconds([step]) for variant, step in steps.items()} for _ in range(rounds)]
    return {variant: statistics.median(row[variant] for row in rows) for variant in variants}


def peak_memory(variant: Variant, batch: int, depth: int, threads: int) -> float | None:
    """How far one step raises the resident set of this process, in MB; None where the system does not tell.

    Weights, optimizer state and libraries are not counted: a step on one image has made them resident. Meant
    for a process of its own, whose allocator keeps nothing from earlier steps.
    """
    torch.set_num_threads(threads)
    step, memory = training_step(variant, batch, depth), meters.ResidentSet()
    step(1)
    try:
        before = memory.current()
        memory.reset_peak()
        step()
        return (memory.peak() - before) / 1e6
    except OSError:
        return None


def peak_memory_apart(variant: Variant, batch: int = 16, depth: int = 4) -> float | None:
    """`peak_memory` in a fresh process with as many threads as this one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_memory, variant, batch, depth, torch.get_num_threads()).result()
