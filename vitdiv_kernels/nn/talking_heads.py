"""CaiT's attention, which mixes the heads before and after the softmax."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._types import Backend
from ..ops.maps.reattention import reattention
from . import _attention, effective


class TalkingHeadsAttention(_attention.PackedAttention):
    """Talking-heads self-attention (Shazeer et al. 2020, arXiv 2003.02436), as in CaiT (arXiv 2103.17239).

    Names and positions of arguments and the parameter names (`qkv`, `proj_l`, `proj_w`, `proj`) are those of
    timm's TalkingHeadAttn, so CaiT checkpoints load; it is a drop-in for timm's Attention, too:
    `VisionTransformer(..., attn_layer=TalkingHeadsAttention)`, whose arguments it takes by name.

    The operation reads the tensors of `proj_l` and `proj_w` and never calls them: what that means for hooks,
    adapters and other modules in their place is told at `ReAttention`. timm's models initialise both as their
    other Linear layers, as CaiT does.

    qk_scale is the factor of the logits; None is head_dim^-1/2.

    Raises ValueError when num_heads does not divide dim, for a qk_scale that is not positive, and for
    attn_drop other than 0: CaiT drops after the second mix, which the operation does not do.

    Example:
        >>> attention = TalkingHeadsAttention(48, num_heads=4)
        >>> attention(torch.randn(2, 17, 48)).shape
        torch.Size([2, 17, 48])
    """

    mixes = ("proj_l", "proj_w")  # before and after the softmax

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        attn_head_dim: int | None = None,
        qk_scale: float | None = None,
        dim_out: int | None = None,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if attn_drop != 0:
            raise ValueError(
                f"attn_drop must be 0: dropout after the second mix is not supported, got {attn_drop}"
            )
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.backend = backend
        self._add_input(
            dim, num_heads, attn_head_dim, qk_scale, qkv_bias, qk_norm, scale_norm, norm_layer, kind
        )
        self.proj_l = nn.Linear(num_heads, num_heads, **kind)
        self.proj_w = nn.Linear(num_heads, num_heads, **kind)
        self._add_output(dim_out, qkv_bias, scale_norm, proj_bias, gated, proj_drop, norm_layer, kind)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x [B, N, dim] -> [B, N, dim_out].

        Raises ValueError for a mask or is_causal, TypeError for a `proj_l` or `proj_w` that can't be read.
        """
        return _attention.attend(self, x, attn_mask, is_causal)

    def _attend(self, x):
        q, k, v = self._split(x)
        before, after = self.mixes
        if self._calls_modules(q):
            dtype = torch.promote_types(q.dtype, torch.float32)
            logits = (self.scale * q.to(dtype) @ k.to(dtype).mT).movedim(1, -1)
            logits = self._called(getattr(self, before), logits)
            maps = logits.to(dtype).movedim(-1, 1).softmax(-1).movedim(1, -1)
            maps = self._called(getattr(self, after), maps).to(dtype).movedim(-1, 1)
            out = (maps @ v.to(dtype)).to(q.dtype)
        else:
            pre_mix, pre_bias = effective.read_mix(self, before)
            mix, bias = effective.read_mix(self, after)
            out = reattention(
                q, k, v, mix, mix_bias=bias, pre_mix=pre_mix, pre_bias=pre_bias, scale=self.scale,
                backend=self.backend,
            )  # fmt: skip
        return self._project(out, x)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, backend={self.backend!r}"
