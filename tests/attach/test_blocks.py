"""Where the patches are in the tokens of a block: prefix tokens, grids, masks; foreign projections."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_vit import images, small_vit
from torch import nn

from vitdiv_kernels import CollapseMonitor, DiversityObjective, Term, losses, pairwise_cosine
from vitdiv_kernels.attach.monitor import residual
from vitdiv_kernels.nn import ReAttention
from vitdiv_kernels.vit import ViT

SMALL = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=4, num_classes=5)


def outputs(model, x, *blocks):
    """What the blocks give, by hooks of this test's own."""
    found = {}

    def keep(i):
        return model.blocks[i].register_forward_hook(lambda module, args, out: found.update({i: out}))

    handles = [keep(i) for i in blocks]
    model(x)
    for handle in handles:
        handle.remove()
    return [found[i] for i in blocks]


def parts_of(config, model, x, **options):
    with DiversityObjective(config, **options).attach(model) as objective:
        model(x)
        return objective()[1]


def test_class_tokens_that_join_after_the_blocks_are_not_dropped_from_them(torchvision):
    cait, convit, xcit = (pytest.importorskip(f"timm.models.{name}") for name in ("cait", "convit", "xcit"))
    x = torch.randn(2, 3, 32, 32)
    for model, prefixes in (
        (cait.Cait(**SMALL), (0, 0)),
        (xcit.Xcit(**SMALL), (0, 0)),
        (convit.ConVit(**SMALL, local_up_to_layer=1), (0, 1)),
    ):
        model.eval()
        tokens = outputs(model, x, 0, 1)
        patches = [t[:, prefix:] for t, prefix in zip(tokens, prefixes, strict=True)]
        assert [p.shape[1] for p in patches] == [16, 16]
        config = {"0": Term("pairwise_cosine", layers=[0]), "1": Term("pairwise_cosine")}
        parts = parts_of(config, model, x)
        for name, p in zip(("0", "1"), patches, strict=True):
            torch.testing.assert_close(parts[name], pairwise_cosine(p))
    labels = torch.tensor([0, 1])
    model = cait.Cait(**SMALL)
    with DiversityObjective({"patch_mixing": 1.0}).attach(model) as objective:
        model(x)
        assert objective(mixing=(labels, labels, torch.rand(16)))[0].isfinite()


def with_registers(name, number):
    """A model whose front has a class token and registers, as it tells by `name`."""
    model = small_vit()
    tokens = number + (name != "num_prefix_tokens")
    model.cls_token, model.pos_embed = (nn.Parameter(torch.randn(1, n, 16)) for n in (tokens, 16 + tokens))
    model.__class__ = type("Model", (ViT,), {"num_prefix_tokens": None})
    setattr(model, name, number)
    return model, tokens


@pytest.mark.parametrize("name", ["num_prefix_tokens", "num_register_tokens", "n_storage_tokens"])
@pytest.mark.parametrize("number", [0, 4])
def test_registers_of_dinov2_and_dinov3_are_no_patches(name, number):
    model, prefix = with_registers(name, number)
    if prefix == 0:
        model.pos_embed = nn.Parameter(torch.randn(1, 16, 16))
    x = images(2)
    (last,) = outputs(model, x, 2)
    torch.testing.assert_close(parts_of({"koleo": 1.0}, model, x)["koleo"], losses.koleo(last[:, prefix:]))
    records = CollapseMonitor(model).measure(x)
    assert records[-1]["residual"] == pytest.approx(residual(last[:, prefix:]).item(), rel=1e-5)


