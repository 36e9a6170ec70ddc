"""The reference ViT: its parts, the losses and the metrics on its tokens."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vitdiv_kernels import DiversityObjective
from vitdiv_kernels.attach.objective import PRESETS
from vitdiv_kernels.losses import patch_contrast
from vitdiv_kernels.train import losses, metrics
from vitdiv_kernels.train.data import Tensors
from vitdiv_kernels.vit.model import CONFIGS, ViT, ViTConfig

SMALL = ViTConfig(
    image_size=8,
    channels=1,
    patch=2,
    overlap=1,
    dim=16,
    depth=3,
    heads=2,
    mlp_ratio=2.0,
    classes=5,
    reattention=(1, 2),
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


def test_query_key_are_those_of_the_block():
    model = ViT(replace(SMALL, reattention=())).eval()
    tokens = model(torch.randn(2, 1, 8, 8), return_tokens=True)[1]
    block = model.blocks[1]
    q, k = model.query_key(tokens[1], 1)
    assert q.shape == k.shape == (2, 2, 17, 8)
    v = block.attn.qkv(block.norm1(tokens[1]))[..., 32:].unflatten(-1, (2, 8)).transpose(1, 2)
    out = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
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
        ({"patch": 3}, "image_size must be a multiple of patch"),
        ({"heads": 3}, "dim must be a multiple of heads"),
        ({"reattention": (2, 3)}, r"reattention must list blocks from 0 to 2, got \[3\]"),
    ],
)
def test_config_errors(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(SMALL, **change)


def test_parameter_counts_are_the_published_ones():
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in ViT(CONFIGS[name]).parameters())
            for name in ("deit_tiny", "deit_small")
        }
    assert counts == {"deit_tiny": 5_717_416, "deit_small": 22_050_664}


def test_losses_are_their_formulas_on_the_tokens_of_the_model():
    model, images = ViT(SMALL), torch.randn(2, 1, 8, 8)
    with DiversityObjective(losses.objective_terms(losses.DIVERSITY)).attach(model) as objective:
        tokens = model(images, return_tokens=True)[1]
        total, terms = objective()
    last = F.normalize(tokens[-1][:, 1:], dim=-1)
    cosines = (last @ last.transpose(-1, -2)).abs()
    torch.testing.assert_close(terms["cosine"], (cosines.sum() / 2 - 16) / (16 * 15))
    q, k = model.query_key(tokens[0], 0)
    maps = F.normalize((q @ k.transpose(-1, -2) / 8**0.5).softmax(-1).flatten(2), dim=-1)
    torch.testing.assert_close(terms["heads"], (maps[:, 0] * maps[:, 1]).sum(-1).mean())
    torch.testing.assert_close(terms["contrast"], patch_contrast(tokens[1][:, 1:], tokens[-1][:, 1:]))
    torch.testing.assert_close(total, 0.5 * terms["cosine"] + 0.5 * terms["contrast"] + 0.01 * terms["heads"])


def test_parse_losses():
    assert losses.parse_losses("none") == {}
    assert losses.parse_losses("diversity") == losses.DIVERSITY
    assert losses.parse_losses("cosine=2, heads") == {"cosine": 2.0, "heads": 0.01}
    assert losses.parse_losses("koleo = 0.1,gong2021") == {"koleo": 0.1, "gong2021": 1.0}
    with pytest.raises(ValueError, match="unknown loss 'cosines'"):
        losses.parse_losses("cosines=1")
    with pytest.raises(ValueError, match="unknown loss 'diversity': give none or diversity alone, or"):
        losses.parse_losses("koleo=0.1,diversity")
    with pytest.raises(ValueError, match="the loss 'cosine' is given twice"):
        losses.parse_losses("cosine=1,koleo,cosine=2")
    with pytest.raises(ValueError, match="the weight of the loss 'heads' must be a number, got 'x'"):
        losses.parse_losses("heads=x")


def test_a_preset_becomes_its_losses():
    terms = losses.objective_terms({"diverse_vit_deit_small": 2.0, "koleo": 0.1}, 0.1)
    assert {name: term.weight for name, term in terms.items()} == {
        "diverse_vit_deit_small.cosine": 1.0,
        "diverse_vit_deit_small.contrast": 1.0,
        "diverse_vit_deit_small.heads": 2e-4,
        "diverse_vit_deit_small.weights": 1e-3,
        "diverse_vit_deit_small.mixing": 2.0,
        "koleo": 0.1,
    }
    assert terms["diverse_vit_deit_small.mixing"].options == {"smoothing": 0.1}
    assert terms["koleo"].options == {}
    assert (
        terms["diverse_vit_deit_small.cosine"].options == PRESETS["diverse_vit_deit_small"]["cosine"].options
    )


def test_effective_rank_counts_directions():
    assert metrics.effective_rank(torch.ones(2, 8, 6)).item() == pytest.approx(1, abs=1e-3)
    assert metrics.effective_rank(torch.eye(6)[None].expand(2, -1, -1)).item() == pytest.approx(6, rel=1e-4)


def test_metrics_restore_the_mode_and_agree_with_the_formulas():
    model, images = ViT(SMALL).train(), torch.randn(3, 1, 8, 8)
    found = metrics.diversity(model, images)
    assert model.training
    assert all(len(values) == 3 for values in found.values())
    matrices = torch.stack([metrics.patch_matrix(model, image) for image in images])
    mean = (matrices.abs().sum((1, 2)) - 16) / (16 * 15)
    assert found["abs_cosine"][-1] == pytest.approx(mean.mean().item(), abs=1e-5)
    assert all(0 < value <= 1 + 1e-5 for value in found["head_cosine"])


def test_accuracy_counts_right_answers():
    model, images = ViT(SMALL).eval(), torch.randn(300, 1, 8, 8)
    with torch.no_grad():
        labels = model(images).argmax(-1)
    labels[:30] = (labels[:30] + 1) % 5
    assert metrics.accuracy(model, Tensors(images, labels)) == pytest.approx(0.9)
