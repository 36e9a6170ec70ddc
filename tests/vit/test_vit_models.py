"""The papers' models: the logits of their published forms, their shapes, and how they start."""

from dataclasses import asdict, replace

import pytest
import torch
from published_vits import deepvit, deepvit_shapes, gong, gong_shapes, random_state
from torch import nn

from vitdiv_kernels import CollapseMonitor, DiversityObjective
from vitdiv_kernels.nn import ReAttention
from vitdiv_kernels.vit import CONFIGS, ViT, ViTConfig, load

SMALL = ViTConfig(image_size=32, patch=8, dim=24, depth=3, heads=4, mlp_ratio=2.0, classes=5)
KINDS = {
    "deepvit": replace(
        CONFIGS["deepvit_s"], image_size=32, patch=8, dim=24, depth=3, heads=4, classes=5, reattention=(2,)
    ),
    "distilled": replace(SMALL, distilled=True),
    "cait": replace(SMALL, attention="talking_heads", layer_scale=0.1, class_blocks=2),
    "gong": replace(SMALL, attention="talking_heads", talking_bias=False, patch_head=True),
}
# that these have no gradient: batch norm takes away the mix's bias, the logits don't use the patch head
SILENT = "reatten_matrix.bias", "patch_head", "proj_l.bias"

pytestmark = pytest.mark.usefixtures("one_thread")


def images(count=2, size=32):
    return torch.randn(count, 3, size, size, dtype=torch.float64)


@pytest.mark.parametrize(("name", "transform_scale"), [("deepvit_s", True), ("deepvit_l", False)])
def test_deepvit_s_and_l_are_the_published_ones(name, transform_scale):
    config = replace(
        CONFIGS[name], image_size=32, patch=8, dim=24, depth=4, heads=4, classes=5, reattention=(2, 3)
    )
    state = random_state(deepvit_shapes(24, 4, 4, (2, 3), patches=16, patch=8, classes=5))
    model, x = load(state, ViT(config).double()).eval(), images()
    expected = deepvit(state, x, 4, 4, (2, 3), 8, transform_scale)
    torch.testing.assert_close(model(x), expected)


def test_the_factor_of_deepvit_can_be_folded_into_weights():
    model, x = ViT(KINDS["deepvit"]).double().eval(), images()
    state = model.state_dict()
    folded = {name: 2 * t if ".attn.proj." in name or ".fc2." in name else t for name, t in state.items()}
    plain = load(folded, ViT(replace(KINDS["deepvit"], scale_adjustment=1.0)).double()).eval()
    for block in plain.blocks:
        block.norm1.eps = block.norm2.eps = 4e-6
    torch.testing.assert_close(plain(x), model(x))


def test_the_vit_of_gong_is_the_published_one():
    state = random_state(gong_shapes(24, 3, 4, patches=16, patch=8, classes=5))
    config = replace(KINDS["gong"], mlp_ratio=4.0)
    model, x = load(state, ViT(config).double()), images()
    torch.testing.assert_close(model(x), gong(state, x, 4, 3, 8))
    torch.testing.assert_close(model.patch_head.weight, state["patch_head.weight"])


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("deepvit_s", deepvit_shapes(396, 16, 12, range(11, 16), 196, 16, 1000)),
        ("deepvit_l", deepvit_shapes(420, 32, 12, range(20, 32), 196, 16, 1000)),
        ("deepvit_l_384", deepvit_shapes(420, 32, 12, range(20, 32), 576, 16, 1000)),
    ],
)
def test_deepvit_has_the_published_names_and_shapes(name, shapes):
    with torch.device("meta"):
        assert {key: tuple(t.shape) for key, t in ViT(CONFIGS[name]).state_dict().items()} == shapes


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("deit_small24", 43.3),
        ("deit_tiny_distilled", 5.9),
        ("deit_small_distilled", 22.4),
        ("deit_base_distilled_384", 87.6),
        ("deepvit_16b", 24.4),
        ("deepvit_32b", 48.1),
        ("cait_xxs36_224", 17.3),
        ("cait_m48_448", 356.5),
        ("gong_base", 87.3),
        ("gong_large_384", 305.7),
    ],
)
def test_counts_of_parameters(name, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in ViT(CONFIGS[name]).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_gradients(kind):
    model = ViT(KINDS[kind])
    logits, tokens = model(images().float(), return_tokens=True)
    assert logits.shape == (2, 5)
    prefix = {"distilled": 2, "cait": 0}.get(kind, 1)
    assert model.num_prefix_tokens == prefix
    assert [t.shape for t in tokens] == [(2, prefix + 16, 24)] * 4
    logits.square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in silent if not any(part in name for part in SILENT)] == []


