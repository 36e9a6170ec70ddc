"""The real classes, where their packages are here."""

import copy

import pytest
import torch
from test_fuse import assert_same, trained
from torch import nn

import vitdiv_kernels as vd

pytestmark = pytest.mark.usefixtures("one_thread")


def images(size=16):
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def spread(model):
    """In float64, with weights that differ: what starts as an identity would hide a transposed mix."""
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture
def timm(torchvision):
    return pytest.importorskip("timm")


@pytest.fixture
def vit(timm):
    def make(**options):
        sizes = dict(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=4, num_classes=3)
        torch.manual_seed(1)
        return spread(timm.models.vision_transformer.VisionTransformer(**sizes | options))

    return make


@pytest.fixture
def cait(timm):
    def make(**options):
        sizes = dict(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=4, num_classes=3)
        torch.manual_seed(1)
        return spread(timm.models.cait.Cait(**sizes | options))

    return make


@pytest.fixture
def vit_pytorch(torchvision):
    return pytest.importorskip("vit_pytorch")


def test_timms_cait(cait):
    model, original = cait(), cait()
    report = vd.fuse(model)
    assert [swap.names for swap in report.swapped] == [("blocks.0.attn",), ("blocks.1.attn",)]
    assert {left.what for left in report.left} == {"ClassAttn"}
    assert_same(trained(model, images()), trained(original, images()))
    model.load_state_dict(original.state_dict())
    original.load_state_dict(model.state_dict())
    assert type(original.blocks[0].attn).__name__ == "TalkingHeadAttn"
    vd.unfuse(model)
    assert type(model.blocks[0].attn) is type(original.blocks[0].attn)


