"""Train a ViT: `python -m vitdiv_kernels.train --data digits --model digits24 --losses diversity`."""

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..vit.model import CONFIGS, ViT
from .cli import HelpFormatter, number
from .data import DataError, load
from .loop import Recipe, Trainer, TrainError, flushed_denormals
from .losses import listing, parse_losses
from .metrics import accuracy
from .progress import Progress


def block_list(text: str) -> list[int] | str:
    """`none`, `all`, or blocks such as `8-11,15`."""
    if text in ("none", "all"):
        return text
    blocks = []
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


class ListingFormatter(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Leaves the lines of the epilog as they are."""


def make_parser() -> argparse.ArgumentParser:
    recipe = Recipe()
    parser = argparse.ArgumentParser(
        prog="python -m vitdiv_kernels.train",
        description="Train a vision transformer with re-attention, diversity losses, both or neither.",
        formatter_class=ListingFormatter,
        epilog=listing(),
    )
    what = parser.add_argument_group("what to train")
    what.add_argument(
        "--data",
        default="digits",
        help="digits, or imagefolder:PATH (PATH/train and PATH/val, or PATH/CLASS)",
    )
    what.add_argument("--model", default="digits24", choices=list(CONFIGS), help="the shape of the model")
    what.add_argument(
        "--reattention",
        type=block_list,
        help="blocks that re-attend: none, all, or such as 8-11 (default: the model's)",
    )
    what.add_argument(
        "--losses",
        metavar="NAME=WEIGHT,...",
        type=losses,
        default="none",
        help="none, diversity, or names and weights, such as cosine=0.5,koleo=0.1 or gong2021; "
        "the names are below",
    )
    what.add_argument(
        "--image-size", type=number(int, 1), help="resize images to this (default: the model's)"
    )
    what.add_argument(
        "--drop-path",
        type=number(float, 0, 0.99),
        help="drop a branch with up to this probability (default: the model's)",
    )
    how = parser.add_argument_group("how to train it")
    length = how.add_mutually_exclusive_group()
    length.add_argument("--steps", type=number(int, 1), help=f"number of updates (default: {recipe.steps})")
    length.add_argument(
        "--epochs", type=number(int, 1), help="length in passes over the training images instead"
    )
    how.add_argument("--batch", type=number(int, 1), default=recipe.batch, help="images in a step")
    how.add_argument("--lr", type=number(float, 0), default=recipe.lr, help="highest learning rate")
    how.add_argument(
        "--warmup", type=number(float, 0, 1), default=recipe.warmup, help="share of the steps that warm up"
    )
    how.add_argument(
        "--weight-decay", type=number(float, 0), default=recipe.weight_decay, help="decay of the matrices"
    )
    how.add_argument(
        "--clip", type=number(float, 0), default=recipe.clip, help="largest gradient norm; 0 for no limit"
    )
    how.add_argument(
        "--label-smoothing",
        type=number(float, 0, 1),
        default=recipe.label_smoothing,
        help="label smoothing, of patch_mixing's labels too",
    )
    how.add_argument(
        "--cutmix",
        metavar="ALPHA",
        type=number(float, 0, 1000),
        help="mix the images of each batch by CutMix, with areas from Beta(ALPHA, ALPHA); 0 for none "
        "(default: 1 where patch_mixing is among the losses, else 0)",
    )
    how.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    how.add_argument("--compile", action="store_true", help="torch.compile the model")
    how.add_argument(
        "--backend",
        default="auto",
        choices=["auto", "reference", "native", "triton"],
        help="of the fused operations",
    )
    how.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="such as cpu, cuda or cuda:1"
    )
    how.add_argument("--workers", type=number(int, 0), default=0, help="processes that read images")
    how.add_argument(
        "--seed", type=number(int, 0), default=recipe.seed, help="of weights, batches, augmentation and split"
    )
    keep = parser.add_argument_group("what to keep")
    keep.add_argument(
        "--out", type=Path, default=Path("runs/vit"), help="folder for log.csv and checkpoint.pt"
    )
    keep.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in --out, exactly where it stopped"
    )
    keep.add_argument("--log-every", type=number(int, 1), default=10, help="steps between rows of the log")
    keep.add_argument("--eval-every", type=number(int, 1), default=100, help="steps between validations")
    keep.add_argument(
        "--monitor-every",
        type=number(int, 0),
        default=0,
        help="steps between measurements of collapse, kept in collapse.csv; 0 for none",
    )
    keep.add_argument("--save-every", type=number(int, 1), default=500, help="steps between checkpoints")
    return parser


def build(args: argparse.Namespace) -> Trainer:
    """The trainer that the arguments describe. Raises DataError or TrainError with a sentence."""
    config = CONFIGS[args.model]
    changes = {"image_size": args.image_size, "drop_path": args.drop_path}
    if args.reattention is not None:
        everywhere = {"none": [], "all": list(range(config.depth))}
        changes["reattention"] = (
            everywhere[args.reattention] if isinstance(args.reattention, str) else args.reattention
        )
    try:
        config = replace(config, **{name: value for name, value in changes.items() if value is not None})
    except ValueError as error:
        raise TrainError(str(error)) from None
    data = load(args.data, config.image_size, config.channels, args.seed)
    config = replace(config, classes=len(data.classes))
    steps = args.steps or (args.epochs * (len(data.train) // args.batch) if args.epochs else Recipe.steps)
    recipe = Recipe(
        steps=steps,
        batch=args.batch,
        lr=args.lr,
        warmup=args.warmup,
        weight_decay=args.weight_decay,
        clip=args.clip,
        label_smoothing=args.label_smoothing,
        cutmix=args.cutmix,
        losses=args.losses,
        amp=args.amp,
        seed=args.seed,
    )
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise TrainError(f"the device {args.device!r} can't be used: {str(error).splitlines()[0]}") from None
    torch.manual_seed(args.seed)
    trainer = Trainer(
        ViT(config),
        data,
        recipe,
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

    def stop(number: int, _) -> None:
        received.append(number)
        trainer.stop_requested = True
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    checkpoint, steps = args.out / "checkpoint.pt", trainer.recipe.steps
    try:
        with Progress(args.model, steps, trainer.step) as bar:

            def show(step: int, terms: dict) -> None:
                if step % args.log_every == 0:
                    val = next(
                        (
                            f"{100 * r['val_accuracy']:.1f} %"
                            for r in reversed(trainer.rows)
                            if r["val_accuracy"] != ""
                        ),
                        "-",
                    )
                    bar.to(step, loss=f"{float(terms['loss']):.3f}", validation=val)
                if step % args.save_every == 0:
                    trainer.save(checkpoint)

            trainer.fit(on_step=show)
            bar.to(trainer.step)
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


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        trainer = build(args)
        with flushed_denormals():
            return train(trainer, args)
    except (DataError, TrainError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
