"""A small ViT with re-attention and both losses trains alike with fused and with reference operations."""

import pytest
import torch
from torch import nn

from vitdiv_kernels import nn as vnn

STEPS = 30


class Block(nn.Module):
    def __init__(self, width, heads, norm, backend):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = vnn.ReAttention(width, heads, qkv_bias=True, norm=norm, norm_gain=0.3, backend=backend)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TinyViT(nn.Module):
    """Two blocks over 16 patches of 12 numbers and a class token."""

    def __init__(self, norm, backend, width=48, heads=4):
        super().__init__()
        self.embed = nn.Linear(12, width)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.1 * torch.randn(1, 17, width))
        self.blocks = nn.Sequential(*(Block(width, heads, norm, backend) for _ in range(2)))
        self.head = nn.Linear(width, 4)
        self.diversity = vnn.PatchCosineLoss(backend=backend)
        self.head_diversity = vnn.AttentionDiversityLoss(include_self=False, backend=backend)

    def forward(self, patches, labels):
        x = torch.cat([self.cls.expand(len(patches), -1, -1), self.embed(patches)], 1) + self.position
        attn = self.blocks[0].attn
        qkv = attn.qkv(self.blocks[0].norm1(x)).unflatten(2, (3, attn.num_heads, attn.head_dim))
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)
        x = self.blocks(x)
        loss = nn.functional.cross_entropy(self.head(x[:, 0]), labels)
        return loss + 0.5 * self.diversity(x) + 0.1 * self.head_diversity(q, k)


def train(norm, backend, steps=STEPS, batch=24):
    torch.manual_seed(0)
    model = TinyViT(norm, backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    directions = torch.randn(4, 16, 12)
    losses = []
    for _ in range(steps):
        labels = torch.randint(4, (batch,))
        loss = model(directions[labels] + torch.randn(batch, 16, 12), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_fused_and_reference_losses_are_the_same(backend, interpreted, norm):
    size = dict(steps=2, batch=2) if interpreted else {}
    expected = train(norm, "reference", **size)
    if not interpreted:
        assert expected[-5:].mean() < 0.7 * expected[:5].mean()
    torch.testing.assert_close(train(norm, backend, **size), expected, rtol=2e-3, atol=2e-3)
