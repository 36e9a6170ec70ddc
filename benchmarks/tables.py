"""Writes the tables of README.md and docs/speed.md from the CSVs in benchmarks/results.

    python benchmarks/tables.py            # after new rows; --check only says whether the pages have them

A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

import argparse
import csv
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/speed.md")
KEY = ("op", "variant", "provider", "mode", "shape", "dtype", "threads")
OPERATIONS = {
    "pairwise_cosine abs": "patch cosine",
    "attention_gram gram": "Gram matrix of maps",
    "reattention norm=none": "re-attention, no norm",
    "reattention norm=batch": "re-attention, batch norm",
    "reattention norm=layer": "re-attention, layer norm",
}
LOSSES = {
    "signed_cosine": "cosine, signed",
    "patch_contrast": "patch contrast",
    "gram_anchoring": "Gram anchoring, the student's gradient",
    "gram_anchoring_both": "Gram anchoring, both gradients",
    "koleo": "KoLeo",
    "info_nce": "InfoNCE",
    "weight_soft_orthogonality": "soft orthogonality of 36 weights",
}
OBJECTIVE = {
    "recipe": "recipe of Diverse-ViT: patches, heads, weights, labels",
    "every": "all 19 losses of its paper at once",
    "monitor": "a measurement of `CollapseMonitor`, 8 images",
}
MODELS = {"deepvit_16b": "DeepViT-16B", "cait_xxs24": "CaiT-XXS24 of timm"}
SHORT = (
    ("patch cosine", "64x196x384"),
    ("Gram matrix of maps", "32x12x197x64"),
    ("re-attention, batch norm", "32x12x197x64"),
    ("re-attention, layer norm", "32x12x197x64"),
)


def read(name):
    """The rows of a CSV by KEY; a run that was repeated replaces the rows of the earlier one."""
    with open(ROOT / "benchmarks/results" / name, newline="") as file:
        rows = list(csv.DictReader(file))
    return {tuple(row[name] for name in KEY): row for row in rows}


def operation_of(row):
    return OPERATIONS[f"{row['op']} {row['variant']}"]


def number(text):
    """Two digits, or three above 100; empty cells stay empty."""
    if not text:
        return ""
    value = float(text)
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 0.95 else f"{value:.2g}"


def table(head, rows):
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def origin(rows):
    """Where rows come from: each value once, in the order of the file."""

    def values(name):
        return ", ".join(dict.fromkeys(row[name] for row in rows.values()))

    return (
        f"Two threads, {values('machine')} with {values('cpu_capability').upper()}, torch {values('torch')}. "
        f"Commit {values('commit')}, {values('date')}."
    )


def cpu(rows, mode, provider="native"):
    """(operation, shape), and the rows of the providers in that mode."""
    kept = [r for r in rows.values() if r["mode"] == mode and r["dtype"] == "float32" and r["threads"] == "2"]
    found = {}
    for row in kept:
        found.setdefault((operation_of(row), row["shape"]), {})[row["provider"]] = row
    return {name: by for name, by in found.items() if provider in by}


def speed_short():
    found = cpu(read("cpu.csv"), "fwd+bwd")
    head = ["forward + backward, float32", "× eager", "× compile", "peak MB", "peak MB of eager"]
    rows = [
        [
            f"{name}, {shape}",
            number(by["native"]["ratio_eager"]),
            number(by["native"]["ratio_compile"]),
            number(by["native"]["peak_extra_mb"]),
            number(by["eager"]["peak_extra_mb"]),
        ]
        for (name, shape) in SHORT
        for by in [found[name, shape]]
    ]
    return table(head, rows)


def speed(mode):
    head = ["operation", "shape", "× eager", "× compile", "MB native", "MB eager", "MB compile"]
    rows = [
        [
            name,
            shape,
            number(by["native"]["ratio_eager"]),
            number(by["native"]["ratio_compile"]),
            *(number(by[p]["peak_extra_mb"]) for p in ("native", "eager", "compile")),
        ]
        for (name, shape), by in cpu(read("cpu.csv"), mode).items()
    ]
    return table(head, rows)


def low_precision():
    """Time of 16-bit inputs over that of float32, forward and backward."""
    rows = read("cpu.csv")
    by = {}
    for row in rows.values():
        if row["provider"] == "native" and row["mode"] == "fwd+bwd":
            by.setdefault((operation_of(row), row["shape"]), {})[row["dtype"]] = float(row["ms"])
    body = [
        [name, shape, *(f"{ms[kind] / ms['float32']:.2f}" for kind in ("bfloat16", "float16"))]
        for (name, shape), ms in by.items()
    ]
    return table(["operation", "shape", "bfloat16", "float16"], body)


def batches(mode):
    rows = {key: r for key, r in read("cpu_batches.csv").items() if r["mode"] == mode}
    sizes = (1, 4, 32)

    def get(variant, provider, size, threads="2"):
        key = ("reattention", variant, provider, mode, f"{size}x12x197x64", "float32", threads)
        return rows[key]

    def ms(*arguments):
        return float(get(*arguments)["ms"])

    body = [
        [f"{operation}, × eager"] + [number(get(variant, "native", b)["ratio_eager"]) for b in sizes]
        for variant, operation in (
            ("norm=none", "no norm"),
            ("norm=batch", "batch norm"),
            ("norm=layer", "layer norm"),
        )
    ]
    none = "norm=none"
    body.append(
        ["no norm, × `scaled_dot_product_attention`, which mixes nothing"]
        + [f"{ms(none, 'sdpa', b) / ms(none, 'native', b):.2g}" for b in sizes]
    )
    body.append(
        ["no norm, rate of its products over that of one large product"]
        + [f"{float(get(none, 'native', b)['ratio_gemm']):.2f}" for b in sizes]
    )
    body.append(
        ["no norm, two threads × one"]
        + [f"{ms(none, 'native', b, '1') / ms(none, 'native', b):.2g}" for b in sizes]
    )
    return table(["", *(f"B = {b}" for b in sizes)], body)


def models():
    rows = read("cpu_models.csv").values()
    ms = {(row["variant"], row["provider"], row["shape"]): float(row["ms"]) for row in rows}
    body = [
        [title, size, *(f"{ms[name, p, shape] / ms[name, 'plain', shape]:.2f}" for p in ("eager", "ours"))]
        for name, title in MODELS.items()
        for size, shape in (("2", "2x224"), ("16", "16x224"))
    ]
    return table(["model", "batch", "published", "fused"], body)


def losses():
    rows = read("cpu_losses.csv")
    by = {}
    for row in rows.values():
        if row["op"] == "losses":
            by.setdefault((row["variant"], row["shape"]), {})[row["provider"]] = row
    body = [
        [
            LOSSES[name],
            shape,
            number(found["ours"]["ratio_eager"]),
            number(found["ours"]["ratio_compile"]),
            *(number(found.get(p, {}).get("peak_extra_mb", "")) for p in ("ours", "eager", "compile")),
        ]
        for (name, shape), found in by.items()
    ]
    return table(["loss", "shape", "× eager", "× compile", "MB ours", "MB eager", "MB compile"], body)


def objective():
    """What losses, and a measurement of the monitor, add to a training step."""
    rows = read("cpu_losses.csv").values()
    ms = {(r["variant"], r["provider"]): float(r["ms"]) for r in rows if r["op"] == "objective"}

    def added(variant, provider):
        if (variant, provider) not in ms:
            return ""
        return f"{100 * (ms[variant, provider] / ms[variant, 'plain'] - 1):.2g} %"

    body = [[title, *(added(name, p) for p in ("ours", "eager"))] for name, title in OBJECTIVE.items()]
    return table(["what", "adds to a training step", "with the published formulas"], body)


TABLES = {
    "speed": speed_short,
    "forward": lambda: speed("fwd"),
    "forward and backward": lambda: speed("fwd+bwd"),
    "16 bits": low_precision,
    "batches, forward": lambda: batches("fwd"),
    "batches, forward and backward": lambda: batches("fwd+bwd"),
    "models": models,
    "losses": losses,
    "objective": objective,
    **{
        f"origin of {name}": lambda name=name: origin(read(name))
        for name in ("cpu.csv", "cpu_batches.csv", "cpu_models.csv", "cpu_losses.csv")
    },
}


def renewed(text):
    """The page with its tables as the CSVs have them. Raises KeyError for a name that is not in TABLES."""
    return re.sub(
        r"(<!-- table: (.*?) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}",
        text,
        flags=re.DOTALL,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page is behind")
    args = parser.parse_args()
    behind = []
    for name in PAGES:
        text = (ROOT / name).read_text()
        new = renewed(text)
        if new != text:
            behind.append(name)
            if not args.check:
                (ROOT / name).write_text(new)
    if args.check and behind:
        sys.exit(f"{', '.join(behind)}: run python benchmarks/tables.py, the CSVs have other numbers")


if __name__ == "__main__":
    main()
