"""Train a ViT: `python -m vitdiv_kernels.train --data digits --model digits24 --losses diversity`."""

import argparse
import contextlib
import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, cast

import torch

from .._types import Backend
from ..vit import CONFIGS
from . import models, recipe_options
from .errors import TrainError
from .loop import Trainer, flushed_denormals
from .loss_weights import listing
from .options import HelpFormatter as HelpFormatter
from .options import ListingFormatter, add_options, collect
from .options import number as number
from .parallel import Processes, local_device, started
from .parts import PARTS
from .segment.settings import Dense
from .settings import Keep, Machine
from .tasks import TASKS

GROUPS = (
    ("how to segment (--task segment)", Dense),
    ("where and in what way", Machine),
    ("what to keep", Keep),
)


def usable(device: str) -> torch.device:
    """The device of that name. Raises TrainError where nothing can be put on it."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise TrainError(f"the device {device!r} can't be used: {str(error).splitlines()[0]}") from None


def run_command(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None,
) -> int:
    """Parses and runs; returns the exit code, after a TrainError 2 and its one sentence on stderr."""
    first = os.environ.get("RANK", "0") == "0"
    # all processes of torchrun have the same arguments, and one tells what is wrong with them
    with contextlib.redirect_stderr(sys.stderr if first else StringIO()):
        args = parser.parse_args(argv)
    try:
        return run(args) or 0
    except TrainError as error:
        if not error.told_by_main or first:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def make_parser(task: str = "classify") -> argparse.ArgumentParser:
    """The options, with the defaults of the task."""
    parser = argparse.ArgumentParser(
        prog="python -m vitdiv_kernels.train",
        usage="%(prog)s [OPTIONS]",
        description="Train a vision transformer with re-attention, diversity losses, both or neither.\n"
        "torchrun --nproc-per-node=N -m vitdiv_kernels.train does it in N processes.",
        formatter_class=ListingFormatter,
        epilog=f"models:\n  {', '.join(CONFIGS)}\n\n{listing()}",
    )
    parser.add_argument(
        "--task",
        choices=TASKS,
        default=task,
        help="what to learn: a class of each image, or segment: of each pixel",
    )
    recipe_options.add_recipe_options(parser, TASKS[task].default_recipe)
    for title, kind in GROUPS:
        group = parser.add_argument_group(title)
        add_options(group, kind)
    for part in PARTS:
        add_options(group, part)
    return parser


def task_of(argv: Sequence[str] | None) -> str:
    """The task that is asked for; other options and mistakes are left to `make_parser`."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--task", default="classify")
    with contextlib.suppress(argparse.ArgumentError):
        task = parser.parse_known_args(argv)[0].task
        return task if task in TASKS else "classify"
    return "classify"


def build(args: argparse.Namespace, processes: Processes) -> Trainer:
    """The trainer that the arguments describe. Raises TrainError with a sentence."""
    dense, machine, keep = (collect(kind, args) for _, kind in GROUPS)
    dense, task = cast(Dense, dense), TASKS[args.task]
    machine, keep = cast(Machine, machine), cast(Keep, keep)
    device = local_device(machine.device)
    checkpoint = keep.out / "checkpoint.pt"
    with processes.together():
        recipe = recipe_options.chosen(args)
        usable(device)
        if recipe.data is None:
            raise TrainError(
                f"the recipe {args.recipe} has no data: give --data imagefolder:PATH or digits",
                told_by_main=True,
            )
        try:
            config = models.chosen(recipe)
        except TrainError as error:
            told = f"{recipe_options.said_by(args, str(error))}: {error}"
            raise TrainError(told, told_by_main=True) from None
        data = task.load(recipe.data, config, recipe, dense)
        torch.manual_seed(recipe.seed)
        model = task.make(replace(config, classes=len(data.classes)), dense)
    trainer = Trainer(
        model,
        data,
        recipe,
        device=device,
        backend=cast(Backend, machine.backend),
        workers=machine.workers,
        compile=machine.compile,
        accumulate=machine.accumulate,
        checkpointing=machine.checkpointing,
        fsdp=machine.fsdp,
        log_every=keep.log_every,
        eval_every=keep.eval_every,
        save_path=checkpoint,
        save_every=keep.save_every,
        parts=[collect(part, args) for part in PARTS],
        resume=keep.resume,
        folder=keep.out,
        title=recipe.model,
        task=functools.partial(task, options=dense),
    )
    if keep.resume:
        trainer.load(checkpoint)
    elif processes.total(int(checkpoint.exists())):
        raise TrainError(
            f"{checkpoint} is there already: add --resume to go on with it, or give another --out",
            told_by_main=True,
        )
    return trainer


@contextlib.contextmanager
def stopped_by_signals(trainer: Trainer) -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM asks the trainer to stop, the second one ends the program."""
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        trainer.stop_requested = True
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(trainer: Trainer, out: Path) -> int:
    """Runs to the end, or to the first SIGINT or SIGTERM: after that step it saves and ends.

    Returns the exit code: 0, or 128 + the signal's number.
    """
    steps, checkpoint = trainer.steps, out / "checkpoint.pt"
    say: Any = print if trainer.processes.main else lambda *_: None
    with stopped_by_signals(trainer) as received:
        trainer.fit()
        if trainer.saved_step != trainer.step:
            trainer.save(checkpoint)
    if trainer.step < steps:
        say(f"stopped after step {trainer.step} of {steps}; {checkpoint} is saved: go on with --resume")
        return 128 + (received[0] if received else signal.SIGTERM)
    tested = {"": trainer.model} | {
        f" of the {what}": model for part in trainer.parts for what, model in part.models(trainer).items()
    }
    for what, model in tested.items():
        for name, part in (("validation", trainer.data.val), ("test", trainer.data.test)):
            if part is not None:
                for line in trainer.task.summary(model, part, name + what, trainer.data, trainer.processes):
                    say(line)
    if trainer.measured:
        speed, memory = trainer.measured["images_per_second"], trainer.measured["peak_memory_mb"]
        say(f"{speed:.0f} images/s at the end, at most {memory:.0f} MB in a process")
    say(f"log {out / 'log.csv'}, weights {checkpoint}")
    if trainer.task.next_step and trainer.recipe.data == trainer.task.default_data:
        say(trainer.task.next_step)
    return 0


def run(args: argparse.Namespace) -> int:
    if args.print_recipe:
        recipe = recipe_options.chosen(args)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(recipe.as_dict(), indent=2))
        return 0
    with started(args.device) as processes:
        trainer = build(args, processes)
        with flushed_denormals():
            return train(trainer, args.out)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(make_parser(task_of(argv)), run, argv)
