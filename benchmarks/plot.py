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
TITLES = {
    "pairwise_cosine abs": "patch cosine",
    "attention_gram gram": "Gram matrix of maps",
    "reattention norm=none": "re-attention",
    "reattention norm=batch": "re-attention, batch norm",
    "reattention norm=layer": "re-attention, layer norm",
}
BLUE, ORANGE, GREY = "#2b6cb0", "#dd8452", "#b0b0b0"


def read(path: Path) -> dict[tuple[str, ...], dict[tuple[str, str], dict[str, str]]]:
    """For each workload its rows by (mode, provider), in the order of the file."""
    workloads = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            key = tuple(row[name] for name in NAMES)
            workloads.setdefault(key, {})[row["mode"], row["provider"]] = row
    return workloads


def draw(workloads: dict, provider: str, modes: list[str]) -> plt.Figure:
    """A row of panels for each mode: speed as a multiple of that of eager and compile, and peak extra memory.

    A workload is drawn where the provider has something to be compared with.
    """
    shown = {
        mode: {key: rows for key, rows in workloads.items() if _compared(rows, mode, provider)}
        for mode in modes
    }
    shown = {mode: found for mode, found in shown.items() if found}
    heights = [0.8 + 0.5 * len(found) for found in shown.values()]
    figure, axes = plt.subplots(
        len(shown), 2, figsize=(10, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for (mode, found), (speed, memory) in zip(shown.items(), axes, strict=True):
        titles = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "forward and backward"}
        ratios = {
            f"that of {other}": [rows[mode, provider][f"ratio_{other}"] for rows in found.values()]
            for other in ("eager", "compile")
        }
        _bars(speed, [_label(key) for key in found], ratios, (GREY, BLUE), "{:.1f}")
        speed.axvline(1, color="black", linewidth=0.8)
        speed.set_title(f"{titles[mode]}: speed as a multiple of", loc="left", fontsize=10, pad=22)
        peaks = {
            name: [rows.get((mode, name), {}).get("peak_extra_mb", "") for rows in found.values()]
            for name in ("eager", "compile", provider)
        }
        _bars(memory, [""] * len(found), peaks, (GREY, BLUE, ORANGE), "{:.3g}")
        memory.set_title("peak memory beyond inputs and results, MB", loc="left", fontsize=10, pad=22)
    return figure


def _compared(rows: dict, mode: str, provider: str) -> bool:
    """Whether the provider has a row of that mode, and another provider one beside it."""
    return (mode, provider) in rows and any(m == mode and name != provider for m, name in rows)


def _label(key: tuple[str, ...]) -> str:
    op, variant, shape, dtype, device, threads = key
    where = f"{threads} thread" + "s" * (threads != "1") if device == "cpu" else device
    name = TITLES.get(f"{op} {variant}", f"{op} {variant}")
    return f"{name}\n{shape}, {dtype}, {where}"


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
        axis.legend(
            fontsize=8, frameon=False, ncols=len(groups), loc="lower left", bbox_to_anchor=(0, 0.99),
            borderaxespad=0, handlelength=1.2,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path, help="written by a benchmark's --out")
    parser.add_argument("--out", type=Path, help="PNG; default: beside the CSV, of the same name")
    parser.add_argument("--provider", default="native", help="whose bars to draw; default: native")
    parser.add_argument("--modes", help="such as fwd,fwd+bwd; default: fwd+bwd, or what the CSV has")
    args = parser.parse_args()
    if not args.csv.exists():
        parser.error(f"there is no {args.csv}; a benchmark writes one with --out")
    workloads = read(args.csv)
    providers = sorted({provider for rows in workloads.values() for _, provider in rows})
    if args.provider not in providers:
        parser.error(f"{args.csv} has no rows of provider {args.provider!r}; it has {', '.join(providers)}")
    found = {mode for rows in workloads.values() for mode, _ in rows if _compared(rows, mode, args.provider)}
    if not found:
        parser.error(f"{args.csv} has nothing that {args.provider} could be compared with")
    modes = args.modes.split(",") if args.modes else ["fwd+bwd"] if "fwd+bwd" in found else sorted(found)
    if absent := [mode for mode in modes if mode not in found]:
        parser.error(f"{args.csv} has no rows of mode {absent[0]!r}; it has {', '.join(sorted(found))}")
    draw(workloads, args.provider, modes).savefig(args.out or args.csv.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
