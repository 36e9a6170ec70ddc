"""Originals with timm's names: a packed `qkv`, then `proj`. They become attentions of `vitdiv_kernels.nn`."""

from torch import nn

from ..nn import ReAttention, TalkingHeadsAttention, effective
from ._fused import Fused

PARTS = ("qkv", "proj", "proj_drop", "num_heads", "scale")


class _FusedPacked(Fused):
    def __init__(self, original, backend, rest=None):
        super().__init__(original, backend, rest)
        dim = original.qkv.in_features
        self.head_dim = getattr(original, "head_dim", dim // self.num_heads)
        self.attn_dim = self.num_heads * self.head_dim
        for name in ("q_norm", "k_norm", "norm"):
            if name not in self._modules:
                self._modules[name] = nn.Identity().train(original.training)
        self._modules.setdefault("gate", None)

    def unreadable(self):
        return effective.why_not(self)

    def _returned(self, out):
        return out if self.rest is None else (out, *self.rest)


class FusedPackedReAttention(_FusedPacked, ReAttention):
    """One that becomes a ReAttention."""

    def __init__(self, original, backend, rest=None):
        super().__init__(original, backend, rest)
        self.count_recomputed = True
        self.apply_transform = True

    def _attend(self, x, return_gram=False):
        if self.drop_of_maps() > 0 and self.attn_drop.training != self.training:
            raise ValueError(
                f"attn_drop.training must be that of its attention, {self.training}: set the mode of the "
                "attention, or unfuse the model"
            )
        out = super()._attend(x, return_gram)
        return out if return_gram else self._returned(out)


class FusedPackedTalkingHeads(_FusedPacked, TalkingHeadsAttention):
    """One that becomes a TalkingHeadsAttention."""

    @classmethod
    def why_not(cls, original, above):
        drop = getattr(original, "attn_drop", 0.0)
        p = getattr(drop, "p", drop)
        return (
            f"its attn_drop is {p}, a dropout after the second mix, which the operation has not: set it to 0"
            if p != 0
            else super().why_not(original, above)
        )

    def _attend(self, x):
        if self.drop_of_maps() > 0 and self.attn_drop.training:
            raise ValueError(
                f"attn_drop must be 0, got {self.attn_drop.p}: dropout after the second mix is not supported"
            )
        return self._returned(super()._attend(x))
