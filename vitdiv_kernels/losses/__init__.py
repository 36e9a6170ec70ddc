"""Diversity losses as functions, by what they look at; README.md says what each costs."""

from ..ops.maps.attention_gram import attention_diversity
from ..ops.pairs.pairwise_cosine import pairwise_cosine
from .dense import (
    gram_anchoring,
    info_nce,
    koleo,
    linear_cka,
    uniformity,
    vf_loss,
)
from .gradients import gradient_diversity
from .heads import (
    head_condition_orthogonality,
    head_contrast,
    head_cross_cosine,
    head_mgd,
    head_mhs,
    head_soft_orthogonality,
)
from .layers import cos_reg, layer_similarity, similar_block_ratio
from .mixing import cutmix_shares, patch_mixing, patch_targets
from .patches import (
    neighbourhood_contrast,
    patch_condition_orthogonality,
    patch_contrast,
    patch_mgd,
    patch_mhs,
    patch_soft_orthogonality,
)
from .regions import mix_two_images, region_contrast, region_masks, region_means, region_mixing
from .weights import weight_condition_orthogonality, weight_mgd, weight_mhs, weight_soft_orthogonality

__all__ = [
    "attention_diversity", "cos_reg", "cutmix_shares", "gradient_diversity", "gram_anchoring",
    "head_condition_orthogonality", "head_contrast", "head_cross_cosine", "head_mgd", "head_mhs",
    "head_soft_orthogonality", "info_nce", "koleo", "layer_similarity", "linear_cka", "mix_two_images",
    "neighbourhood_contrast", "pairwise_cosine", "patch_condition_orthogonality", "patch_contrast",
    "patch_mgd", "patch_mhs", "patch_mixing", "patch_soft_orthogonality", "patch_targets",
    "region_contrast", "region_masks", "region_means", "region_mixing", "similar_block_ratio",
    "uniformity", "vf_loss", "weight_condition_orthogonality", "weight_mgd", "weight_mhs",
    "weight_soft_orthogonality",
]  # fmt: skip
