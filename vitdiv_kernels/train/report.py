"""How far a trained ViT has collapsed, in numbers and a figure: `python -m vitdiv_kernels.report RUN`."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .. import recipes
from ..attach.monitor import CollapseMonitor, Record, read_records
from ..recipes import Recipe
from . import checkpoint, models, plots, tasks
from .cli import HelpFormatter, number, run_command, usable
from .earlier import recipe_of_today
from .errors import DataError, TrainError
from .segment.settings import Dense

COLUMNS = {
    "patch cosine": "patch_cosine",
    "5 %": "patch_cosine_q05",
    "95 %": "patch_cosine_q95",
    "|patch cosine|": "patch_abs_cosine",
    "head cosine": "head_cosine",
    "entropy": "attention_entropy",
    "effective rank": "effective_rank",
    "residual": "residual",
}


def load_model(path: Path) -> tuple[nn.Module, int, Recipe, tasks.Kind, Dense]:
    """The model of a checkpoint, its step, its recipe, its task and the options of that.

    Raises TrainError.
    """
    state = checkpoint.read(path, ("model", "config", "recipe", "step"))
    config = models.restored(state["config"], path)
    kind, options = tasks.restored(state["task"], path)
    model = kind.make(config, options)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise TrainError(f"{path} does not fit its own configuration: {error}") from None
    try:
        recipe = recipes.parse(recipe_of_today(state["recipe"]), str(path))
    except ValueError as error:
        raise TrainError(f"the recipe of {error}") from None
    return model, state["step"], recipe, kind, options


def table(records: list[Record]) -> str:
    """The measures of each block, and the likeness of its maps to those of the block before."""
    widths = [max(8, len(title) + 2) for title in COLUMNS]
    titles = "".join(title.rjust(width) for title, width in zip(COLUMNS, widths, strict=True))
    lines = [f"block{titles}  map before"]
    for i, record in enumerate(records):
        values = zip(COLUMNS.values(), widths, strict=True)
        shown = "".join(f"{_shown(record[name]):>{width}}" for name, width in values)
        before = _shown(record["attention_cosine"][i - 1] if i else math.nan)
        lines.append(f"{i + 1:5d}{shown}{before:>12}")
    return "\n".join(lines)


def _shown(value: float) -> str:
    """`-` stands for what was not measured."""
    return "-" if math.isnan(value) else f"{value:.3f}"


def measured(model: nn.Module, images: Any, step: int) -> tuple[list[Record], str | None]:
    """The records of a model, and why its attention maps were not measured, a sentence, or None."""
    try:
        return CollapseMonitor(model, images=len(images)).measure(images, step), None
    except TypeError as error:
        return CollapseMonitor(model, images=len(images), maps=False).measure(images, step), str(error)


def similar_blocks(records: list[Record], threshold: float = 0.9) -> int:
    """Blocks whose maps have a mean cosine above the threshold with those of the block before."""
    return sum(records[i]["attention_cosine"][i - 1] > threshold for i in range(1, len(records)))


def draw(records: list[Record], history: list[Record], title: str, path: Path) -> None:
    """Writes the PNG: the measures now, by block, and, where there is a history, by block and step."""
    plt = plots.pyplot("the report")
    figure, axes = plt.subplots(
        2 if history else 1, 3, figsize=(13.5, 8 if history else 4.2), layout="constrained", squeeze=False
    )
    figure.suptitle(title, fontsize=11)
    depth = len(records)
    blocks, heat = range(1, depth + 1), dict(cmap="viridis", vmin=0, vmax=1, aspect="auto")
    layers, heads, patches = axes[0]
    corner = (0.5, depth + 0.5, depth + 0.5, 0.5)
    shown = layers.imshow([record["attention_cosine"] for record in records], extent=corner, **heat)
    figure.colorbar(shown, ax=layers, extend="min")
    layers.set(title="attention maps: cosine of two blocks", xlabel="block", ylabel="block")
    heads.plot(blocks, [r["head_cosine"] for r in records], color="#0072B2", marker="o", markersize=3)
    heads.set(title="heads: mean cosine of their maps", xlabel="block", ylim=(0, 1.02))
    patches.fill_between(
        blocks,
        [r["patch_cosine_q05"] for r in records],
        [r["patch_cosine_q95"] for r in records],
        color="#D55E00",
        alpha=0.2,
        label="5 % to 95 % of pairs",
    )
    patches.plot(blocks, [r["patch_cosine"] for r in records], color="#D55E00", label="mean")
    patches.set(title="patches: cosine of two", xlabel="block", ylim=(-1.02, 1.02))
    patches.legend(frameon=False, loc="lower right")
    plots.add_grid(heads, patches)
    if history:
        steps = sorted({record["step"] for record in history})
        by_step = [[r for r in history if r["step"] == step] for step in steps]
        over_time = {
            "maps: cosine with the block before": lambda r: (
                r["attention_cosine"][r["block"] - 1] if r["block"] else math.nan
            ),
            "heads: mean cosine of their maps": lambda r: r["head_cosine"],
            "patches: mean cosine of two": lambda r: r["patch_cosine"],
        }
        for axis, (name, value) in zip(axes[1], over_time.items(), strict=True):
            image = [[value(by_block[i]) for by_block in by_step] for i in range(depth)]
            shown = axis.pcolormesh(steps, blocks, image, cmap="viridis", vmin=0, vmax=1, shading="nearest")
            axis.invert_yaxis()
            axis.set(title=name + ", over time", xlabel="step", ylabel="block")
            figure.colorbar(shown, ax=axis, extend="min")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vitdiv_kernels.report",
        description="Measure how alike patches, heads and layers of a trained ViT are; print and draw it.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN_OR_CHECKPOINT", help="a folder of the trainer, or its checkpoint.pt"
    )
    parser.add_argument(
        "--data",
        help="digits, or imagefolder:PATH; of models that segment scenes, or segfolder:PATH; its validation "
        "images are measured (default: digits, or scenes)",
    )
    parser.add_argument("--images", type=number(int, 1), default=64, help="number of images to measure")
    parser.add_argument("--out", type=Path, help="the PNG (default: report.png beside the checkpoint)")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda")
    return parser


def run(args: argparse.Namespace) -> None:
    plots.pyplot("the report")  # before the measurements, which take longer
    path = args.run / "checkpoint.pt" if args.run.is_dir() else args.run
    model, step, recipe, kind, options = load_model(path)
    config: Any = model.config
    # the recipe's seed splits a folder as it was split in training: no image is measured that was trained on
    data = kind.load(args.data or kind.default_data, config, recipe, options)
    images = kind.plain(data, *data.val.__getitems__(list(range(min(args.images, len(data.val))))))
    records, why_not = measured(model.to(usable(args.device)), images, step)
    csv = path.with_name("collapse.csv")
    try:
        history = read_records(csv) if csv.exists() else []
    except ValueError as error:
        raise DataError(str(error)) from None
    blocks = [record["block"] for record in history]
    if blocks != list(range(len(records))) * (len(history) // len(records)):
        raise DataError(
            f"{csv} does not have every block of the {len(records)} of {path} at each step: remove it"
        )
    print(f"{path}, step {step}, {len(images)} validation images\n\n{table(records)}\n")
    print(
        f"Attention maps were not measured: {why_not}."
        if why_not
        else f"{similar_blocks(records)} of {len(records)} blocks have maps whose mean cosine with those of "
        "the block before is above 0.9."
    )
    if not history:
        print(f"There is no {csv}: train with --monitor-every to see this over time.")
    out = args.out or path.with_name("report.png")
    try:
        draw(records, history, f"{path}, step {step}, {len(images)} images", out)
    except (OSError, ValueError) as error:  # matplotlib raises ValueError for a suffix that it can't write
        raise DataError(f"{out} can't be written: {error}") from None
    print(f"{out} shows it.")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(make_parser(), run, argv)
