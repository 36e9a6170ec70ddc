"""Initial values, options as a class, and what timm and torch.fx make of the attentions."""

import copy
import io
import pickle

import published
import pytest
import torch
from torch import nn

import vitdiv_kernels as vd
from vitdiv_kernels.nn import ReAttention, TalkingHeadsAttention

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_initial(attn, gain=0.05):
    """The mix is I plus noise of 0.1 without bias, the norm weak and without statistics."""
    noise = attn.reatten_matrix.weight[:, :, 0, 0] - torch.eye(8)
    assert 0.06 < noise.std() < 0.14
    assert noise.mean().abs() < 0.06
    assert attn.reatten_matrix.bias.eq(0).all()
    assert attn.var_norm.weight.eq(gain).all()
    assert attn.var_norm.bias.eq(0).all()
    if attn.map_norm == "batch":
        assert attn.var_norm.running_mean.eq(0).all()
        assert attn.var_norm.running_var.eq(1).all()


def spoil(module):
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(7)


@pytest.mark.parametrize("order", ["parents first", "children first", "the attention alone"])
@pytest.mark.parametrize(("norm", "gain"), [("batch", None), ("layer", 0.3)])
def test_initial_values_come_again(order, norm, gain):
    with torch.device("meta"):
        attn = ReAttention(64, 8, norm=norm, norm_gain=gain, qk_norm=True, norm_layer=nn.LayerNorm)
    attn.to_empty(device="cpu")
    spoil(attn)
    modules = [module for module in attn.modules() if hasattr(module, "reset_parameters")]
    assert modules[0] is attn
    for module in {"parents first": modules, "children first": modules[::-1]}.get(order, [attn]):
        module.reset_parameters()
    assert_initial(attn, 0.05 if gain is None else gain)
    assert attn.qkv.weight.abs().max() <= 64**-0.5
    assert attn.q_norm.weight.eq(1).all()


def test_initial_values_of_the_published_and_of_talking_heads_come_again():
    published_init = ReAttention(64, 8, mix_init="conv")
    talking = TalkingHeadsAttention(64, 8, qkv_bias=True)
    for attn, mixes in ((published_init, ["reatten_matrix"]), (talking, ["proj_l", "proj_w"])):
        spoil(attn)
        attn.reset_parameters()
        for name in mixes:
            assert 0 < getattr(attn, name).weight.abs().max() <= 8**-0.5
    assert published_init.var_norm.weight.eq(1).all()


@pytest.fixture
def vit(torchvision):
    """Makes a small timm ViT."""
    make = pytest.importorskip("timm.models.vision_transformer").VisionTransformer
    sizes = dict(img_size=16, patch_size=8, embed_dim=64, depth=2, num_heads=8, num_classes=5)
    return lambda **options: make(**sizes | options)


