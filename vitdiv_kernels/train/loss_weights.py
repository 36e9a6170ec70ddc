"""The trainer's diversity losses: short names, presets and losses of `DiversityObjective`, with weights."""

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ..attach.presets import PRESETS
from ..attach.terms import LOSSES, Term

# Gong et al. (arXiv 2104.12753), Chen et al. (arXiv 2203.06345). Chen et al. weigh heads with 1e-4, beside
# the cross-entropy of 1,000 classes; the first two weights are theirs.
TERMS = {
    "cosine": Term("pairwise_cosine", 0.5),
    "contrast": Term("patch_contrast", 0.5),
    "heads": Term("attention_diversity", 0.01, options={"include_self": False}),
}
DIVERSITY = {name: term.weight for name, term in TERMS.items()}
# They need two images mixed by regions; the trainer mixes by CutMix.
OF_REGIONS = {"region_mixing"}
OF_REGIONS |= {
    name for name, terms in PRESETS.items() if any(term.loss in OF_REGIONS for term in terms.values())
}
WEIGHTS = DIVERSITY | {name: 1.0 for name in (*PRESETS, *LOSSES) if name not in OF_REGIONS}


def parse_losses(text: str) -> dict[str, float]:
    """`none`, `diversity` (all three), or a list such as `cosine=0.5,koleo=0.1`.

    A name is a short name, a preset or a loss. Raises ValueError.
    """
    if text == "none":
        return {}
    if text == "diversity":
        return dict(DIVERSITY)
    weights = {}
    for item in text.split(","):
        name, _, value = (part.strip() for part in item.partition("="))
        if name in OF_REGIONS:
            raise ValueError(
                f"the loss {name!r} needs two images mixed by regions, which the trainer does not do: "
                "vitdiv_kernels.recipes.mix does it in a loop of your own"
            )
        if name not in WEIGHTS:
            raise ValueError(
                f"unknown loss {name!r}: give none or diversity alone, or NAME=WEIGHT,... of "
                f"{', '.join(WEIGHTS)}"
            )
        if name in weights:
            raise ValueError(f"the loss {name!r} is given twice: give it one weight")
        try:
            weights[name] = float(value) if value else WEIGHTS[name]
        except ValueError:
            raise ValueError(f"the weight of the loss {name!r} must be a number, got {value!r}") from None
    return weights


def objective_terms(weights: Mapping[str, float], label_smoothing: float = 0.0) -> dict[str, Term]:
    """The configuration of a `DiversityObjective` for what `parse_losses` gave.

    A preset becomes its losses, as PRESET.NAME, each with the preset's weight times its own. patch_mixing
    smooths the labels of patches as the task does those of images, unless its preset says by how much. Raises
    ValueError for a weight that is not finite.
    """
    terms = {}
    for name, weight in weights.items():
        if name in PRESETS:
            for part, term in PRESETS[name].items():
                terms[f"{name}.{part}"] = replace(term, weight=weight * term.weight)
        else:
            terms[name] = replace(TERMS[name], weight=weight) if name in TERMS else Term(name, weight)
    return {
        name: replace(term, options={"smoothing": label_smoothing, **term.options}) if mixes(term) else term
        for name, term in terms.items()
    }


def mixes(term: Term) -> bool:
    """Whether the loss is made for mixed images."""
    return term.loss == "patch_mixing"


def listing() -> str:
    """The names for `--losses`, for its help."""

    def line(name: str, terms: Iterable[Term]) -> str:
        text = f"{name:24}" + " + ".join(f"{term.weight:g}*{term.loss}" for term in terms)
        return textwrap.fill(text, 80, initial_indent="  ", subsequent_indent=" " * 26)

    return "\n".join(
        [
            "losses by short name (diversity is all three; NAME=WEIGHT sets another weight):",
            *(line(name, [term]) for name, term in TERMS.items()),
            "\npublished recipes (a weight multiplies the whole):",
            *(line(name, terms.values()) for name, terms in PRESETS.items() if name in WEIGHTS),
            "\nlosses by name (weight 1 unless given):",
            textwrap.fill(
                ", ".join(name for name in LOSSES if name in WEIGHTS),
                80,
                initial_indent="  ",
                subsequent_indent="  ",
            ),
        ]
    )
