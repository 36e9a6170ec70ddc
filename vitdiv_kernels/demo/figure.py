"""The figure of the demo: curves of training, curves over the blocks, and patch-patch matrices."""

from pathlib import Path
from typing import Any

from ..train.plots import add_grid, pyplot

# Okabe and Ito's palette, told apart by every kind of colour vision; line styles tell the models apart
# without colour.
STYLE = {"plain": ("#000000", "-"), "losses": ("#0072B2", "--"), "reattention": ("#D55E00", "-.")}


def smooth(values: list[float], keep: float = 0.8) -> list[float]:
    out: list[float] = []
    for value in values:
        out.append(value if not out else keep * out[-1] + (1 - keep) * value)
    return out


def draw(results: dict[str, dict[str, Any]], titles: dict[str, str], path: Path) -> None:
    """Writes the PNG from what `digits.train_model` returned for each model."""
    plt = pyplot("the demo")
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(13.5, 8.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1.12])
    loss, val, cosine, rank = upper.subplots(1, 4)
    for name, result in results.items():
        color, dash = STYLE[name]
        line = dict(color=color, linestyle=dash, linewidth=1.8, label=titles[name])
        rows, records = result["rows"], result["records"]
        blocks = range(1, 1 + len(records))
        loss.plot([r["step"] for r in rows], smooth([r["cross_entropy"] for r in rows]), **line)
        measured = [r for r in rows if r["val_accuracy"] != ""]
        val.plot(
            [r["step"] for r in measured],
            [100 * r["val_accuracy"] for r in measured],
            **line,
            marker="o",
            markersize=3,
        )
        cosine.plot(blocks, [r["patch_abs_cosine"] for r in records], **line)
        rank.plot(blocks, [r["effective_rank"] for r in records], **line)
    loss.set(title="training cross-entropy (smoothed)", xlabel="step", ylabel="nats")
    val.set(title="validation accuracy", xlabel="step", ylabel="%")
    cosine.set(title="likeness of patches: mean |cosine|", xlabel="block", ylim=(0, 1))
    rank.set(title="directions that patches span", xlabel="block", ylabel="effective rank")
    rank.set_ylim(bottom=1)
    add_grid(loss, val, cosine, rank)
    handles, labels = loss.get_legend_handles_labels()
    upper.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, handlelength=3)

    grid = lower.subplots(1, 4, width_ratios=[0.6, 1, 1, 1])
    image = next(iter(results.values()))["image"]
    grid[0].imshow(image, cmap="gray_r")
    grid[0].set(title="one test image", xticks=[], yticks=[])
    for axis, (name, result) in zip(grid[1:], results.items(), strict=True):
        count = len(result["matrix"])
        shown = axis.imshow(
            result["matrix"], cmap="PuOr_r", vmin=-1, vmax=1, extent=(0.5, count + 0.5, count + 0.5, 0.5)
        )
        axis.set_title(
            f"{titles[name]}\ntest accuracy {100 * result['test_accuracy']:.1f} %", color=STYLE[name][0]
        )
        axis.set(xlabel="patch", ylabel="patch", xticks=[1, count // 2, count], yticks=[1, count // 2, count])
    lower.colorbar(shown, ax=grid[1:], label="cosine between two patches", shrink=0.85)
    lower.suptitle("the patches of that image after the last block, each against each", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)
