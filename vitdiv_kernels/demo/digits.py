"""Three small ViTs of 24 blocks on real handwritten digits: plain, with diversity losses, with re-attention.

`python -m vitdiv_kernels.demo` trains them, prints what diversity did, draws it, and measures what the
fused kernels save at the size of a DeepViT. The three are trained side by side, each by a process with one
thread: operations on 17 tokens of width 48 gain nothing from a second one.
"""

import argparse
import json
import math
import multiprocessing
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from .. import _dispatch
from ..train.cli import HelpFormatter, number
from ..train.data import Data, DataError, load_digits
from ..train.loop import Recipe, Trainer, TrainError, flushed_denormals
from ..train.losses import DIVERSITY
from ..train.metrics import accuracy, diversity, patch_matrix
from ..train.progress import Progress
from ..vit.model import CONFIGS, ViT
from . import cost

TITLES = {"plain": "plain ViT", "losses": "+ diversity losses", "reattention": "re-attention (DeepViT)"}


def train_model(
    name: str,
    data: Data,
    steps: int,
    seed: int,
    out: Path,
    on_step: Callable[[int, dict], None] | None = None,
) -> dict:
    """Trains one of the three, with the weights of the last step, and returns its log rows, metrics on the
    test images and seconds of this process's CPU time."""
    torch.manual_seed(seed)
    model = ViT(CONFIGS["digits24_reattention" if name == "reattention" else "digits24"])
    recipe = Recipe(steps=steps, seed=seed, losses=dict(DIVERSITY) if name == "losses" else {})
    trainer = Trainer(model, data, recipe, log_path=out / name / "log.csv")
    start = time.process_time()
    with flushed_denormals():
        trainer.fit(on_step=on_step)
    seconds = time.process_time() - start
    trainer.save(out / name / "checkpoint.pt")
    image = data.test.images[0]
    return {
        "rows": trainer.rows,
        "seconds": seconds,
        "test_accuracy": accuracy(model, data.test),
        "diversity": diversity(model, data.test.images),
        "image": image[0].tolist(),
        "matrix": patch_matrix(model, image).tolist(),
    }


def _train_in_child(pipe: Connection, name: str, steps: int, seed: int, out: Path) -> None:
    """Sends (step, cross-entropy) now and then, and at last the result or the error."""
    torch.set_num_threads(1)

    def tell(step: int, terms: dict) -> None:
        if step % 10 == 0 or step == steps:
            pipe.send((step, float(terms["cross_entropy"])))

    try:
        pipe.send(train_model(name, load_digits(), steps, seed, out, tell))
    except (DataError, TrainError) as error:
        pipe.send(error)
    except KeyboardInterrupt:  # the parent hears of it, too
        pass


