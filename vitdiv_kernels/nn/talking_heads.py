"""CaiT's attention, which mixes the heads before and after the softmax."""

from torch import nn

from ..ops.reattention import reattention


class TalkingHeadsAttention(nn.Module):
    """Talking-heads self-attention (Shazeer et al. 2020, arXiv 2003.02436), as in CaiT (arXiv 2103.17239).

    Constructor, forward and parameter names (`qkv`, `proj_l`, `proj_w`, `proj`) are those of timm's
    TalkingHeadAttn, so CaiT checkpoints load. Raises ValueError when num_heads does not divide dim, and for
    attn_drop other than 0: CaiT drops after the second mix, which the operation does not do.
    """

    def __init__(
        self,
        dim,
        num_heads=8,
        qkv_bias=False,
        attn_drop=0.0,
        proj_drop=0.0,
        device=None,
        dtype=None,
        *,
        backend="auto",
    ):
        super().__init__()
        if dim % num_heads != 0:
            raise ValueError(f"num_heads must divide dim, got num_heads {num_heads} and dim {dim}")
        if attn_drop != 0:
            raise ValueError(
                f"attn_drop must be 0: dropout after the second mix is not supported, got {attn_drop}"
            )
        kind = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **kind)
        self.proj_l = nn.Linear(num_heads, num_heads, **kind)
        self.proj_w = nn.Linear(num_heads, num_heads, **kind)
        self.proj = nn.Linear(dim, dim, **kind)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x):
        """x [B, N, dim] -> [B, N, dim]."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = reattention(
            q, k, v, self.proj_w.weight, mix_bias=self.proj_w.bias, pre_mix=self.proj_l.weight,
            pre_bias=self.proj_l.bias, scale=self.scale, backend=self.backend,
        )  # fmt: skip
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, tokens, dim)))

    def extra_repr(self):
        return f"num_heads={self.num_heads}, backend={self.backend!r}"
