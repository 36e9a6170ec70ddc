"""Bars of speed and memory from the CSV that the benchmarks write, and from nothing else.

A run that was repeated replaces the rows of the earlier one. Example:

    python benchmarks/plot.py benchmarks/results/cpu.csv --out benchmarks/results/cpu.png
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NAMES = ("op", "variant", "shape", "dtype", "device", "threads")
BLUE, ORANGE, GREY = "#2b6cb0", "#dd8452", "#b0b0b0"


def read(path: Path) -> dict[tuple[str, ...], dict[tuple[str, str], dict[str, str]]]:
    """For each workload its rows by (mode, provider), in the order of the file."""
    workloads = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            key = tuple(row[name] for name in NAMES)
            workloads.setdefault(key, {})[row["mode"], row["provider"]] = row
    return workloads


def draw(workloads: dict, provider: str) -> plt.Figure:
    """A row of panels for each mode: how many times faster than eager and compile, and peak extra memory."""
    found = {mode for rows in workloads.values() for mode, name in rows if name == provider}
    modes = [mode for mode in ("fwd", "bwd", "fwd+bwd") if mode in found]
    heights = [1 + 0.55 * sum((mode, provider) in rows for rows in workloads.values()) for mode in modes]
    figure, axes = plt.subplots(
        len(modes), 2, figsize=(13, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for mode, (speed, memory) in zip(modes, axes, strict=True):
        shown = {key: rows for key, rows in workloads.items() if (mode, provider) in rows}
        labels = [_label(key) for key in shown]
        ratios = {
            f"over {other}": [rows[mode, provider][f"ratio_{other}"] for rows in shown.values()]
            for other in ("eager", "compile")
        }
        _bars(speed, labels, ratios, (GREY, BLUE), "{:.1f}")
        speed.axvline(1, color="black", linewidth=0.8)
        speed.set_title(f"{mode}: times faster, {provider}", loc="left", fontsize=10)
        peaks = {
            name: [rows.get((mode, name), {}).get("peak_extra_mb", "") for rows in shown.values()]
            for name in ("eager", "compile", provider)
        }
        _bars(memory, [""] * len(labels), peaks, (GREY, BLUE, ORANGE), "{:.3g}")
        memory.set_xscale("symlog", linthresh=1)
        memory.set_title(f"{mode}: peak extra memory, MB", loc="left", fontsize=10)
    return figure


def _label(key: tuple[str, ...]) -> str:
    op, variant, shape, dtype, device, threads = key
    where = f"{threads} thread(s)" if device == "cpu" else device
    return f"{op} {variant}\n{shape} {dtype}, {where}"


def _bars(axis: plt.Axes, labels: list[str], groups: dict[str, list[str]], colors, form: str) -> None:
    """Horizontal bars, the first label at the top; a cell that was not measured has none."""
    groups = {name: cells for name, cells in groups.items() if any(cells)}
    height = 0.8 / max(1, len(groups))
    for index, (name, cells) in enumerate(groups.items()):
        places = [place + index * height for place, cell in enumerate(cells) if cell]
        values = [float(cell) for cell in cells if cell]
        bars = axis.barh(places, values, height, label=name, color=colors[index])
        axis.bar_label(bars, [form.format(value) for value in values], padding=2, fontsize=8)
    axis.set_yticks([place + 0.4 - height / 2 for place in range(len(labels))], labels, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlim(left=0)
    axis.spines[["top", "right"]].set_visible(False)
    if groups:
        axis.legend(fontsize=8, frameon=False, ncols=len(groups), loc="lower right", bbox_to_anchor=(1, 1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path, help="written by a benchmark's --out")
    parser.add_argument("--out", type=Path, help="PNG; default: beside the CSV, of the same name")
    parser.add_argument("--provider", default="native", help="whose bars to draw; default: native")
    args = parser.parse_args()
    if not args.csv.exists():
        parser.error(f"there is no {args.csv}; a benchmark writes one with --out")
    workloads = read(args.csv)
    providers = sorted({provider for rows in workloads.values() for _, provider in rows})
    if args.provider not in providers:
        parser.error(f"{args.csv} has no rows of provider {args.provider!r}; it has {', '.join(providers)}")
    draw(workloads, args.provider).savefig(args.out or args.csv.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
