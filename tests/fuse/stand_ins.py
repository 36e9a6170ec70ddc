"""Attentions of other packages, written anew: names, parameters, their shapes and orientation are theirs.

They are found by class and module as the real ones are; their forwards are plain formulas.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


def named(cls, name, module=None):
    """The class under the name, and in the module, of what it stands for; pickle finds it as before."""
    cls.__name__ = name
    if module:
        cls.__module__ = module
    return cls


class _Packed(nn.Module):
    def __init__(self, dim, num_heads, attn_drop=0.0, proj_drop=0.0, qk_scale=None):
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def split(self, x):
        return self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def out(self, maps, v):
        return self.proj_drop(self.proj((maps @ v).transpose(1, 2).flatten(2)))


class DeepViTReAttention(_Packed):
    def __init__(self, dim, num_heads, apply_transform=True, transform_scale=False, **options):
        super().__init__(dim, num_heads, **options)
        self.apply_transform = apply_transform
        if apply_transform:
            self.reatten_matrix = nn.Conv2d(num_heads, num_heads, 1)
            self.var_norm = nn.BatchNorm2d(num_heads)
            self.reatten_scale = self.scale if transform_scale else 1.0

    def forward(self, x, atten=None):
        q, k, v = self.split(x)
        maps = self.attn_drop((self.scale * q @ k.mT).softmax(-1))
        if self.apply_transform:
            maps = self.reatten_scale * self.var_norm(self.reatten_matrix(maps))
        return self.out(maps, v), maps


class GongAttention(_Packed):
    """qk_norm: as it is with the arguments of timm's Attention. It returns (output, 0.) as it is released."""

    def __init__(self, dim, num_heads, qk_norm=False, rest=(0.0,), **options):
        super().__init__(dim, num_heads, **options)
        self.rest = rest
        width = dim // num_heads
        self.q_norm = nn.LayerNorm(width) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width) if qk_norm else nn.Identity()
        self.proj_pre = nn.Linear(num_heads, num_heads, bias=False)
        self.proj_post = nn.Linear(num_heads, num_heads, bias=False)

    def forward(self, x):
        q, k, v = self.split(x)
        logits = self.scale * self.q_norm(q) @ self.k_norm(k).mT
        maps = self.proj_pre(logits.movedim(1, -1)).movedim(-1, 1).softmax(-1)
        maps = self.attn_drop(self.proj_post(maps.movedim(1, -1)).movedim(-1, 1))
        out = self.out(maps, v)
        return out if self.rest is None else (out, *self.rest)


class _VitPytorch(nn.Module):
    def __init__(self, dim, heads, dim_head, dropout):
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(dropout))

    def split(self, packed):
        return packed.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def out(self, maps, v):
        return self.to_out((maps @ v).transpose(1, 2).flatten(2))


class Rearrange(nn.Module):
    def __init__(self, source, destination):
        super().__init__()
        self.source, self.destination = source, destination

    def forward(self, x):
        return x.movedim(self.source, self.destination)


class VitPytorchDeepViT(_VitPytorch):
    def __init__(self, dim, heads=4, dim_head=5, dropout=0.0):
        super().__init__(dim, heads, dim_head, dropout)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.reattn_weights = nn.Parameter(torch.randn(heads, heads))
        self.reattn_norm = nn.Sequential(Rearrange(1, -1), nn.LayerNorm(heads), Rearrange(-1, 1))

    def forward(self, x):
        q, k, v = map(self.split, self.to_qkv(self.norm(x)).chunk(3, -1))
        maps = self.dropout((self.scale * q @ k.mT).softmax(-1))
        return self.out(self.reattn_norm(torch.einsum("bhij,hg->bgij", maps, self.reattn_weights)), v)


