"""Modules over the operations: attention with head mixing, and diversity losses."""

from .loss_modules import (
    AttentionDiversityLoss,
    CosRegLoss,
    GradientDiversityLoss,
    GramAnchoringLoss,
    HeadConditionOrthogonalityLoss,
    HeadContrastLoss,
    HeadCrossCosineLoss,
    HeadMGDLoss,
    HeadMHSLoss,
    HeadSoftOrthogonalityLoss,
    InfoNCELoss,
    KoLeoLoss,
    LinearCKALoss,
    NeighbourhoodContrastLoss,
    PatchConditionOrthogonalityLoss,
    PatchContrastLoss,
    PatchCosineLoss,
    PatchMGDLoss,
    PatchMHSLoss,
    PatchMixingLoss,
    PatchSoftOrthogonalityLoss,
    RegionContrastLoss,
    RegionMixingLoss,
    UniformityLoss,
    VFLoss,
    WeightConditionOrthogonalityLoss,
    WeightMGDLoss,
    WeightMHSLoss,
    WeightSoftOrthogonalityLoss,
)
from .reattention import ReAttention
from .talking_heads import TalkingHeadsAttention

__all__ = [
    "AttentionDiversityLoss", "CosRegLoss", "GradientDiversityLoss", "GramAnchoringLoss",
    "HeadConditionOrthogonalityLoss", "HeadContrastLoss", "HeadCrossCosineLoss", "HeadMGDLoss",
    "HeadMHSLoss", "HeadSoftOrthogonalityLoss", "InfoNCELoss", "KoLeoLoss", "LinearCKALoss",
    "NeighbourhoodContrastLoss", "PatchConditionOrthogonalityLoss", "PatchContrastLoss", "PatchCosineLoss",
    "PatchMGDLoss", "PatchMHSLoss", "PatchMixingLoss", "PatchSoftOrthogonalityLoss", "ReAttention",
    "RegionContrastLoss", "RegionMixingLoss", "TalkingHeadsAttention", "UniformityLoss", "VFLoss",
    "WeightConditionOrthogonalityLoss", "WeightMGDLoss", "WeightMHSLoss", "WeightSoftOrthogonalityLoss",
]  # fmt: skip
