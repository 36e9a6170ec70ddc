"""A small ViT with re-attention and both losses trains alike with fused and with reference operations."""

import pytest
import torch
from small_vit import small_vit

from vitdiv_kernels import DiversityObjective, Term, use_backend
from vitdiv_kernels.nn import ReAttention

STEPS = 30
LOSSES = {
    "pairwise_cosine": 0.5,
    "heads": Term("attention_diversity", 0.1, options={"include_self": False}),
}


def train(norm, backend, steps=STEPS, batch=24):
    model = small_vit(depth=2, classes=4)
    for block in model.blocks:
        block.attn = ReAttention(16, 2, qkv_bias=True, norm=norm, norm_gain=0.3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    means = torch.randn(4, 1, 8, 8)
    losses = []
    with use_backend(backend), DiversityObjective(LOSSES).attach(model) as objective:
        for _ in range(steps):
            labels = torch.randint(4, (batch,))
            logits = model(means[labels] + torch.randn(batch, 1, 8, 8))
            loss = torch.nn.functional.cross_entropy(logits, labels) + objective()[0]
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