@pytest.mark.parametrize("mode", ["", "jax", "moco", "reset", "skip"])
def test_timms_initialisation_leaves_the_mix(mode, vit):
    model = vit(attn_layer=ReAttention, weight_init=mode)
    assert_initial(model.blocks[1].attn)
    if mode != "skip":
        spoil(model.blocks)
        model.init_weights(mode, needs_reset=True)
        assert_initial(model.blocks[1].attn)
    weight = model.blocks[1].attn.qkv.weight
    bound = {"jax": (6 / 256) ** 0.5, "moco": (6 / 128) ** 0.5, "reset": 1 / 8, "skip": 1 / 8}.get(mode)
    if bound is None:  # a normal distribution
        assert 0.018 < weight.std() < 0.022
    else:
        assert 0.95 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize(("attn_layer", "options"), [
    (ReAttention, {}),
    (ReAttention.with_options(norm="layer", count_recomputed=False), {}),
    (TalkingHeadsAttention, {}),
    (TalkingHeadsAttention.with_options(backend="reference"), {}),
    (TalkingHeadsAttention, {"qk_norm": True, "scale_attn_norm": True, "proj_bias": False}),
])  # fmt: skip
def test_as_timms_attention(attn_layer, options, vit):
    model = vit(attn_layer=attn_layer, **options)
    attn, x = model.blocks[1].attn, torch.randn(2, 5, 64)
    assert type(attn) is attn_layer
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in attn.parameters())
    if not options:
        attn.eval()
        torch.testing.assert_close(attn(x), published.called_on_maps(attn, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", [ReAttention, TalkingHeadsAttention])
def test_gate_and_norm_of_the_output(cls):
    """Those of timm's Attention, around the same maps."""
    attn = cls(24, 4, scale_norm=True, gated=True, norm_layer=nn.LayerNorm).eval()
    plain, x = copy.deepcopy(attn), torch.randn(2, 5, 24)
    plain.norm, plain.gate, plain.proj = nn.Identity(), None, nn.Identity()
    expected = attn.proj(attn.norm(plain(x)) * torch.sigmoid(attn.gate(x)))
    torch.testing.assert_close(attn(x), expected)


def test_options_as_a_class():
    cls = ReAttention.with_options(norm="layer", eps=0.1)
    assert cls.__name__ == "ReAttention[eps=0.1, norm='layer']"
    assert cls is ReAttention.with_options(eps=0.1, norm="layer")
    assert issubclass(cls, ReAttention)
    attn = cls(24, 4, norm="batch")  # the options hold whatever is given
    assert attn.map_norm == "layer"
    assert attn.var_norm.eps == 0.1
    more = cls.with_options(qkv_bias=True)(24, 4)
    assert more.map_norm == "layer"
    assert more.qkv.bias is not None
    with pytest.raises(TypeError, match=r"ReAttention has no option 'nrom'; its options are .*norm"):
        ReAttention.with_options(nrom="layer")
    with pytest.raises(TypeError, match="ReAttention has no option 'dim'; its options are"):
        ReAttention.with_options(dim=3)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Named(ReAttention.with_options(norm="none")):
    """A subclass, found by its name."""


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), saved_and_loaded])
@pytest.mark.parametrize("cls", [ReAttention.with_options(norm="layer"), Named])
def test_classes_of_options_are_copied_and_pickled(cls, again):
    assert again(cls) is cls
    model = nn.Sequential(cls(24, 4))
    other, x = again(model), torch.randn(2, 5, 24)
    assert type(other[0]) is cls
    assert torch.equal(other(x), model(x))


def test_a_class_of_options_is_made_in_a_process_that_has_not_made_it():
    cls = TalkingHeadsAttention.with_options(proj_bias=False)
    text = pickle.dumps(cls)
    vd.nn._attention._with_options.cache_clear()
    assert pickle.loads(text)(24, 4).proj.bias is None


class Model(nn.Module):
    def __init__(self, attn):
        super().__init__()
        self.attn = attn

    def forward(self, x, attn_mask=None):
        return 2 * self.attn(x, attn_mask=attn_mask)


@pytest.mark.parametrize("cls", [ReAttention, TalkingHeadsAttention])
def test_fx_takes_an_attention_whole(cls):
    model, x = Model(cls(24, 4)).eval(), torch.randn(2, 5, 24)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x))
    x.requires_grad_()
    copy.deepcopy(traced)(x).sum().backward()
    gradient, x.grad = x.grad, None
    model(x).sum().backward()
    torch.testing.assert_close(gradient, x.grad)
    with pytest.raises(ValueError, match=f"attn_mask must be None and is_causal False: {cls.__name__} mixes"):
        traced(x, torch.ones(5, 5))
    with pytest.raises(TypeError, match=f"torch.fx takes {cls.__name__} whole: trace a module that holds it"):
        torch.fx.symbolic_trace(model.attn)


@pytest.mark.parametrize("maker", ["torchvision", "timm"])
def test_feature_extraction(maker, vit, torchvision):
    model, images = vit(attn_layer=ReAttention).eval(), torch.randn(2, 3, 16, 16)
    if maker == "timm":
        create = pytest.importorskip("timm.models").create_feature_extractor
    else:
        create = pytest.importorskip("torchvision.models.feature_extraction").create_feature_extractor
    kept = {}
    model.blocks[0].attn.register_forward_hook(lambda module, inputs, out: kept.update(attn=out))
    with torch.no_grad():
        expected = {"head": model(images), "blocks.0.attn": kept["attn"]}
        features = create(model, list(expected))(images)
    torch.testing.assert_close(features, expected)


def test_timms_graph_of_features(vit):
    graphs = pytest.importorskip("timm.models._features_fx")
    model, images, expected = vit(attn_layer=ReAttention).eval(), torch.randn(2, 3, 16, 16), []
    model.feature_info = [dict(num_chs=64, reduction=8, module=f"blocks.{i}") for i in range(2)]
    features = graphs.FeatureGraphNet(model, out_indices=(0, 1))(images)
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, out: expected.append(out))
    model(images)
    torch.testing.assert_close(features, expected)