def test_dinov3_gives_its_blocks_lists_of_one():
    class Listed(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            x = x if isinstance(x, list) else [x]
            return [self.block(each) for each in x]

    class Last(Listed):
        def forward(self, x):
            return super().forward(x)[0]

    model, x = small_vit(), images(2)
    config = {"contrast": Term("patch_contrast", layers=("embeddings", 1))}
    expected = parts_of(config, model, x)
    model.blocks = nn.ModuleList([Listed(b) for b in model.blocks[:2]] + [Last(model.blocks[2])])
    torch.testing.assert_close(parts_of(config, model, x), expected)


def test_numbers_that_contradict_each_other_are_refused():
    x = images(2)
    model = small_vit()
    model.num_prefix_tokens = 2
    with pytest.raises(ValueError, match=r"blocks\[2\] gives 17 tokens where model.patch_embed made"):
        parts_of({"koleo": 1.0}, model, x)
    with pytest.raises(ValueError, match=r"has 2 prefix tokens by model.num_prefix_tokens: give num_pre"):
        CollapseMonitor(model).measure(x)
    (last,) = outputs(model, x, 2)
    given = parts_of({"koleo": 1.0}, model, x, num_prefix_tokens=1)
    torch.testing.assert_close(given["koleo"], losses.koleo(last[:, 1:]))
    # patches only, and nothing that tells of class tokens that join later
    model = small_vit()
    model.cls_token, model.pos_embed = (nn.Parameter(torch.randn(1, n, 16)) for n in (0, 16))
    with pytest.raises(ValueError, match="gives 16 tokens"):
        parts_of({"koleo": 1.0}, model, x)


def test_patches_that_are_dropped_are_fewer(torchvision):
    VisionTransformer = pytest.importorskip("timm.models.vision_transformer").VisionTransformer
    model = VisionTransformer(**SMALL, patch_drop_rate=0.25).train()
    x = torch.randn(2, 3, 32, 32)
    torch.manual_seed(3)
    (last,) = outputs(model, x, 1)
    assert last.shape[1] == 13
    torch.manual_seed(3)
    torch.testing.assert_close(parts_of({"koleo": 1.0}, model, x)["koleo"], losses.koleo(last[:, 1:]))
    with pytest.raises(ValueError, match="does not tell the grid of its 12 patches"):
        parts_of({"neighbourhood_contrast": 1.0}, model, x)


def neighbourhood(model, x, grid):
    (last,) = outputs(model, x, 1)
    embedded = model.patch_embed(x)
    embedded = embedded.flatten(1, 2) if embedded.dim() == 4 else embedded
    return losses.neighbourhood_contrast(model.norm(last)[:, 1:], embedded, grid=grid)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_grid_is_that_of_the_images(dynamic, torchvision):
    """64 patches each; of a model of dynamic size, its own grid is 8 x 8."""
    VisionTransformer = pytest.importorskip("timm.models.vision_transformer").VisionTransformer
    torch.manual_seed(0)
    size = {**SMALL, "img_size": 64 if dynamic else (32, 128)}
    model = VisionTransformer(**size, dynamic_img_size=dynamic)
    x = 0.1 * torch.randn(2, 3, 32, 128)
    got = parts_of({"neighbourhood_contrast": 1.0}, model, x)["neighbourhood_contrast"]
    torch.testing.assert_close(got, neighbourhood(model, x, (4, 16)))
    assert abs(got - neighbourhood(model, x, (8, 8))) > 1e-4
    given = Term("neighbourhood_contrast", options={"grid": (16, 4)})
    torch.testing.assert_close(parts_of({"mine": given}, model, x)["mine"], neighbourhood(model, x, (16, 4)))


def test_the_grid_of_a_model_of_our_own_and_none():
    model, x = small_vit(depth=2), 0.1 * torch.randn(2, 1, 4, 16)
    got = parts_of({"neighbourhood_contrast": 1.0}, model, x)["neighbourhood_contrast"]
    torch.testing.assert_close(got, neighbourhood(model, x, (2, 8)))
    assert abs(got - neighbourhood(model, x, (4, 4))) > 1e-4

    class Hidden(nn.Module):
        def __init__(self, embed):
            super().__init__()
            self.embed = embed

        def forward(self, x):
            return self.embed(x)

    model.patch_embed = Hidden(model.patch_embed)
    with pytest.raises(ValueError, match="does not tell the grid of its 16 patches: give the option grid"):
        parts_of({"neighbourhood_contrast": 1.0}, model, x)


def test_a_compiled_model_of_two_sizes_tells_its_grids():
    torch.compiler.reset()
    model = small_vit(depth=2)
    run = torch.compile(model, backend="eager", fullgraph=True)
    with DiversityObjective({"neighbourhood_contrast": 1.0}).attach(run) as objective:
        for shape, grid in (((8, 8), (4, 4)), ((4, 16), (2, 8)), ((16, 4), (8, 2))):
            x = 0.1 * torch.randn(2, 1, *shape)
            run(x)
            got, _ = objective()
            torch.testing.assert_close(got, neighbourhood(model, x, grid))


def test_padded_tokens_are_refused_and_unpadded_ones_counted(torchvision):
    naflex = pytest.importorskip("timm.models.naflexvit")
    config = naflex.NaFlexVitCfg(patch_size=8, embed_dim=24, depth=2, num_heads=4, pos_embed_grid_size=(4, 4))
    model = naflex.NaFlexVit(config, num_classes=5).eval()
    coord = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).view(1, 16, 2)
    given = {
        "patches": torch.randn(2, 16, 192),
        "patch_coord": coord.expand(2, -1, -1),
        "patch_valid": torch.ones(2, 16, dtype=torch.bool),
    }
    prefix = model.num_prefix_tokens
    (last,) = outputs(model, given, 1)
    for config in ({"koleo": 1.0}, {"koleo": 1.0, "attention_diversity": 1.0}):
        parts = parts_of(config, model, given)
        torch.testing.assert_close(parts["koleo"], losses.koleo(last[:, prefix:]))
    padded = {
        "patches": F.pad(given["patches"], (0, 0, 0, 48)),
        "patch_coord": F.pad(given["patch_coord"], (0, 0, 0, 48)),
        "patch_valid": F.pad(given["patch_valid"], (0, 48)),
    }
    for name in ("koleo", "attention_diversity"):
        with pytest.raises(ValueError, match="tokens are padded"):
            parts_of({name: 1.0}, model, padded)


