"""Train a ViT: `python -m vitdiv_kernels.train --data digits --model digits24 --losses diversity`.

The first part is what the other commands, the report and the demo, take from here.
"""

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from .._dispatch import BACKENDS
from ..vit import CONFIGS, ViT
from .data import load
from .errors import TrainError
from .logs import progress
from .loop import Trainer, accuracy, flushed_denormals
from .loss_weights import listing, parse_losses
from .recipe import Recipe


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help where there is one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default is None or action.default is False
        return action.help or "" if silent else super()._get_help_string(action) or ""


class ListingFormatter(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Leaves the lines of the epilog as they are."""


def number(kind: type[int] | type[float], low: float, high: float = float("inf")) -> Callable[[str], float]:
    """An argparse type: a number of the kind from low to high, refused with a sentence."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        bound = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
        kind_of = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {kind_of} {bound}, got {text!r}")

    return parse


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
    args = parser.parse_args(argv)
    try:
        return run(args) or 0
    except TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def block_list(text: str) -> list[int] | str:
    """`none`, `all`, or blocks such as `8-11,15`."""
    if text in ("none", "all"):
        return text
    blocks: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            raise argparse.ArgumentTypeError(f"must be none, all, or blocks such as 8-11,15, got {text!r}")
        blocks += range(int(first), int(last or first) + 1)
    return sorted(set(blocks))


def losses(text: str) -> dict[str, float]:
    try:
        return parse_losses(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def make_parser() -> argparse.ArgumentParser:
    recipe = Recipe()
    parser = argparse.ArgumentParser(
        prog="python -m vitdiv_kernels.train",
        description="Train a vision transformer with re-attention, diversity losses, both or neither.",
        formatter_class=ListingFormatter,
        epilog=listing(),
    )
    add = parser.add_argument_group("what to train").add_argument
    add(
        "--data",
        default="digits",
        help="digits, or imagefolder:PATH, with train and val in it, or its classes",
    )
    add("--model", default="digits24", choices=list(CONFIGS), help="the shape of the model")
    add(
        "--reattention",
        type=block_list,
        help="blocks that re-attend: none, all, or such as 8-11 (default: the model's)",
    )
    add(
        "--losses",
        metavar="NAME=WEIGHT,...",
        type=losses,
        default="none",
        help="none, diversity, or names and weights, such as cosine=0.5,koleo=0.1 or gong2021; the names are "
        "below",
    )
    add("--image-size", type=number(int, 1), help="resize images to this (default: the model's)")
    add(
        "--drop-path",
        type=number(float, 0, 0.99),
        help="drop a branch with up to this probability (default: the model's)",
    )
    how = parser.add_argument_group("how to train it")
    length = how.add_mutually_exclusive_group()
    length.add_argument("--steps", type=number(int, 1), help=f"number of updates (default: {recipe.steps})")
    length.add_argument("--epochs", type=number(int, 1), help="passes over the training images instead")
    add = how.add_argument
    add("--batch", type=number(int, 1), default=recipe.batch, help="images in a step")
    add("--lr", type=number(float, 0), default=recipe.lr, help="highest learning rate")
    add("--warmup", type=number(float, 0, 1), default=recipe.warmup, help="share of the steps that warm up")
    add("--weight-decay", type=number(float, 0), default=recipe.weight_decay, help="decay of the matrices")
    add("--clip", type=number(float, 0), default=recipe.clip, help="largest gradient norm; 0 for no limit")
    add(
        "--label-smoothing",
        type=number(float, 0, 1),
        default=recipe.label_smoothing,
        help="label smoothing, of patch_mixing's labels too",
    )
    add(
        "--cutmix",
        metavar="ALPHA",
        type=number(float, 0, 1000),
        help="mix the images of each batch by CutMix, with areas from Beta(ALPHA, ALPHA); 0 for none "
        "(default: 1 where patch_mixing is among the losses, else 0)",
    )
    add("--amp", action="store_true", help="bfloat16 autocast")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--backend", default="auto", choices=BACKENDS, help="of the fused operations")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="such as cpu, cuda or cuda:1")
    add("--workers", type=number(int, 0), default=0, help="processes that read images")
    add("--seed", type=number(int, 0), default=recipe.seed, help="of weights, batches, augmentation, split")
    add = parser.add_argument_group("what to keep").add_argument
    add("--out", type=Path, default=Path("runs/vit"), help="folder for log.csv and checkpoint.pt")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, exactly where it stopped")
    add("--log-every", type=number(int, 1), default=10, help="steps between rows of the log")
    add("--eval-every", type=number(int, 1), default=100, help="steps between validations")
    add(
        "--monitor-every",
        type=number(int, 0),
        default=0,
        help="steps between measurements of collapse, kept in collapse.csv; 0 for none",
    )
    add("--save-every", type=number(int, 1), default=500, help="steps between checkpoints")
    return parser


def build(args: argparse.Namespace) -> Trainer:
    """The trainer that the arguments describe. Raises TrainError with a sentence."""
    config = CONFIGS[args.model]
    blocks = args.reattention
    if isinstance(blocks, str):
        blocks = list(range(config.depth)) if blocks == "all" else []
    changes = {"image_size": args.image_size, "drop_path": args.drop_path, "reattention": blocks}
    try:
        config = replace(config, **{name: value for name, value in changes.items() if value is not None})
    except ValueError as error:
        raise TrainError(str(error)) from None
    data = load(args.data, config.image_size, config.channels, args.seed)
    config = replace(config, classes=len(data.classes))
    steps = args.steps or (args.epochs * (len(data.train) // args.batch) if args.epochs else Recipe.steps)
    # options have the names of the recipe's fields; `betas` has no option
    chosen = {part.name: getattr(args, part.name) for part in fields(Recipe) if part.name != "betas"}
    usable(args.device)
    torch.manual_seed(args.seed)
    trainer = Trainer(
        ViT(config),
        data,
        Recipe(**chosen | {"steps": steps}),
        device=args.device,
        backend=args.backend,
        log_path=args.out / "log.csv",
        log_every=args.log_every,
        eval_every=args.eval_every,
        workers=args.workers,
        compile=args.compile,
        monitor_every=args.monitor_every,
    )
    checkpoint = args.out / "checkpoint.pt"
    if args.resume:
        trainer.load(checkpoint)
    elif checkpoint.exists():
        raise TrainError(
            f"{checkpoint} is there already: add --resume to go on with it, or give another --out"
        )
    return trainer


def train(trainer: Trainer, args: argparse.Namespace) -> int:
    """Runs to the end, or to the first SIGINT or SIGTERM: after that step it saves and ends.

    Returns the exit code: 0, or 128 + the signal's number.
    """
    received = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        trainer.stop_requested = True
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    checkpoint, steps = args.out / "checkpoint.pt", trainer.recipe.steps
    try:
        with progress(args.model, steps, trainer.step) as move:

            def show(step: int, terms: dict[str, Any]) -> None:
                if step % args.log_every == 0:
                    measured = [row["val_accuracy"] for row in trainer.rows if row["val_accuracy"] != ""]
                    last = f"{100 * measured[-1]:.1f} %" if measured else "-"
                    move(step, loss=f"{float(terms['loss']):.3f}", validation=last)
                if step % args.save_every == 0:
                    trainer.save(checkpoint)

            trainer.fit(on_step=show)
            move(trainer.step)
        trainer.save(checkpoint)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if trainer.step < steps:
        print(f"stopped after step {trainer.step} of {steps}; {checkpoint} is saved: go on with --resume")
        return 128 + received[0]
    for name, part in (("validation", trainer.data.val), ("test", trainer.data.test)):
        if part is not None:
            share = accuracy(trainer.model, part, trainer.device)
            print(f"{name} accuracy {100 * share:.2f} % ({len(part)} images)")
    print(f"log {args.out / 'log.csv'}, weights {checkpoint}")
    return 0


def run(args: argparse.Namespace) -> int:
    trainer = build(args)
    with flushed_denormals():
        return train(trainer, args)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(make_parser(), run, argv)