def train_models(steps: int, seed: int, out: Path) -> dict[str, dict]:
    """What `train_model` returns of each of the three. Raises TrainError where a process ends early."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads, locked
    running, results, steps_of, shown = {}, {}, dict.fromkeys(TITLES, 0), {}
    try:
        for name in TITLES:
            pipe, its_end = context.Pipe(duplex=False)
            arguments = its_end, name, steps, seed, out
            process = context.Process(target=_train_in_child, args=arguments, daemon=True)
            process.start()
            its_end.close()  # the child's death then ends the pipe
            running[pipe] = name, process
        with Progress("cross-entropy", len(TITLES) * steps) as bar:
            while running:
                for pipe in wait(list(running)):
                    name, process = running[pipe]
                    try:
                        said = pipe.recv()
                    except EOFError:
                        process.join()
                        raise TrainError(
                            f"the process that trains the {TITLES[name]} ended with status {process.exitcode}"
                        ) from None
                    if isinstance(said, Exception):
                        raise said
                    if isinstance(said, dict):
                        results[name] = said
                        del running[pipe]
                        process.join()
                        continue
                    steps_of[name], shown[name] = said[0], f"{said[1]:.3f}"
                    bar.to(sum(steps_of.values()), **shown)
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()
    return {name: results[name] for name in TITLES}


def table(results: dict[str, dict]) -> str:
    heads = {
        "test accuracy": 15,
        "|patch cosine|": 16,
        "effective rank": 16,
        "head cosine": 13,
        "CPU time": 10,
    }
    lines = [" " * 24 + "".join(title.rjust(width) for title, width in heads.items())]
    for name, result in results.items():
        d = result["diversity"]
        head_cosine = sum(d["head_cosine"]) / len(d["head_cosine"])
        lines.append(
            f"{TITLES[name]:24s}{100 * result['test_accuracy']:13.1f} %{d['abs_cosine'][-1]:16.2f}"
            f"{d['effective_rank'][-1]:16.1f}{head_cosine:13.2f}{result['seconds']:8.0f} s"
        )
    return "\n".join(lines)


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share seen in count trials (Wilson 1927), which stays inside [0, 1]."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half


def notes(results: dict[str, dict], images: int) -> str:
    """How the numbers were taken, how sure they are, and what they do not show."""
    alike = {name: result["diversity"]["abs_cosine"][-1] for name, result in results.items()}
    best = max(results, key=lambda name: results[name]["test_accuracy"])
    low, high = wilson(results[best]["test_accuracy"], images)
    patches = len(results[best]["matrix"])
    plain_most = all(alike["plain"] > value for name, value in alike.items() if name != "plain")
    shown = (
        "What this run shows: patches become alike in the plain ViT, and less so in the other two."
        if plain_most
        else "In this run the patches of the plain ViT are not the most alike."
    )
    paragraphs = (
        f"Measured on the {images} test images with the weights of the last step. |patch cosine|: between "
        "the patches of an image after the last block, absolute, mean over pairs. Effective rank: of the "
        f"same patches, at most {patches}. Head cosine: between the softmax maps of a block's heads, before "
        "any mix or norm, mean over blocks. CPU time: of the training, on one core.",
        f"One test image is {100 / images:.2f} points, and the 95 % interval of the best accuracy is "
        f"{100 * low:.1f} to {100 * high:.1f} %: one run of each model does not settle differences of a "
        f"point or two. {shown} What it does not show: that mixing heads raises accuracy.",
        "Not from this run: in an earlier study with other settings (lr 1.5e-3, three seeds, 1,437 training "
        "images), re-attention with its mix frozen at the identity, so that only the batch norm on the maps "
        "was left, was as accurate as re-attention; and lower patch cosine did not go with higher accuracy "
        "from model to model. The batch norm's first weight (0.05) and the first mix (near the identity) "
        "are taken from that study, which had chosen them on its test split, so the accuracy of "
        "re-attention may be flattered; the learning rate was chosen on the validation images here.",
    )
    return "\n\n".join(textwrap.fill(paragraph, 100) for paragraph in paragraphs)


def backend_line() -> str:
    """The backend that runs the models, and why. Raises TrainError when the one asked for is not here."""
    by_table, reason = _dispatch.auto_choice("reattention", "cpu")
    try:
        backend = _dispatch.resolve("reattention", "cpu", "auto")
    except (RuntimeError, ValueError) as error:
        raise TrainError(str(error)) from None
    return f"backend {backend}: " + (reason if backend == by_table else f"asked for in place of {by_table}")


def compare_cost(batch: int, rounds: int) -> dict:
    """Milliseconds and peak memory of one training step of each variant that can run here; prints them."""
    missing = _dispatch.missing("native", "cpu")
    variants = [v for v in cost.VARIANTS if v != "native" or missing is None]
    labels = {
        "published": "published form (Conv2d mix)",
        "reference": "reference (einsum mix)",
        "native": "native, fused",
    }
    print(
        f"\nOne training step of 4 DeepViT-32 blocks: dim 384, 12 heads, 197 tokens, batch {batch}, float32, "
        f"{torch.get_num_threads()} threads"
    )
    times = cost.median_times(variants, batch, rounds=rounds)
    memory = {variant: cost.peak_memory_apart(variant, batch) for variant in variants}
    for variant in variants:
        speed = (
            ""
            if missing or variant == "native"
            else f"   native is {times[variant] / times['native']:.1f} times as fast"
        )
        print(f"{labels[variant]:30s}{times[variant]:8.0f} ms{memory[variant]['megabytes']:8.0f} MB{speed}")
    if missing:
        print(f"native, fused: not here: {missing}")
    print(
        f"Medians of {rounds} steps, taken in turns in one process. Memory: {memory['reference']['method']}, "
        "in a process of its own for each."
    )
    return {variant: {"ms": times[variant], **memory[variant]} for variant in variants}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vitdiv_kernels.demo",
        description="Train a plain ViT, one with diversity losses and one with re-attention on digits.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--steps",
        type=number(int, 1),
        default=1200,
        help="updates of each model; few steps make collapse look worse",
    )
    parser.add_argument(
        "--seed",
        type=number(int, 0),
        default=0,
        help="of weights, batches and augmentation; the split is fixed",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        help="folder for demo.png, results.json, logs and weights",
    )
    parser.add_argument("--cost-batch", type=number(int, 1), default=16, help="batch of the cost comparison")
    parser.add_argument(
        "--cost-rounds",
        type=number(int, 0),
        default=5,
        help="timed steps of the cost comparison; 0 leaves it out",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    try:
        import matplotlib  # noqa: F401

        from . import figure
    except ImportError:
        raise DataError(
            "the demo draws with matplotlib, which is absent: pip install 'vitdiv-kernels[demo]'"
        ) from None
    data = load_digits()
    print(
        f"{len(data.train)} digits to train on, {len(data.val)} to validate, {len(data.test)} to test; "
        f"24 blocks, {args.steps} steps; {backend_line()}",
        flush=True,
    )
    results = train_models(args.steps, args.seed, args.out)
    print("\n" + table(results) + "\n\n" + notes(results, len(data.test)))
    figure.draw(results, TITLES, args.out / "demo.png")
    costs = compare_cost(args.cost_batch, args.cost_rounds) if args.cost_rounds else {}
    with open(args.out / "results.json", "w") as file:
        json.dump({"steps": args.steps, "seed": args.seed, "models": results, "cost": costs}, file)
    print(f"\n{args.out / 'demo.png'} shows it; {time.perf_counter() - start:.0f} s in all")


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        run(args)
    except (DataError, TrainError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0
