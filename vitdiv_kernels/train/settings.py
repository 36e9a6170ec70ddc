"""Where to train, and what to keep of it: options that are no part of the recipe."""

from dataclasses import dataclass
from pathlib import Path

import torch

from .._dispatch import BACKENDS
from .options import number, option


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Machine:
    """How the work is done; a run may go on with other settings."""

    accumulate: int = option(1, "do each step in so many parts, to save memory", parse=number(int, 1))
    checkpointing: bool = option(False, "keep no activations inside of blocks, compute them again")
    compile: bool = option(False, "torch.compile the model")
    fsdp: bool = option(False, "shard weights and optimizer over the processes of torchrun (FSDP2)")
    backend: str = option("auto", "of the fused operations", choices=BACKENDS)
    device: str = option(default_device, "such as cpu, cuda or cuda:1; of torchrun each process has its own")
    workers: int = option(0, "processes that read images", parse=number(int, 0))


@dataclass(frozen=True)
class Keep:
    """What stays of a run, and how often."""

    out: Path = option(Path("runs/vit"), "folder for log.csv and checkpoint.pt", parse=Path)
    resume: bool = option(False, "go on from the checkpoint in --out, exactly where it stopped")
    log_every: int = option(10, "steps between rows of the log", parse=number(int, 1))
    eval_every: int = option(100, "steps between validations", parse=number(int, 1))
    save_every: int = option(500, "steps between checkpoints", parse=number(int, 1))
