"""A ViT of a few thousand weights for the tests, and what they look at in a model."""

from dataclasses import replace

import torch

from vitdiv_kernels.vit import ViT, ViTConfig

CONFIG = ViTConfig(image_size=8, channels=1, patch=2, dim=16, depth=3, heads=2, mlp_ratio=1.0, classes=5)


def small_vit(**changes):
    """Of 16 patches, the same weights each time."""
    torch.manual_seed(0)
    return ViT(replace(CONFIG, **changes))


def images(count=3):
    return torch.randn(count, 1, 8, 8)


def query_key(model, tokens, i):
    """q and k [B, H, N, d] of block i, from the tokens before each block, as a user would write it."""
    block = model.blocks[i]
    qkv = block.attn.qkv(block.norm1(tokens[i])).unflatten(-1, (3, block.attn.num_heads, -1))
    return qkv.permute(2, 0, 3, 1, 4)[:2]


def softmax_maps(model, tokens, i):
    """[B, H, N, N], from the tokens before each block."""
    q, k = query_key(model, tokens, i)
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)


def hooks_of(model):
    """How many hooks its modules have."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