def test_maps_are_not_taken_where_a_mask_changes_them(torchvision):
    VisionTransformer = pytest.importorskip("timm.models.vision_transformer").VisionTransformer
    model, x = VisionTransformer(**SMALL).eval(), torch.randn(2, 3, 32, 32)
    causal = torch.ones(17, 17, dtype=torch.bool).tril()
    for name, refused in (("koleo", False), ("head_mhs", True)):
        with DiversityObjective({name: 1.0}).attach(model) as objective:
            model.forward_features(x, attn_mask=causal)
            if refused:
                with pytest.raises(ValueError, match="maps are taken without a mask"):
                    objective()
            else:
                assert objective()[0].isfinite()


class Published(nn.Module):
    """Re-attention as its authors released it: a convolution and a batch norm, no other names."""

    def __init__(self, dim, num_heads, norm=nn.BatchNorm2d):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.reatten_matrix, self.var_norm = nn.Conv2d(num_heads, num_heads, 1), norm(num_heads)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        self.maps = self.var_norm(self.reatten_matrix((q * self.scale @ k.mT).softmax(-1)))
        return self.proj((self.maps @ v).transpose(1, 2).flatten(2))


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's, which always takes its own statistics."""

    __module__ = "torchvision.ops.misc"

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x):
        mean, scale = self.running_mean, self.weight * (self.running_var + self.eps).rsqrt()
        return (x - mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm2d, lambda n: nn.BatchNorm2d(n, affine=False), FrozenBatchNorm2d, lambda n: nn.Identity()],
    ids=["batch", "not affine", "frozen", "none"],
)
def test_cos_reg_of_the_published_attention(norm, training):
    model = small_vit().train(training)
    for block in model.blocks:
        block.attn = Published(16, 2, norm).train(training)
        for parameter in block.attn.var_norm.parameters():
            nn.init.normal_(parameter)
    x = images()
    got = parts_of("deepvit_cos_reg", model, x)["cos_reg"]
    maps = [block.attn.maps for block in model.blocks]
    right = sum(F.cosine_similarity(maps[i], maps[i + 1], dim=1).mean() for i in range(2)) / 2
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_a_norm_over_groups_is_refused():
    model = small_vit()
    model.blocks[0].attn = Published(16, 2, lambda n: nn.GroupNorm(1, n))
    with pytest.raises(TypeError, match=r"are no fixed mix \(GroupNorm\)"):
        parts_of("deepvit_cos_reg", model, images())


