"""vit-pytorch: the attentions of its DeepViT and CaiT, whose mixes are [input head, output head]."""

import torch
from torch import nn

from ...ops.maps.reattention import reattention
from .._fused import Fused

PARTS = ("heads", "scale", "to_out", "dropout")


class _FusedVitPytorch(Fused):
    drop = "dropout"

    def _normed(self, x):
        # older releases normalise outside of the attention
        return self.norm(x) if "norm" in self._modules else x

    def _split(self, packed):
        """[B, N, H d] -> [B, H, N, d]"""
        return packed.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _mixed(self, q, k, v, mix, **options):
        out = reattention(
            q, k, v, mix.t(), scale=self.scale, training=self.dropout.training, backend=self.backend,
            dropout_p=self.drop_of_maps(), **options,
        )  # fmt: skip
        return self.to_out(out.transpose(1, 2).flatten(2))


class FusedVitPytorchDeepViTAttention(_FusedVitPytorch):
    title = "Attention of vit-pytorch's DeepViT"
    classes = frozenset({("vit_pytorch.deepvit", "Attention")})
    parts = (*PARTS, "to_qkv", "reattn_weights", "reattn_norm")
    never_called = ("reattn_norm",)

    @classmethod
    def trial(cls, original, above):
        return original, [(2, 5, original.to_qkv.in_features)]

    def unreadable(self):
        norm = self.reattn_norm
        if not isinstance(norm, nn.Sequential) or len(norm) != 3 or not isinstance(norm[1], nn.LayerNorm):
            return f"reattn_norm must hold a LayerNorm between two rearrangements, got {norm}"
        return None

    def forward(self, x):
        if (sentence := self.unreadable()) is not None:
            raise TypeError(sentence)
        q, k, v = (self._split(packed) for packed in self.to_qkv(self._normed(x)).chunk(3, dim=-1))
        norm = self.reattn_norm[1]
        return self._mixed(
            q, k, v, self.reattn_weights, norm="layer", norm_weight=norm.weight, norm_bias=norm.bias,
            eps=norm.eps,
        )  # fmt: skip


class FusedVitPytorchCaiTAttention(_FusedVitPytorch):
    title = "Attention of vit-pytorch's CaiT"
    classes = frozenset({("vit_pytorch.cait", "Attention")})
    parts = (*PARTS, "to_q", "to_kv", "mix_heads_pre_attn", "mix_heads_post_attn")
    never_called = ("attend",)

    @classmethod
    def trial(cls, original, above):
        dim = original.to_q.in_features
        return original, [(2, 5, dim), (2, 3, dim)]  # x, context

    def forward(self, x, context=None):
        x = self._normed(x)
        keys = x if context is None else torch.cat((x, context), dim=1)
        q, k, v = (self._split(packed) for packed in (self.to_q(x), *self.to_kv(keys).chunk(2, dim=-1)))
        return self._mixed(q, k, v, self.mix_heads_post_attn, pre_mix=self.mix_heads_pre_attn.t())
