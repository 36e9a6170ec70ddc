"""The trainer's diversity losses: short names, presets and losses of `DiversityObjective`, with weights."""

from collections.abc import Mapping
from dataclasses import replace

from ..objective import LOSSES, PRESETS, Term

# Gong et al. (arXiv 2104.12753), Chen et al. (arXiv 2203.06345). Chen et al. weigh heads with 1e-4, beside
# the cross-entropy of 1,000 classes; the first two weights are theirs.
TERMS = {
    "cosine": Term("pairwise_cosine", 0.5),
    "contrast": Term("patch_contrast", 0.5),
    "heads": Term("attention_diversity", 0.01, options={"include_self": False}),
}
DIVERSITY = {name: term.weight for name, term in TERMS.items()}
# The trainer mixes no images, so a patch has no label of its own.
UNMIXED = [name for name in LOSSES if name != "patch_mixing"]
WEIGHTS = {name: 1.0 for name in (*PRESETS, *UNMIXED)} | DIVERSITY


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
        name, _, value = item.partition("=")
        if name not in WEIGHTS:
            raise ValueError(
                f"unknown loss {name!r}: give none, diversity, or NAME=WEIGHT,... of {', '.join(DIVERSITY)}, "
                f"{', '.join(PRESETS)} (without patch_mixing), {', '.join(UNMIXED)}"
            )
        try:
            weights[name] = float(value) if value else WEIGHTS[name]
        except ValueError:
            raise ValueError(f"the weight of the loss {name!r} must be a number, got {value!r}") from None
    return weights


def objective_terms(weights: Mapping[str, float]) -> dict[str, Term]:
    """The configuration of a `DiversityObjective` for what `parse_losses` gave.

    A preset becomes its losses except patch_mixing, as PRESET.NAME, each with the preset's weight times its
    own. Raises ValueError for a weight that is not finite.
    """
    terms = {}
    for name, weight in weights.items():
        if name in PRESETS:
            for part, term in PRESETS[name].items():
                if term.loss in UNMIXED:
                    terms[f"{name}.{part}"] = replace(term, weight=weight * term.weight)
        else:
            terms[name] = replace(TERMS[name], weight=weight) if name in TERMS else Term(name, weight)
    return terms
