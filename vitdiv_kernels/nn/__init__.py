"""Modules over the operations: attention with head mixing, and diversity losses."""

from .losses import AttentionDiversityLoss, PatchCosineLoss
from .reattention import ReAttention
from .talking_heads import TalkingHeadsAttention

__all__ = ["AttentionDiversityLoss", "PatchCosineLoss", "ReAttention", "TalkingHeadsAttention"]
