"""Three small ViTs of 24 blocks on real handwritten digits: plain, with diversity losses, with re-attention.

`python -m vitdiv_kernels.demo` trains them, prints what diversity did, draws it, and measures what the
fused kernels save at the size of a DeepViT. The three are trained side by side, each by a process with one
thread: operations on 17 tokens of width 48 gain nothing from a second one.
"""

import argparse
import json
import math
import statistics
import textwrap
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import CollapseMonitor, _dispatch, recipes
from ..train.cli import HelpFormatter, number, run_command
from ..train.data import Tensors, load_digits
from ..train.errors import TrainError
from ..train.loop import Trainer, accuracy, flushed_denormals
from ..train.plots import pyplot
from ..vit import CONFIGS, ViT
from . import cost, figure
from .side_by_side import OnStep, train_models

TITLES = {"plain": "plain ViT", "losses": "+ diversity losses", "reattention": "re-attention (DeepViT)"}


def train_model(name: str, steps: int, seed: int, out: Path, on_step: OnStep | None = None) -> dict[str, Any]:
    """Trains one of the three, with the weights of the last step, and returns its log rows, metrics on the
    test images and seconds of this process's CPU time."""
    data = load_digits()
    torch.manual_seed(seed)
    model = ViT(CONFIGS["digits24_reattention" if name == "reattention" else "digits24"])
    recipe = recipes.load("digits" if name == "losses" else "plain")
    recipe = replace(recipe, steps=steps, seed=seed)
    trainer = Trainer(model, data, recipe, log_path=out / name / "log.csv")
    start = time.process_time()
    with flushed_denormals():
        trainer.fit(on_step=on_step)
    seconds = time.process_time() - start
    trainer.save(out / name / "checkpoint.pt")
    test = cast(Tensors, data.test)
    image = test.images[0]
    return {
        "rows": trainer.rows,
        "seconds": seconds,
        "test_accuracy": accuracy(model, test),
        "records": CollapseMonitor(model, images=len(test)).measure(test.images, steps),
        "image": image[0].tolist(),
        "matrix": patch_matrix(model, image).tolist(),
    }


@torch.no_grad()
def patch_matrix(model: ViT, image: Tensor) -> Tensor:
    """Cosines [N, N] between the patches of one image [C, S, S] that leave the last block."""
    last = model.eval()(image[None], return_tokens=True)[1][-1]
    patches = F.normalize(last[0, model.num_prefix_tokens :].float(), dim=-1)
    return patches @ patches.T


def table(results: dict[str, dict[str, Any]]) -> str:
    heads = {
        "test accuracy": 15,
        "|patch cosine|": 16,
        "effective rank": 16,
        "head cosine": 13,
        "CPU time": 10,
    }
    lines = [" " * 24 + "".join(title.rjust(width) for title, width in heads.items())]
    for name, result in results.items():
        last = result["records"][-1]
        head_cosine = statistics.mean(record["head_cosine"] for record in result["records"])
        lines.append(
            f"{TITLES[name]:24s}{100 * result['test_accuracy']:13.1f} %{last['patch_abs_cosine']:16.2f}"
            f"{last['effective_rank']:16.1f}{head_cosine:13.2f}{result['seconds']:8.0f} s"
        )
    return "\n".join(lines)


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share seen in count trials (Wilson 1927), which stays inside [0, 1]."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half


def notes(results: dict[str, dict[str, Any]], images: int) -> str:
    """How the numbers were taken, how sure they are, and what they do not show."""
    alike = {name: result["records"][-1]["patch_abs_cosine"] for name, result in results.items()}
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


def compare_cost(batch: int, rounds: int) -> dict[str, dict[str, float | None]]:
    """Milliseconds and peak memory of one training step of each variant that can run here; prints them."""
    missing = _dispatch.missing("native", "cpu")
    labels: dict[cost.Variant, str]
    labels = {"published": "published form (Conv2d mix)", "reference": "reference (einsum mix)"}
    if not missing:
        labels["native"] = "native, fused"
    print(
        f"\nOne training step of 4 DeepViT-32 blocks: dim 384, 12 heads, 197 tokens, batch {batch}, float32, "
        f"{torch.get_num_threads()} threads"
    )
    times = cost.median_times(tuple(labels), batch, rounds=rounds)
    memory = {variant: cost.peak_memory_apart(variant, batch) for variant in labels}
    for variant, label in labels.items():
        megabytes = "-" if memory[variant] is None else f"{memory[variant]:.0f}"
        line = f"{label:30s}{times[variant]:8.0f} ms{megabytes:>8} MB"
        if not missing and variant != "native":
            line += f"   native is {times[variant] / times['native']:.1f} times as fast"
        print(line)
    if missing:
        print(f"native, fused: not here: {missing}")
    print(
        f"Medians of {rounds} steps, taken in turns in one process. Memory: resident-set peak above weights "
        "and optimizer state, in a process of its own for each."
    )
    return {variant: {"ms": times[variant], "megabytes": memory[variant]} for variant in labels}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vitdiv_kernels.demo",
        description="Train a plain ViT, one with diversity losses and one with re-attention on digits. "
        "`python -m vitdiv_kernels.demo segment --help` is the other demo: scenes, a class for each pixel.",
        formatter_class=HelpFormatter,
    )
    add, count = parser.add_argument, number(int, 1)
    add("--steps", type=count, default=1200, help="updates of each; few steps make collapse look worse")
    add("--seed", type=number(int, 0), default=0, help="of weights, batches, augmentation, not of the split")
    add(
        "--out", type=Path, default=Path("runs/demo"), help="folder for demo.png, results.json, logs, weights"
    )
    add("--cost-batch", type=count, default=16, help="batch of the cost comparison")
    add("--cost-rounds", type=number(int, 0), default=5, help="timed steps of that; 0 leaves it out")
    return parser


def run(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    pyplot("the demo")  # before the training, which takes longer
    data = load_digits()
    count = len(cast(Tensors, data.test))
    print(
        f"{len(data.train)} digits to train on, {len(data.val)} to validate, {count} to test; "
        f"24 blocks, {args.steps} steps; {backend_line()}",
        flush=True,
    )
    results = train_models(TITLES, train_model, args.steps, args.seed, args.out)
    print("\n" + table(results) + "\n\n" + notes(results, count))
    figure.draw(results, TITLES, args.out / "demo.png")
    costs = compare_cost(args.cost_batch, args.cost_rounds) if args.cost_rounds else {}
    with open(args.out / "results.json", "w") as file:
        json.dump({"steps": args.steps, "seed": args.seed, "models": results, "cost": costs}, file)
    print(f"\n{args.out / 'demo.png'} shows it; {time.perf_counter() - start:.0f} s in all")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(make_parser(), run, argv)
