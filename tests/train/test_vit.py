"""The reference ViT: its parts, its shapes and their names."""

from dataclasses import replace

import pytest
import torch
from small_vit import query_key

from vitdiv_kernels.vit import CONFIGS, ViT, ViTConfig

SMALL = ViTConfig(
    8, 1, patch=2, overlap=1, dim=16, depth=3, heads=2, mlp_ratio=2.0, classes=5, reattention=(1, 2)
)


@pytest.mark.parametrize("reattention", [(), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("overlap", [0, 1])
def test_shapes_and_gradients(reattention, overlap):
    model = ViT(replace(SMALL, reattention=reattention, overlap=overlap))
    logits, tokens = model(torch.randn(4, 1, 8, 8), return_tokens=True)
    assert logits.shape == (4, 5)
    assert [t.shape for t in tokens] == [(4, 17, 16)] * 4
    logits.square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # Batch norm takes away what the bias of the mix adds.
    assert [name for name in silent if "reatten_matrix.bias" not in name] == []


def test_only_the_listed_blocks_mix_heads():
    model = ViT(SMALL)
    assert [hasattr(block.attn, "reatten_matrix") for block in model.blocks] == [False, True, True]


def test_a_block_is_attention_and_mlp():
    model = ViT(replace(SMALL, reattention=())).eval()
    tokens = model(torch.randn(2, 1, 8, 8), return_tokens=True)[1]
    block = model.blocks[1]
    q, k = query_key(model, tokens, 1)
    assert q.shape == k.shape == (2, 2, 17, 8)
    v = block.attn.qkv(block.norm1(tokens[1]))[..., 32:].unflatten(-1, (2, 8)).transpose(1, 2)
    out = (q @ k.mT / 8**0.5).softmax(-1) @ v
    expected = tokens[1] + block.attn.proj(out.transpose(1, 2).flatten(2))
    expected = expected + block.mlp(block.norm2(expected))
    torch.testing.assert_close(tokens[2], expected)


def test_drop_path_drops_whole_images_and_only_in_training():
    model = ViT(replace(SMALL, drop_path=0.9))
    block, x = model.blocks[2], torch.randn(64, 17, 16)
    same = (block(x) == x).all((1, 2)).float().mean()
    assert 0.6 < same < 1
    block.eval()
    assert not (block(x) == x).all((1, 2)).any()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"drop_path": 1.0}, "drop_path must be at least 0 and less than 1, got 1.0"),
        ({"head_drop": 1.0}, "head_drop must be at least 0 and less than 1, got 1.0"),
        ({"heads": 0}, "heads must be an integer of at least 1, got 0"),
        ({"image_size": -8}, "image_size must be an integer of at least 1, got -8"),
        ({"reattention": [0.5]}, r"reattention must list blocks from 0 to 2, got \[0.5\]"),
        ({"patch": 3}, "image_size must be a multiple of patch"),
        ({"heads": 3}, "dim must be a multiple of heads"),
        ({"reattention": (2, 3)}, r"reattention must list blocks from 0 to 2, got \[3\]"),
    ],
)
def test_config_errors(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(SMALL, **change)


@pytest.mark.parametrize(("name", "count"), [("deit_tiny", 5_717_416), ("deit_small", 22_050_664)])
def test_parameter_counts_are_the_published_ones(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in ViT(CONFIGS[name]).parameters()) == count
