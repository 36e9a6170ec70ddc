"""Diversity losses on the tokens of a ViT: Gong et al. (arXiv 2104.12753), Chen et al. (arXiv 2203.06345)."""

from torch import Tensor

from ..losses import attention_diversity, pairwise_cosine, patch_contrast
from .model import ViT

# Chen et al. weigh heads with 1e-4, beside the cross-entropy of 1,000 classes; the first two weights are
# theirs.
DIVERSITY = {"cosine": 0.5, "contrast": 0.5, "heads": 0.01}


def parse_losses(text: str) -> dict[str, float]:
    """`none`, `diversity` (all three), or a list such as `cosine=0.5,heads=0.01`. Raises ValueError."""
    if text == "none":
        return {}
    if text == "diversity":
        return dict(DIVERSITY)
    weights = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        if name not in DIVERSITY:
            raise ValueError(
                f"unknown loss {name!r}: give none, diversity, or NAME=WEIGHT,... of {', '.join(DIVERSITY)}"
            )
        try:
            weights[name] = float(value) if value else DIVERSITY[name]
        except ValueError:
            raise ValueError(f"the weight of the loss {name!r} must be a number, got {value!r}") from None
    return weights


def diversity_losses(model: ViT, tokens: list[Tensor], names) -> dict[str, Tensor]:
    """The named losses, unweighted, from the tokens of `ViT.forward(..., return_tokens=True)`."""
    first, last = (t[:, model.num_prefix_tokens :] for t in (tokens[1], tokens[-1]))
    terms = {
        "cosine": lambda: pairwise_cosine(last, penalty="abs"),
        "contrast": lambda: patch_contrast(first, last),
        "heads": lambda: attention_diversity(*model.query_key(tokens[0], 0), include_self=False),
    }
    return {name: terms[name]() for name in names}