def test_distilled_logits_are_the_mean_of_both_heads():
    model, x = ViT(KINDS["distilled"]).double(), images()
    logits, tokens = model(x, return_tokens=True)
    last = model.norm(tokens[-1])
    torch.testing.assert_close(logits, (model.head(last[:, 0]) + model.head_dist(last[:, 1])) / 2)


def test_what_enters_the_heads_is_dropped_in_training():
    model = ViT(replace(SMALL, distilled=True, head_drop=0.5))
    x, entered = torch.randn(64, 3, 32, 32), []
    for head in (model.head, model.head_dist):
        head.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    model(x)
    for kept in entered:
        assert (kept == 0).double().mean().item() == pytest.approx(0.5, abs=0.05)
    model.eval()
    _, tokens = model(x, return_tokens=True)
    normed = model.norm(tokens[-1])
    for i in range(2):
        torch.testing.assert_close(entered[2 + i], normed[:, i])


def test_drop_path_grows_or_not():
    shares = [block.drop_path for block in ViT(replace(SMALL, drop_path=0.2)).blocks]
    assert shares == [0.0, 0.1, 0.2]
    model = ViT(replace(KINDS["cait"], drop_path=0.2, drop_path_grows=False))
    assert [block.drop_path for block in model.blocks] == [0.2] * 3
    assert [block.drop_path for block in model.blocks_token_only] == [0.0] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_patches_leave_prefix_tokens_out(kind):
    model, x = ViT(KINDS[kind]).double(), images()
    objective = DiversityObjective({"pairwise_cosine": 1.0}).attach(model)
    tokens = model(x, return_tokens=True)[1][-1][:, model.num_prefix_tokens :]
    unit = nn.functional.normalize(tokens, dim=-1)
    cosine = (unit @ unit.mT).abs()
    expected = (cosine.sum() - 2 * 16) / (2 * 16 * 15)
    torch.testing.assert_close(objective()[0], expected)


@pytest.mark.parametrize("kind", ["deepvit", "distilled"])
def test_the_monitor_measures_them(kind):
    monitor = CollapseMonitor(ViT(KINDS[kind]))
    monitor.measure(images().float())
    assert len(monitor.records) == 3
    assert 0 < monitor.records[-1]["patch_abs_cosine"] < 1


def test_the_start_of_timm():
    torch.manual_seed(0)
    model = ViT(replace(KINDS["cait"], dim=96, depth=4, init="timm", pos_std=0.02, layer_scale=1e-5))
    for name, p in model.state_dict().items():
        if p.ndim == 2 or name in ("cls_token", "pos_embed"):
            tolerance = 6 * 0.02 / (2 * p.numel()) ** 0.5  # of 6 standard errors
            assert float(p.std()) == pytest.approx(0.02, abs=tolerance), name
            assert float(p.mean()) == pytest.approx(0, abs=6 * 0.02 / p.numel() ** 0.5), name
        elif "norm" in name and name.endswith("weight"):
            assert (p == 1).all(), name
        elif "gamma" in name:
            assert (p == 1e-5).all(), name
        elif "patch_embed" not in name:
            assert (p == 0).all(), name
    bound = 1 / (3 * 8 * 8) ** 0.5  # a convolution as torch starts it
    proj = model.patch_embed.proj
    assert 0.95 * bound < proj.weight.abs().max() <= bound
    assert 0.5 * bound < proj.bias.abs().max() <= bound


