"""A plain ViT and one with diversity losses that segment scenes of handwritten digits.

`python -m vitdiv_kernels.demo segment` trains them side by side, each by a process with one thread, as
`python -m vitdiv_kernels.train --task segment` trains one, and prints and draws what diversity did.
"""

import argparse
import json
import textwrap
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from .. import CollapseMonitor, recipes
from ..train.cli import HelpFormatter, number, run_command
from ..train.data import Tensors
from ..train.loop import Trainer, flushed_denormals
from ..train.plots import pyplot
from ..train.segment import measures
from ..train.segment.scenes import SIZE, load_scenes
from ..train.segment.settings import HEADS, Dense
from ..train.segment.task import Segmentation
from ..vit import CONFIGS
from . import segment_figure
from .side_by_side import OnStep, train_models

TITLES = {"plain": "plain ViT", "losses": "+ diversity losses"}
MODEL = CONFIGS[recipes.load(Segmentation.default_recipe).model]
SHOWN = 3  # test scenes in the figure
RESAMPLES = 1000


def train_model(
    name: str, steps: int, head: str, seed: int, out: Path, on_step: OnStep | None = None
) -> dict[str, Any]:
    """Trains one of the two, with the weights of the last step, and returns its log rows, confusion matrices
    of the test scenes, measures of collapse, predictions and seconds of this process's CPU time."""
    dense = Dense(head=head)
    data = load_scenes(SIZE, 1, dense)
    torch.manual_seed(seed)
    model = Segmentation.make(MODEL, dense)
    recipe = recipes.load(Segmentation.default_recipe)
    losses = recipes.load("digits").losses if name == "losses" else {}
    recipe = replace(recipe, steps=steps, seed=seed, losses=losses)
    trainer = Trainer(
        model, data, recipe, log_path=out / name / "log.csv", task=partial(Segmentation, options=dense)
    )
    start = time.process_time()
    with flushed_denormals():
        trainer.fit(on_step=on_step)
    seconds = time.process_time() - start
    trainer.save(out / name / "checkpoint.pt")
    test = cast(Tensors, data.test)
    found = [prediction for _, _, prediction in trainer.task.predictions(model, test, len(test))]
    classes = len(data.classes)
    counts = [measures.confusion(mask, each, classes) for mask, each in zip(test.labels, found, strict=True)]
    return {
        "rows": trainer.rows,
        "seconds": seconds,
        "confusion": torch.stack(counts).tolist(),
        "records": CollapseMonitor(model, images=100).measure(test.images, steps),
        "predictions": [each.tolist() for each in found[:SHOWN]],
    }


def difference(plain: Tensor, other: Tensor, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the difference of two mean IoUs, in points, over scenes drawn anew (bootstrap).

    plain, other: confusion matrices of the same scenes, [scenes, classes, classes].
    """
    generator = torch.Generator().manual_seed(seed)
    scenes = len(plain)
    times = torch.zeros(RESAMPLES, scenes, dtype=torch.float64)
    drawn = torch.randint(scenes, (RESAMPLES, scenes), generator=generator)
    times.scatter_add_(1, drawn, torch.ones_like(times))
    means = [
        measures.iou((times @ each.double().flatten(1)).view(RESAMPLES, *each.shape[1:])).nanmean(-1)
        for each in (plain, other)
    ]
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(100 * (means[1] - means[0]), ends).tolist()
    return low, high


def matrices(result: dict[str, Any]) -> Tensor:
    """[scenes, classes, classes]."""
    return torch.tensor(result["confusion"])


def table(results: dict[str, dict[str, Any]]) -> str:
    heads = {"mean IoU": 10, "pixel accuracy": 16, "|patch cosine|": 16, "effective rank": 16, "CPU time": 10}
    lines = [" " * 24 + "".join(title.rjust(width) for title, width in heads.items())]
    for name, result in results.items():
        counts, last = matrices(result).sum(0), result["records"][-1]
        lines.append(
            f"{TITLES[name]:24s}{100 * measures.mean_iou(counts):8.1f} %"
            f"{100 * measures.pixel_accuracy(counts):14.1f} %{last['patch_abs_cosine']:16.2f}"
            f"{last['effective_rank']:16.1f}{result['seconds']:8.0f} s"
        )
    return "\n".join(lines)


def notes(results: dict[str, dict[str, Any]]) -> str:
    """How the numbers were taken, and how sure they are."""
    plain, other = (matrices(results[name]) for name in ("plain", "losses"))
    low, high = difference(plain, other)
    gain = 100 * (measures.mean_iou(other.sum(0)) - measures.mean_iou(plain.sum(0)))
    if low > 0:
        shown = "In this run the diversity losses raised the mean IoU."
    elif high < 0:
        shown = "In this run the diversity losses lowered the mean IoU."
    else:
        shown = "In this run the mean IoUs do not differ by more than other test scenes would change them."
    paragraphs = (
        f"Measured on the {len(plain)} test scenes with the weights of the last step. Mean IoU: over "
        "background and ten digits. |patch cosine| and effective rank: of the patches of a scene after the "
        f"last block; the rank is at most {MODEL.dim}. CPU time: of the training, on one core.",
        f"The diversity losses changed the mean IoU by {gain:+.1f} points; over test scenes drawn anew "
        f"the 95 % interval is {low:+.1f} to {high:+.1f}. {shown} It is one run of each model: "
        "another --seed gives another difference.",
    )
    return "\n\n".join(textwrap.fill(paragraph, 100) for paragraph in paragraphs)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vitdiv_kernels.demo segment",
        description="Train a plain ViT and one with diversity losses to segment scenes of digits.",
        formatter_class=HelpFormatter,
    )
    add, steps = parser.add_argument, recipes.load(Segmentation.default_recipe).steps
    add(
        "--steps",
        type=number(int, 1),
        default=steps,
        help="updates of each",
    )
    add("--head", choices=HEADS, default="linear", help="what makes pixels of tokens")
    add("--seed", type=number(int, 0), default=0, help="of weights, batches, crops, not of the scenes")
    add(
        "--out", type=Path, default=Path("runs/demo_segment"),
        help="folder for segment.png, results.json, logs, weights",
    )  # fmt: skip
    return parser


def run(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    pyplot("the demo")  # before the training, which takes longer
    data = load_scenes(SIZE, 1, Dense())
    test = cast(Tensors, data.test)
    print(
        f"{len(data.train)} scenes to train on, {len(data.val)} to validate, {len(test)} to test; "
        f"{MODEL.depth} blocks, {args.head} head, {args.steps} steps",
        flush=True,
    )
    results = train_models(TITLES, train_model, args.steps, args.head, args.seed, args.out)
    print("\n" + table(results) + "\n\n" + notes(results))
    scenes = [(test.images[i], test.labels[i]) for i in range(SHOWN)]
    iou = {name: measures.iou(matrices(result).sum(0)).tolist() for name, result in results.items()}
    picture = args.out / "segment.png"
    segment_figure.draw(results, iou, scenes, TITLES, data.classes, picture)
    with open(args.out / "results.json", "w") as file:
        json.dump({"steps": args.steps, "seed": args.seed, "head": args.head, "models": results}, file)
    print(f"\n{picture} shows it; {time.perf_counter() - start:.0f} s in all")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(make_parser(), run, argv)
