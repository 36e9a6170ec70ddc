"""x-transformers: the core of its attention, `Attend`, with talking heads; all around it stays."""

import functools

import torch
import torch.nn.functional as F

from ...nn import effective
from ...ops.maps.reattention import reattention
from .._fused import Fused

MIXES = ("pre_softmax_talking_heads", "post_softmax_talking_heads")
# Options of Attend that change the maps, by their attributes.
OTHERS = (
    "causal", "flash", "l2_distance", "softclamp_logits", "cog_signed", "selective", "cope",
    "inverted_attention", "head_learned_sink", "add_zero_kv",
)  # fmt: skip


class FusedXTransformersAttend(Fused):
    """Its first mix adds to the logits: it is I + W. The maps among the intermediates are None."""

    title = "Attend of x-transformers"
    classes = frozenset({("x_transformers.attend", "Attend")})
    parts = ("attn_fn", "attn_dropout", "scale", *MIXES)
    drop = "attn_dropout"
    gives_maps = True

    def __init__(self, original, backend, rest=None):
        super().__init__(original, backend, rest)
        # the class of what it returns beside its output, in the module of its forward
        self._intermediates = type(original).forward.__globals__["Intermediates"]

    @classmethod
    def why_not(cls, original, above):
        if getattr(original, "pre_scale_post_talking_heads", None) is not None:
            return (
                "pre_scale_post_talking_heads multiplies the maps by mixed logits, which the operation does "
                "not: make the model without it"
            )
        if all(getattr(original, name) is None for name in MIXES):
            return "it has no talking heads: there is nothing to mix"
        for name in OTHERS:
            if getattr(original, name, None) not in (None, False):
                return f"its option {name} is on, which the operation has not"
        softmax = original.attn_fn
        if not (isinstance(softmax, functools.partial) and softmax.func is F.softmax):
            return "it takes another function than softmax for its maps"
        for module in above:
            for name in ("residual_attn", "cross_residual_attn"):
                if getattr(module, name, False) is True:
                    return f"its model passes logits from layer to layer ({name}), which are not held"
            if getattr(module, "rel_pos", None) is not None:
                return "its model adds a bias of positions to the logits, which the operation has not"
        return None

    @classmethod
    def trial(cls, original, above):
        owner = above[-1] if above else None
        if hasattr(owner, "to_q") and getattr(owner, "attend", None) is original:
            shapes = [(2, 5, owner.to_q.in_features)]
            if owner.to_k.in_features != owner.to_q.in_features:  # cross-attention
                shapes.append((2, 3, owner.to_k.in_features))
            return owner, shapes
        heads = next(getattr(original, name) for name in MIXES if getattr(original, name) is not None)
        return original, [(2, heads.out_channels, 5, 4)] * 3

    def _mix(self, name):
        otherwise = "unfuse the model"
        return None if getattr(self, name) is None else effective.effective_mix(self, name, otherwise)[0]

    def unreadable(self):
        try:
            for name in MIXES:
                self._mix(name)
        except TypeError as error:
            return str(error)
        return None

    def forward(self, q, k, v, mask=None, attn_bias=None, **options):
        options.pop("row_mask", None)  # of inverted attention alone
        for name, value in dict(mask=mask, attn_bias=attn_bias, **options).items():
            if value is not None and value is not False:
                raise ValueError(
                    f"{name} must be None: fused talking heads mix maps over all keys; unfuse the model"
                )
        pre, post = map(self._mix, MIXES)
        heads, shared = q.shape[1], k.shape[1]
        if shared < heads:  # grouped queries
            k, v = (t.repeat(1, heads // shared, 1, 1) for t in (k, v))
        like = pre if post is None else post
        identity = torch.eye(heads, dtype=like.dtype, device=like.device)
        out = reattention(
            q, k, v, identity if post is None else post, pre_mix=None if pre is None else identity + pre,
            scale=self.scale, training=self.attn_dropout.training, dropout_p=self.drop_of_maps(),
            backend=self.backend,
        )  # fmt: skip
        return out, self._intermediates()
