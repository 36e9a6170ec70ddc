"""The objectives of three papers, as data: a preset is a mapping of names to terms."""

from .terms import EMBEDDINGS, Term

# Gong et al. 2021 (arXiv 2104.12753): the three losses of the paper, each with weight 1, the first layer of
# the contrast a target; its training code is not released. Chen et al. 2022 (arXiv 2203.06345): the recipe of
# DeiT-S in the released code, whose contrast is between the tokens that enter the first block and those that
# leave the last; its sum of mixing losses is divided by N + 1, a mean here, and its labels of patches are
# smoothed by 0.1, as those of images, not at all here: the reference trainer gives its own label smoothing.
# Zhou et al. 2021 (arXiv 2103.11886): the released SoftTargetCrossEntropyCosReg with its defaults.
PRESETS: dict[str, dict[str, Term]] = {
    "gong2021": {
        "cosine": Term("pairwise_cosine"),
        "contrast": Term("patch_contrast", options={"detach_first": True}),
        "mixing": Term("patch_mixing"),
    },
    "diverse_vit_deit_small": {
        "cosine": Term("pairwise_cosine", 0.5, options={"penalty": "signed", "include_self": True}),
        "contrast": Term("patch_contrast", 0.5, (EMBEDDINGS, -1)),
        "heads": Term("attention_diversity", 1e-4),
        "weights": Term("weight_condition_orthogonality", 5e-4),
        "mixing": Term("patch_mixing"),
    },
    "deepvit_cos_reg": {"cos_reg": Term("cos_reg", 0.1)},
}
