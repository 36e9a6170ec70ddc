"""The modules: what they compute, which state dicts they load, and where they drop in."""

import formulas
import pytest
import torch
from torch import nn

import vitdiv_kernels as vd


class PublishedReAttention(nn.Module):
    """DeepViT's block as published: names and order of the operations."""

    def __init__(self, dim, heads, scaled):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.reatten_matrix = nn.Conv2d(heads, heads, 1, 1)
        self.var_norm = nn.BatchNorm2d(heads)
        self.reatten_scale = self.scale if scaled else 1.0
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        maps = formulas.softmax_maps(qkv[0], qkv[1], self.scale)
        maps = self.var_norm(self.reatten_matrix(maps)) * self.reatten_scale
        return self.proj((maps @ qkv[2]).transpose(1, 2).flatten(2))


class PublishedTalkingHeads(nn.Module):
    """CaiT's attention with timm's names."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj_l, self.proj_w = nn.Linear(heads, heads), nn.Linear(heads, heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        logits = (q * q.shape[-1] ** -0.5) @ k.mT
        maps = self.proj_l(logits.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        maps = self.proj_w(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.proj((maps @ v).transpose(1, 2).flatten(2))


def assert_same_training(module, published, steps=2):
    """Outputs, gradients and buffers over steps of training, then the output in evaluation."""
    module.load_state_dict(published.state_dict())
    for _ in range(steps):
        x = torch.randn(3, 11, 24, dtype=torch.float64)
        outputs = [m(x) for m in (module, published)]
        torch.testing.assert_close(*outputs)
        for out, m in zip(outputs, (module, published), strict=True):
            m.zero_grad()
            out.square().sum().backward()
        theirs = dict(published.named_parameters())
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameter.grad, theirs[name].grad, msg=name)
    for (name, ours), their in zip(module.state_dict().items(), published.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, their, msg=name)
    module.eval(), published.eval()
    torch.testing.assert_close(module(x), published(x))


@pytest.mark.parametrize("scaled", [False, True])
def test_reattention_is_the_published_one(backend, scaled):
    published = PublishedReAttention(24, 4, scaled).double()
    module = vd.nn.ReAttention(24, 4, transform_scale=scaled, backend=backend).double()
    assert list(module.state_dict()) == list(published.state_dict())
    assert_same_training(module, published)


def test_talking_heads_are_the_published_ones(backend):
    published = PublishedTalkingHeads(24, 4).double()
    assert_same_training(vd.nn.TalkingHeadsAttention(24, 4, backend=backend).double(), published)


def test_without_transform_it_is_plain_attention():
    module = vd.nn.ReAttention(24, 4, apply_transform=False, qkv_bias=True)
    assert set(module.state_dict()) == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    x = torch.randn(2, 7, 24)
    q, k, v = module.qkv(x).unflatten(2, (3, 4, 6)).permute(2, 0, 3, 1, 4)
    expected = module.proj((formulas.softmax_maps(q, k) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x), expected)


def test_initialisation():
    module = vd.nn.ReAttention(64, 8)
    weight = module.reatten_matrix.weight[:, :, 0, 0]
    noise = weight - torch.eye(8)
    assert 0.05 < noise.std() < 0.15
    assert module.reatten_matrix.bias.eq(0).all()
    torch.testing.assert_close(module.var_norm.weight, torch.full((8,), 0.05))
    published = vd.nn.ReAttention(64, 8, mix_init="conv")
    assert published.var_norm.weight.eq(1).all()
    assert published.reatten_matrix.weight.abs().max() <= 8**-0.5
    assert vd.nn.ReAttention(64, 8, norm_gain=0.3).var_norm.weight.eq(0.3).all()


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_timm_options(backend, norm):
    module = vd.nn.ReAttention(
        24, num_heads=4, attn_head_dim=8, dim_out=20, qkv_bias=True, qk_norm=True, scale_norm=True,
        proj_bias=False, proj_drop=0.1, norm_layer=nn.LayerNorm, norm=norm, backend=backend,
        dtype=torch.float64,
    )  # fmt: skip
    out = module(torch.randn(2, 5, 24, dtype=torch.float64))
    assert out.shape == (2, 5, 20)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize(("cls", "options"), [
    (vd.nn.ReAttention, {"transform_scale": True}), (vd.nn.ReAttention, {"norm": "layer"}),
    (vd.nn.ReAttention, {"apply_transform": False}), (vd.nn.TalkingHeadsAttention, {}),
])  # fmt: skip
def test_the_factor_of_the_logits(cls, options):
    """qk_scale is what q multiplied by as much is: the logits are q k^T times it."""
    attn = cls(24, 4, qk_scale=0.7, dtype=torch.float64, **options).eval()
    default = cls(24, 4, dtype=torch.float64, **options).eval()
    default.load_state_dict(attn.state_dict())
    with torch.no_grad():
        default.qkv.weight[:24] *= 0.7 / 6**-0.5
    assert attn.scale == 0.7
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    out, expected = attn(x), default(x)
    if options.get("transform_scale"):
        bias = attn.proj.bias
        expected = bias + (expected - bias) * 0.7 / 6**-0.5
    torch.testing.assert_close(out, expected)
    for wrong in (0, -1.0):
        with pytest.raises(ValueError, match=f"qk_scale must be positive, got {wrong}"):
            cls(24, 4, qk_scale=wrong, **options)
    with pytest.raises(TypeError, match="qk_scale must be a number, got str"):
        cls(24, 4, qk_scale="0.7", **options)


def test_the_gram_matrix_comes_along(backend):
    module = vd.nn.ReAttention(24, 4, backend=backend).eval()
    x = torch.randn(2, 9, 24)
    out, gram = module(x, return_gram=True)
    torch.testing.assert_close(out, module(x))
    q, k, _ = module.qkv(x).unflatten(2, (3, 4, 6)).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(gram, formulas.attention_gram(q, k), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_modules_and_autocast(backend, dtype):
    x = torch.randn(2, 9, 24)
    assert vd.nn.ReAttention(24, 4, backend=backend).to(dtype)(x.to(dtype)).dtype == dtype
    module = vd.nn.ReAttention(24, 4, qk_norm=True, norm_layer=nn.LayerNorm, backend=backend)
    with torch.autocast(x.device.type, dtype=dtype):
        out = module(x)
    out.float().sum().backward()
    assert out.dtype == dtype
    assert module.reatten_matrix.weight.grad.dtype == torch.float32


def test_attention_dropout_trains_on_auto_only():
    module = vd.nn.ReAttention(24, 4, attn_drop=0.5)
    x = torch.randn(2, 9, 24)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_losses(backend):
    x, y = torch.randn(2, 3, 12, 8)
    loss = vd.nn.PatchCosineLoss(num_prefix_tokens=2, backend=backend)
    torch.testing.assert_close(loss(x), formulas.pairwise_cosine(x[:, 2:]))
    torch.testing.assert_close(loss(x, y), formulas.pairwise_cosine(x[:, 2:], y[:, 2:]))
    loss = vd.nn.PatchCosineLoss("signed", include_self=True, reduction="sum", num_prefix_tokens=0)
    expected = formulas.pairwise_cosine(x, penalty="signed", include_self=True, reduction="sum")
    torch.testing.assert_close(loss(x), expected)
    q, k = torch.randn(2, 2, 3, 9, 8)
    loss = vd.nn.AttentionDiversityLoss("square", include_self=False, backend=backend)
    expected = formulas.attention_diversity(q, k, penalty="square", include_self=False)
    torch.testing.assert_close(loss(q, k), expected)
    # one prefix token, eps and scale
    loss = vd.nn.PatchCosineLoss(eps=3.0, backend=backend)
    torch.testing.assert_close(loss(x), formulas.pairwise_cosine(x[:, 1:], eps=3.0))
    loss = vd.nn.AttentionDiversityLoss(scale=0.1, backend=backend)
    torch.testing.assert_close(loss(q, k), formulas.attention_diversity(q, k, scale=0.1))


TOKENS, OTHERS = torch.randn(2, 2, 11, 6, generator=torch.Generator().manual_seed(1))
HEADS = torch.randn(4, 2, 3, 5, 4, generator=torch.Generator().manual_seed(2))
LABELS = torch.tensor([0, 1]), torch.tensor([1, 0]), torch.rand(9)
REGIONS = torch.rand(2, 2, 4, 5, generator=torch.Generator().manual_seed(4))
START = torch.rand(2, 9, generator=torch.Generator().manual_seed(3))
# module, function, inputs, options
LOSSES = [
    ("PatchContrastLoss", "patch_contrast", [TOKENS, OTHERS], dict(normalise=False)),
    ("NeighbourhoodContrastLoss", "neighbourhood_contrast", [TOKENS, OTHERS], dict(window=3)),
    ("PatchMHSLoss", "patch_mhs", [TOKENS], dict(reduction="sum")),
    ("PatchMGDLoss", "patch_mgd", [TOKENS], dict(ridge=1e-3)),
    ("PatchSoftOrthogonalityLoss", "patch_soft_orthogonality", [TOKENS], dict(reduction="sum")),
    ("PatchConditionOrthogonalityLoss", "patch_condition_orthogonality", [TOKENS], dict(start=START)),
    ("RegionContrastLoss", "region_contrast", [TOKENS], dict(reduction="sum")),
    ("RegionMixingLoss", "region_mixing", [*REGIONS, torch.eye(4).unflatten(1, (2, 2))], dict(eps=0.1)),
    ("PatchMixingLoss", "patch_mixing", [TOKENS, *LABELS], dict(smoothing=0.1)),
    ("HeadCrossCosineLoss", "head_cross_cosine", [*HEADS], dict(penalty="square")),
    ("HeadContrastLoss", "head_contrast", [*HEADS], dict(scale=1.0)),
    ("HeadMHSLoss", "head_mhs", [*HEADS[:2]], dict(reduction="sum")),
    ("HeadMGDLoss", "head_mgd", [*HEADS[:2]], dict(ridge=1e-3)),
    ("HeadSoftOrthogonalityLoss", "head_soft_orthogonality", [*HEADS[:2]], dict(reduction="sum")),
    (
        "HeadConditionOrthogonalityLoss",
        "head_condition_orthogonality",
        [*HEADS[:2]],
        dict(start=START[:, :3]),
    ),
    ("WeightMHSLoss", "weight_mhs", [TOKENS], dict(reduction="mean")),
    ("WeightMGDLoss", "weight_mgd", [TOKENS], dict(ridge=1e-3)),
    ("WeightSoftOrthogonalityLoss", "weight_soft_orthogonality", [TOKENS], dict(reduction="mean")),
    (
        "WeightConditionOrthogonalityLoss",
        "weight_condition_orthogonality",
        [TOKENS],
        dict(of="columns", start=START[:, :6]),
    ),
    ("CosRegLoss", "cos_reg", [[tuple(HEADS[:2]), tuple(HEADS[2:])]], dict(along="rows")),
    ("GramAnchoringLoss", "gram_anchoring", [TOKENS, OTHERS], dict(negatives="remove")),
    ("KoLeoLoss", "koleo", [TOKENS], dict(eps=1e-4)),
    ("UniformityLoss", "uniformity", [TOKENS], dict(t=1.0)),
    ("LinearCKALoss", "linear_cka", [TOKENS, OTHERS], dict(reduction="none")),
    ("VFLoss", "vf_loss", [TOKENS, OTHERS], dict(distance_margin=0.0)),
    ("InfoNCELoss", "info_nce", [TOKENS, OTHERS], dict(temperature=0.5)),
    ("GradientDiversityLoss", "gradient_diversity", [TOKENS], dict(reduction="sum")),
]


@pytest.mark.parametrize(("module", "function", "inputs", "options"), LOSSES)
def test_loss_modules_are_their_functions_without_prefix_tokens(module, function, inputs, options):
    module, function = getattr(vd.nn, module), getattr(vd.losses, function)
    on_patches = [x[:, 2:] if x is TOKENS or x is OTHERS else x for x in inputs]
    on_tokens = "num_prefix_tokens" in repr(module(**options))
    tokens = dict(num_prefix_tokens=2) if on_tokens else {}
    assert not on_tokens or module(**options).num_prefix_tokens == 1
    torch.manual_seed(1)  # of an order
    got = module(**options, **tokens)(*inputs)
    torch.manual_seed(1)
    expected = function(*(on_patches if on_tokens else inputs), **options)
    torch.testing.assert_close(got, 1 - expected if module is vd.nn.LinearCKALoss else expected)
    assert not torch.equal(got, module(**tokens)(*inputs))  # the option has an effect
    name = next(iter(options))
    assert f"{name}=" in repr(module(**options))
    with pytest.raises(
        TypeError, match=f"{module.__name__} has no option 'mergin'; its options are .*{name}"
    ):
        module(mergin=1)


def test_every_loss_module_is_tested():
    modules = {name for name in vd.nn.__all__ if name.endswith("Loss")}
    assert modules == {row[0] for row in LOSSES} | {"PatchCosineLoss", "AttentionDiversityLoss"}


def test_repr_tells_the_options():
    assert "penalty='abs'" in repr(vd.nn.PatchCosineLoss())
    assert "include_self=True" in repr(vd.nn.AttentionDiversityLoss())
    assert "norm='batch'" in repr(vd.nn.ReAttention(24, 4))
    assert "num_heads=4" in repr(vd.nn.TalkingHeadsAttention(24, 4))


def test_it_drops_into_timm(torchvision):
    VisionTransformer = pytest.importorskip("timm.models.vision_transformer").VisionTransformer
    model = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=2,
        num_heads=4,
        num_classes=5,
        attn_layer=vd.nn.ReAttention,
    )
    assert isinstance(model.blocks[1].attn, vd.nn.ReAttention)
    model(torch.randn(2, 3, 32, 32)).sum().backward()


def test_batch_norm_can_be_frozen(backend):
    attention = vd.nn.ReAttention(24, 3, backend=backend).train()
    attention.var_norm.eval()
    before = {name: value.clone() for name, value in attention.var_norm.named_buffers()}
    x = torch.randn(2, 9, 24)
    frozen = attention(x)
    for name, value in attention.var_norm.named_buffers():
        assert torch.equal(value, before[name]), name
    torch.testing.assert_close(frozen, attention.eval()(x))


def test_cumulative_statistics(backend):
    """momentum=None: the running variance is the mean of the batches' own."""
    attention = vd.nn.ReAttention(24, 3, momentum=None, backend=backend).train()
    batches, own = torch.randn(3, 2, 9, 24), []
    for x in batches:
        attention.var_norm.reset_running_stats()
        attention(x)
        own.append(attention.var_norm.running_var.clone())
    attention.var_norm.reset_running_stats()
    for x in batches:
        attention(x)
    torch.testing.assert_close(attention.var_norm.running_var, torch.stack(own).mean(0))


def test_batch_norm_without_running_statistics(backend):
    attention = vd.nn.ReAttention(24, 3, backend=backend)
    attention.var_norm = torch.nn.BatchNorm2d(3, track_running_stats=False)
    x = torch.randn(2, 9, 24)
    torch.testing.assert_close(attention.train()(x), attention.eval()(x))
