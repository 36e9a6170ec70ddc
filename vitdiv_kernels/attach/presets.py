"""The objectives of three papers, as data: a preset is a mapping of names to terms."""

from .terms import EMBEDDINGS, Term

# gong2021: the three losses of the paper (arXiv 2104.12753), each with weight 1, the first layer of the
# contrast a target; the code of these is not released. gong2021_released: what its released code does
# instead, `engine.py` and `models.py`.
# diverse_vit_deit_small: the recipe of DeiT-S in the released code of Chen et al. 2022 (arXiv 2203.06345).
# Its contrast is between the tokens that enter the first block and those that leave the last; the sum of
# the cross-entropies of patches and class token is divided by N + 1; all their labels are smoothed by 0.1.
# Zhou et al. 2021 (arXiv 2103.11886): the released SoftTargetCrossEntropyCosReg with its defaults, and as
# DeepViT_32B_pure_transformer.yaml sets it, over 12 pairs of layers.
PRESETS: dict[str, dict[str, Term]] = {
    "gong2021": {
        "cosine": Term("pairwise_cosine"),
        "contrast": Term("patch_contrast", options={"detach_first": True}),
        "mixing": Term("patch_mixing"),
    },
    "gong2021_released": {
        "contrast": Term("neighbourhood_contrast"),
        "regions": Term("region_mixing"),
    },
    "diverse_vit_deit_small": {
        "cosine": Term("pairwise_cosine", 0.5, options={"penalty": "signed", "include_self": True}),
        "contrast": Term("patch_contrast", 0.5, (EMBEDDINGS, -1)),
        "heads": Term("attention_diversity", 1e-4),
        "weights": Term("weight_condition_orthogonality", 5e-4),
        "mixing": Term("patch_mixing", options={"smoothing": 0.1}, with_task=True),
    },
    "deepvit_cos_reg": {"cos_reg": Term("cos_reg", 0.1)},
    "deepvit_32b": {"cos_reg": Term("cos_reg", 0.1, tuple(range(13)))},
}
