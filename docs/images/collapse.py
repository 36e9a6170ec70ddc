"""Draws collapse.png from the results of the demo.

python -m vitdiv_kernels.demo
python docs/images/collapse.py runs/demo/results.json
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Okabe and Ito's palette; line styles tell the models apart without colour
MODELS = {
    "plain": ("plain ViT", "#000000", "-"),
    "losses": ("with diversity losses", "#0072B2", "--"),
    "reattention": ("with re-attention", "#D55E00", "-."),
}


def draw(results, path):
    plt.rcParams.update({"font.size": 10, "axes.titlesize": 10})
    widths = [1.55, *(1 for _ in MODELS), 0.06]
    figure, (curve, *grids, scale) = plt.subplots(
        1, len(widths), figsize=(11, 3.0), width_ratios=widths, layout="constrained"
    )
    for name, (title, color, dash) in MODELS.items():
        cosine = [record["patch_abs_cosine"] for record in results["models"][name]["records"]]
        curve.plot(range(1, 1 + len(cosine)), cosine, dash, color=color, label=title, linewidth=1.8)
    curve.set(title="how alike patches are, by block", xlabel="block", ylabel="mean |cosine|", ylim=(0, 1))
    curve.legend(frameon=False, fontsize=9, loc="upper left")
    curve.spines[["top", "right"]].set_visible(False)
    for axis, (name, (title, color, _)) in zip(grids, MODELS.items(), strict=True):
        matrix = results["models"][name]["matrix"]
        shown = axis.imshow(matrix, cmap="PuOr_r", vmin=-1, vmax=1)
        axis.set_title(title, color=color)
        axis.set(xlabel="patch of one image", xticks=[], yticks=[])
    grids[0].set_ylabel("patch, last block")
    figure.colorbar(shown, cax=scale, label="cosine")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/images/collapse.py runs/demo/results.json")
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(__file__).with_suffix(".png"))
