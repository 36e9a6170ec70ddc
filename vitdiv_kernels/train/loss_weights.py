"""The trainer's diversity losses: short names, presets and losses of `DiversityObjective`, with weights."""

import json
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

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
WEIGHTS = DIVERSITY | {name: 1.0 for name in (*PRESETS, *LOSSES)}


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


def objective_terms(weights: Mapping[str, float]) -> dict[str, Term]:
    """The configuration of a `DiversityObjective` for what `parse_losses` gave.

    A preset becomes its losses, as PRESET.NAME, each with the preset's weight times its own. Raises
    ValueError for a weight that is not finite.
    """
    terms = {}
    for name, weight in weights.items():
        if name in PRESETS:
            for part, term in PRESETS[name].items():
                terms[f"{name}.{part}"] = replace(term, weight=weight * term.weight)
        else:
            terms[name] = replace(TERMS[name], weight=weight) if name in TERMS else Term(name, weight)
    return terms


def as_recipe(weights: Mapping[str, float]) -> dict[str, Any]:
    """The same as the `losses` of a recipe."""
    return in_json(objective_terms(weights))


def in_json(terms: Mapping[str, Term]) -> dict[str, Any]:
    """Terms in types of JSON, with all their keys."""
    return json.loads(json.dumps({name: asdict(term) for name, term in terms.items()}))


def listing() -> str:
    """The names for `--losses`, for its help."""

    def line(name: str, terms: Iterable[Term]) -> str:
        text = f"{name:24}" + " + ".join(f"{term.weight:g}*{term.loss}" for term in terms)
        return textwrap.fill(text, 80, initial_indent="  ", subsequent_indent=" " * 26)

    return "\n".join(
        [
            "losses by short name (diversity is all three; NAME=WEIGHT sets another weight):",
            *(line(name, [term]) for name, term in TERMS.items()),
            "\npublished losses (a weight multiplies the whole):",
            *(line(name, terms.values()) for name, terms in PRESETS.items()),
            "\nlosses by name (weight 1 unless given):",
            textwrap.fill(", ".join(LOSSES), 80, initial_indent="  ", subsequent_indent="  "),
        ]
    )