class VitPytorchCaiT(_VitPytorch):
    def __init__(self, dim, heads=4, dim_head=5, dropout=0.0):
        super().__init__(dim, heads, dim_head, dropout)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.attend = nn.Softmax(-1)
        self.mix_heads_pre_attn = nn.Parameter(torch.randn(heads, heads))
        self.mix_heads_post_attn = nn.Parameter(torch.randn(heads, heads))

    def forward(self, x, context=None):
        x = self.norm(x)
        keys = x if context is None else torch.cat((x, context), 1)
        q, k, v = map(self.split, (self.to_q(x), *self.to_kv(keys).chunk(2, -1)))
        logits = torch.einsum("bhij,hg->bgij", self.scale * q @ k.mT, self.mix_heads_pre_attn)
        maps = self.dropout(self.attend(logits))
        return self.out(torch.einsum("bhij,hg->bgij", maps, self.mix_heads_post_attn), v)


@dataclass
class Intermediates:
    post_softmax_attn: torch.Tensor | None = None


class XTransformersAttend(nn.Module):
    def __init__(self, heads, pre=True, post=True, scale_post=False, dropout=0.0, scale=None, **options):
        super().__init__()
        mixes = (("pre_softmax", pre), ("post_softmax", post), ("pre_scale_post", scale_post))
        for name, there in mixes:
            mix = nn.Conv2d(heads, heads, 1, bias=False) if there else None
            setattr(self, f"{name}_talking_heads", mix)
        self.scale, self.attn_dropout = scale, nn.Dropout(dropout)
        self.attn_fn = functools.partial(F.softmax, dim=-1)
        for name, value in options.items():
            setattr(self, name, value)

    def forward(self, q, k, v, mask=None, attn_bias=None, prev_attn=None, row_mask=None, causal=None):
        k, v = (t.repeat(1, q.shape[1] // k.shape[1], 1, 1) for t in (k, v))
        logits = (q.shape[-1] ** -0.5 if self.scale is None else self.scale) * q @ k.mT
        if self.pre_softmax_talking_heads is not None:
            logits = logits + self.pre_softmax_talking_heads(logits)
        if attn_bias is not None:
            logits = logits + attn_bias
        maps = mixed = self.attn_dropout(self.attn_fn(logits))
        if self.post_softmax_talking_heads is not None:
            mixed = self.post_softmax_talking_heads(maps)
        return mixed @ v, Intermediates(maps)


class XTransformersAttention(nn.Module):
    """What holds an Attend; with fewer heads of keys than of queries."""

    def __init__(self, dim, heads=4, kv_heads=2, width=5, **options):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.to_q = nn.Linear(dim, heads * width, bias=False)
        self.to_k = nn.Linear(dim, kv_heads * width, bias=False)
        self.to_v = nn.Linear(dim, kv_heads * width, bias=False)
        self.attend = XTransformersAttend(heads, **options)
        self.to_out = nn.Linear(heads * width, dim, bias=False)

    def forward(self, x, mask=None, **options):
        heads = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = (
            project(x).unflatten(-1, (number, -1)).transpose(1, 2)
            for project, number in zip((self.to_q, self.to_k, self.to_v), heads, strict=True)
        )
        out, _ = self.attend(q, k, v, mask=mask, row_mask=mask, causal=False, **options)
        return self.to_out(out.transpose(1, 2).flatten(2))


named(DeepViTReAttention, "ReAttention")
named(GongAttention, "Attention")
named(VitPytorchDeepViT, "Attention", "vit_pytorch.deepvit")
named(VitPytorchCaiT, "Attention", "vit_pytorch.cait")
named(XTransformersAttend, "Attend", "x_transformers.attend")
named(XTransformersAttention, "Attention", "x_transformers.x_transformers")


class Block(nn.Module):
    """A residual block that takes what its attention returns apart, as that of each package does."""

    def __init__(self, attn, pair):
        super().__init__()
        self.attn, self.pair = attn, pair

    def forward(self, x):
        if not self.pair:
            return x + self.attn(x)
        out, self.rest = self.attn(x)
        return x + out


class Model(nn.Module):
    """Two blocks of an attention on tokens of 24 features, with random weights that differ."""

    def __init__(self, make, pair=False, depth=2):
        super().__init__()
        self.blocks = nn.ModuleList(Block(make(24), pair) for _ in range(depth))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x
