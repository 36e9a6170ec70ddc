"""The processes of a run, started by torchrun: which one this is, and what they tell each other."""

import contextlib
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import TrainError

# Groups that were left. A DistributedDataParallel that outlives its group, say in a traceback, would free it,
# and joins gloo's threads while it holds the lock of Python that they wait for (torch 2.13).
_ended: list[Any] = []

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Processes:
    """This process, `rank` of `size`. With one process every method is free of communication."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Scalars as numbers, their means over all processes."""
        if self.size == 1:
            return {name: float(value) for name, value in values.items()}
        packed = torch.stack([value.detach().double().cpu() for value in values.values()])
        dist.all_reduce(packed)
        return dict(zip(values, (packed / self.size).tolist(), strict=True))

    def total(self, number: int) -> int:
        """The sum over all processes."""
        if self.size == 1:
            return number
        packed = torch.tensor(number)
        dist.all_reduce(packed)
        return int(packed)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, which all of them get."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A TrainError in one process is raised in all of them; the main one tells it."""
        if self.size == 1:
            yield
            return
        found = None
        try:
            yield
        except TrainError as error:
            found = error
        said = self.gather(None if found is None else str(found))
        if any(said):
            ours = [f"process {rank}: {text}" for rank, text in enumerate(said) if text]
            message = said[0] if set(said) == {said[0]} else "; ".join(ours)
            raise TrainError(message, told_by_main=True) from found

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Raises TrainError, in all processes, where one has other facts than the first."""
        for rank, others in enumerate(self.gather(dict(facts))):
            # the first process is compared by all: each knows all facts
            if rank == 0:
                first = others
                continue
            differ = [
                f"{name} {others.get(name)!r}, but process 0 with {first.get(name)!r}"
                for name in first | others
                if first.get(name) != others.get(name)
            ]
            if differ:
                raise TrainError(
                    f"process {rank} was started with {'; '.join(differ)}: start all processes with the same "
                    "options and data",
                    told_by_main=True,
                )

    def share_buffers(self, model: nn.Module) -> None:
        """Gives all processes the buffers of the first: the running statistics of its batch norms."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


def current() -> Processes:
    """The processes that run now. Raises TrainError where there are to be several and they do not know each
    other."""
    if dist.is_available() and dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size())
    world = os.environ.get("WORLD_SIZE", "")
    if world.isdecimal() and int(world) > 1:
        raise TrainError(
            f"this is one of {world} processes (WORLD_SIZE), which do not know each other: start them with "
            "torchrun -m vitdiv_kernels.train"
        )
    return Processes()


@contextlib.contextmanager
def started(device: str) -> Iterator[Processes]:
    """Joins the processes that torchrun started, by gloo and for GPUs nccl, and leaves them at the end."""
    absent = [name for name in VARIABLES if name not in os.environ]
    if os.environ.get("WORLD_SIZE", "1") == "1" or absent:
        yield current()
        return
    # the small things that processes tell each other are on the CPU
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend)
    try:
        yield current()
    except RuntimeError as error:
        lost = any(words in str(error) for words in ("closed by peer", "Connection reset", "Broken pipe"))
        if isinstance(error, TrainError) or not lost:
            raise
        raise TrainError("another process has ended; its own message tells why", told_by_main=True) from None
    finally:
        _ended.append(dist.group.WORLD)
        dist.destroy_process_group()


def local_device(device: str) -> str:
    """The device of this process: of `cuda` the GPU whose number torchrun gave it."""
    number = os.environ.get("LOCAL_RANK")
    return f"cuda:{number}" if device == "cuda" and number and current().size > 1 else device


def share(count: int, index: int, number: int) -> list[int]:
    """Which of `count` images are the part `index` of `number`: as many from the front as from the back.

    An image and the one at its place from the end are in the same part, and trade places where the part is
    reversed: CutMix, which mixes the two, does in parts what it does in the whole. `number` divides `count`.
    """
    size = count // number
    back = size // 2
    front = size - back
    return [
        *range(index * front, (index + 1) * front),
        *range(count - (index + 1) * back, count - index * back),
    ]


def reseed(seed: int, step: int, rank: int) -> None:
    """Random numbers of a process that has none saved, other than those of the others."""
    torch.manual_seed(random.Random(f"{seed} {step} {rank}").getrandbits(63))