class Adapted(nn.Module):
    """A projection with an adapter beside it, as peft puts it in place of a Linear."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B = nn.Linear(16, 2, bias=False), nn.Linear(2, 48, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def test_an_adapter_on_the_projection_counts():
    model, merged, x = small_vit(), small_vit(), images(2)
    for block, plain in zip(model.blocks, merged.blocks, strict=True):
        adapted = block.attn.qkv = Adapted(block.attn.qkv)
        with torch.no_grad():
            plain.attn.qkv.weight += adapted.lora_B.weight @ adapted.lora_A.weight
    config = {"attention_diversity": 1.0, "head_contrast": 1.0, "cos_reg": 1.0}
    torch.testing.assert_close(parts_of(config, model, x), parts_of(config, merged, x))
    got, right = CollapseMonitor(model).measure(x)[-1], CollapseMonitor(merged).measure(x)[-1]
    assert got["attention_cosine"] == pytest.approx(right["attention_cosine"], rel=1e-5)
    assert math.isclose(got["attention_entropy"], right["attention_entropy"], rel_tol=1e-5)
    with pytest.raises(TypeError, match=r"blocks\[0\].attn.qkv, Adapted, is adapted or quantised"):
        parts_of({"weight_mhs": 1.0}, model, x)


def test_a_quantised_projection_is_measured():
    class Quantised(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = [linear]

        def weight(self):
            return self.linear[0].weight

        def forward(self, x):
            return self.linear[0](x)

    model, x = small_vit(), images(2)
    right = CollapseMonitor(model).measure(x)
    for block in model.blocks:
        block.attn.qkv = Quantised(block.attn.qkv)
    assert CollapseMonitor(model).measure(x) == right
    with pytest.raises(TypeError, match="is adapted or quantised"):
        parts_of({"weight_mhs": 1.0}, model, x)
    model.blocks[0].attn.qkv = nn.Linear(16, 46)
    objective = DiversityObjective({"attention_diversity": 1.0}).attach(model)
    model.blocks[0].attn.qkv(torch.randn(2, 17, 16))
    with pytest.raises(TypeError, match="q, k and v of 2 heads, a multiple of 6 features, got 46"):
        objective()


def test_peft_and_dynamic_quantisation(torchvision):
    peft = pytest.importorskip("peft")
    model = small_vit(reattention=(1,))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False))
    model, x = adapted.base_model.model.eval(), images(2)
    got = CollapseMonitor(model).measure(x)
    merged = adapted.merge_and_unload().eval()
    for record, right in zip(got, CollapseMonitor(merged).measure(x), strict=True):
        assert record["attention_cosine"] == pytest.approx(right["attention_cosine"], rel=1e-4)


def test_chunks_of_blocks_are_refused():
    model = small_vit()
    model.blocks = nn.ModuleList([nn.ModuleList([ReAttention(16, 2)])])
    with pytest.raises(TypeError, match="must hold blocks, got chunks of them"):
        DiversityObjective({"koleo": 1.0}).attach(model)


def test_numbers_of_numpy_are_numbers_and_booleans_are_not():
    np = pytest.importorskip("numpy")
    assert Term("patch_contrast", layers=[np.int64(0), np.int32(-1)]).layers == (0, -1)
    assert CollapseMonitor(small_vit(), every=np.int64(2)).every == 2
    for layers in ([True], [0.0], [None]):
        with pytest.raises(ValueError, match="layers of koleo must be block numbers or"):
            Term("koleo", layers=layers)
    with pytest.raises(ValueError, match="every must be an integer of at least 1, got True"):
        CollapseMonitor(small_vit(), every=True)