OPTIONS = [{}, {"qk_norm": True, "scale_attn_norm": True, "proj_bias": False}, {"attn_drop_rate": 0.3}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("fused_attn", [True, False])
def test_timms_attention_on_request(options, fused_attn, vit):
    model, original = vit(**options), vit(**options)
    assert "plain=True" in vd.fuse(model).left[0].why
    for each in (model, original):
        for block in each.blocks:
            block.attn.fused_attn = fused_attn
    assert len(vd.fuse(model, plain=True).swapped) == 2
    assert isinstance(model.blocks[1].attn, vd.nn.ReAttention)
    if "attn_drop_rate" in options:
        model.eval(), original.eval()
    ours = trained(model, images())
    mixes = {name: ours.pop(name) for name in list(ours) if "reatten_matrix" in name}
    assert len(mixes) == 4
    assert all(gradient.abs().max() > 0 for gradient in mixes.values())
    assert_same(ours, trained(original, images()))


def test_a_mix_that_starts_as_the_identity(vit):
    """Its states: those of the plain model load, and make it the identity again."""
    model, original = vit(), vit()
    plain = original.state_dict()
    state = torch.random.get_rng_state()
    report = vd.fuse(model, plain=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert report.swapped[0].notes == ("new parameters: reatten_matrix",)
    new = set(model.state_dict()) - set(plain)
    assert new == {f"blocks.{i}.attn.reatten_matrix.{part}" for i in (0, 1) for part in ("weight", "bias")}
    expected = original.eval()(images())
    mix = model.eval().blocks[1].attn.reatten_matrix
    nn.init.normal_(mix.weight), nn.init.normal_(mix.bias)
    saved = copy.deepcopy(model.state_dict())
    changed = model(images())
    assert (changed - expected).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"at blocks.1.attn: its mix is not the identity any more"):
        vd.unfuse(model)
    model.load_state_dict(plain)
    torch.testing.assert_close(model(images()), expected, rtol=1e-9, atol=1e-11)
    model.load_state_dict(saved)
    torch.testing.assert_close(model(images()), changed, rtol=1e-9, atol=1e-11)
    partial = {name: value for name, value in plain.items() if name.startswith("head.")}
    model.load_state_dict(partial, strict=False)
    torch.testing.assert_close(model(images()), changed, rtol=1e-9, atol=1e-11)
    model.blocks[1].attn.reset_parameters()
    assert len(vd.unfuse(model)) == 2
    assert set(model.state_dict()) == set(plain)


def test_a_new_mix_is_as_the_rest_of_its_attention(vit):
    model = vit().to(torch.bfloat16).eval()
    model.blocks[0].requires_grad_(False)
    report = vd.fuse(model, plain=True)
    assert report.swapped[0].notes == ("new parameters: reatten_matrix, frozen",)
    for block, needed in zip(model.blocks, (False, True), strict=True):
        mix = block.attn.reatten_matrix
        assert (mix.weight.requires_grad, mix.bias.requires_grad, mix.training) == (needed, needed, False)
        assert mix.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("assign", [False, True])
def test_a_new_mix_on_the_meta_device(assign, vit):
    model, original = vit().to("meta"), vit()
    with torch.inference_mode():
        vd.fuse(model, plain=True)
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(original.state_dict(), assign=assign)
    ours = trained(model, images())
    assert all(ours.pop(name).abs().max() > 0 for name in list(ours) if "reatten_matrix" in name)
    assert_same(ours, trained(original, images()))


def test_a_wrapped_model_gets_no_new_parameters(vit):
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = vit()
    with pytest.raises(ValueError, match="must not be wrapped in DistributedDataParallel when plain is True"):
        vd.fuse(wrapped, plain=True)


@pytest.mark.parametrize("name", ["deepvit", "cait"])
def test_vit_pytorch(name, vit_pytorch):
    module = pytest.importorskip(f"vit_pytorch.{name}")
    sizes = dict(image_size=16, patch_size=8, num_classes=3, dim=24, depth=2, heads=4, mlp_dim=24, dim_head=5)

    def make():
        torch.manual_seed(1)
        cls, more = (module.DeepViT, {}) if name == "deepvit" else (module.CaiT, {"cls_depth": 2})
        return spread(cls(**sizes, **more))

    model, original = make(), make()
    assert len(vd.fuse(model).swapped) == (2 if name == "deepvit" else 4)
    assert_same(trained(model, images()), trained(original, images()))
    original.load_state_dict(model.state_dict())
    assert len(vd.unfuse(model)) == (2 if name == "deepvit" else 4)


@pytest.mark.parametrize("options", [
    {}, {"kv_heads": 2}, {"one_kv_head": True}, {"num_mem_kv": 3}, {"qk_norm": True}, {"gate_values": True},
    {"rotary_pos_emb": True}, {"post_talking_heads": False}, {"pre_talking_heads": False},
], ids=str)  # fmt: skip
def test_x_transformers(options):
    package = pytest.importorskip("x_transformers")
    of_all = {name: value for name, value in options.items() if name == "rotary_pos_emb"}
    mixes = {"pre_talking_heads": True, "post_talking_heads": True}
    own = {f"attn_{name}": value for name, value in (mixes | options).items() if name not in of_all}

    def make():
        torch.manual_seed(1)
        layers = package.Encoder(dim=24, depth=2, heads=4, attn_dim_head=8, **own, **of_all)
        return spread(
            package.ViTransformerWrapper(image_size=16, patch_size=8, num_classes=3, attn_layers=layers)
        )

    model, original = make(), make()
    report = vd.fuse(model)
    assert len(report.swapped) == 2, report
    ours, theirs = trained(model, images()), trained(original, images())
    # its softmax is in float32, also of float64, unless qk_norm is on
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6 * value.abs().max().item() + 1e-6)
    original.load_state_dict(model.state_dict())
    assert len(vd.unfuse(model)) == 2


@pytest.mark.parametrize(("options", "why"), [
    ({"attn_pre_scale_post_talking_heads": True}, "pre_scale_post_talking_heads multiplies"),
    ({"attn_softclamp_logits": True}, "its option softclamp_logits is on"),
    ({"attn_sparse_topk": 2}, "another function than softmax"),
    ({"attn_laser": True, "attn_value_dim_head": 4}, "what would take its place failed"),
    ({"attn_data_dependent_alibi": True}, "what would take its place failed"),
    ({"alibi_pos_bias": True}, "a bias of positions"),
    ({"residual_attn": True}, "residual_attn"),
    ({"attn_pre_talking_heads": False}, "it has no talking heads"),
])  # fmt: skip
def test_what_is_left_of_x_transformers(options, why):
    package = pytest.importorskip("x_transformers")
    model = package.Encoder(dim=24, depth=1, heads=4, **{"attn_pre_talking_heads": True} | options)
    assert why in vd.fuse(model).left[0].why