@pytest.mark.parametrize("mix_init", ["identity", "conv"])
def test_the_start_of_the_mix(mix_init):
    config = replace(KINDS["deepvit"], mix_init=mix_init)
    torch.manual_seed(0)
    attn = ViT(config).blocks[2].attn
    mix = attn.reatten_matrix.weight.squeeze()
    if mix_init == "conv":
        assert (attn.var_norm.weight == 1).all()
        assert mix.abs().max() <= 0.5  # 1 / sqrt(4 heads)
        assert attn.reatten_matrix.bias.any()
    else:
        assert mix.diagonal().min() > 0.6
        assert (attn.var_norm.weight == 0.05).all()


@pytest.mark.parametrize("reattention", [(), (1, 2)])
def test_the_first_models_start_as_ever(reattention):
    """Weights and generator are those of a ViT made layer by layer, in this order."""
    config = ViTConfig(
        8, 1, patch=2, overlap=1, dim=48, depth=3, heads=4, mlp_ratio=2.0, classes=10, pos_std=0.2,
        reattention=reattention,
    )  # fmt: skip
    torch.manual_seed(3)
    model, after = ViT(config), torch.rand(1)
    torch.manual_seed(3)
    conv = nn.Conv2d(1, 48, 4)
    layers, mixes = [], []
    for i in range(3):
        if i in reattention:
            attn = ReAttention(48, 4, qkv_bias=True)
            mixes.append(attn.reatten_matrix.weight.clone())
            layers += [attn.qkv, attn.proj]
        else:
            layers += [nn.Linear(48, 144), nn.Linear(48, 48)]
        layers += [nn.Linear(48, 96), nn.Linear(96, 48)]
    layers.append(nn.Linear(48, 10))
    tokens = [0.02 * torch.randn(1, 1, 48), 0.2 * torch.randn(1, 17, 48)]
    for layer in (conv, *layers):
        nn.init.xavier_uniform_(layer.weight.detach().flatten(1))
    assert torch.equal(torch.rand(1), after)
    made = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    assert all(map(torch.equal, made, [layer.weight for layer in layers]))
    assert torch.equal(model.patch_embed.proj.weight, conv.weight)
    assert all(map(torch.allclose, (model.cls_token, model.pos_embed), tokens))
    kept = [block.attn.reatten_matrix.weight for block in model.blocks if hasattr(block.attn, "var_norm")]
    assert len(kept) == len(mixes)
    assert all(map(torch.equal, kept, mixes))


def test_the_first_names_keep_their_start():
    first = ("digits24", "digits24_reattention", "deit_tiny", "deit_small", "deit_base")
    for name in (*first, "deepvit_16b", "deepvit_24b", "deepvit_32b"):
        config = CONFIGS[name]
        assert (config.init, config.mix_init) == ("xavier", "identity")
    assert CONFIGS["digits24"].pos_std == 0.2


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_plain_data(name):
    assert ViTConfig(**asdict(CONFIGS[name])) == CONFIGS[name]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"init": "jax"}, "init must be one of 'xavier', 'timm', got 'jax'"),
        ({"mix_init": "zero"}, "mix_init must be one of 'identity', 'conv', got 'zero'"),
        ({"map_norm": "rms"}, "map_norm must be one of 'batch', 'layer', 'none', got 'rms'"),
        ({"attention": "mixed"}, "attention must be one of 'plain', 'talking_heads', got 'mixed'"),
        ({"stem": "resnet"}, "stem must be one of 'patch', 'conv', got 'resnet'"),
        (
            {"stem": "conv", "overlap": 1},
            "patches of an even side without overlap, got patch 8 and overlap 1",
        ),
        ({"scale_adjustment": 0.0}, "scale_adjustment must be positive, got 0.0"),
        ({"class_blocks": -1}, "class_blocks must be an integer of at least 0, got -1"),
        ({"class_blocks": 2, "distilled": True}, "distilled must be False with class_blocks"),
    ],
)
def test_config_errors(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(SMALL, **change)
