"""What is left as it is, and why; numbers of blocks; what a fused attention and `unfuse` refuse."""

import functools
import re
from dataclasses import replace

import numpy
import pytest
import stand_ins as foreign
import torch
import torch.nn.functional as F
from test_fuse import assert_same, made, tokens, trained
from torch import nn

import vitdiv_kernels as vd
from vitdiv_kernels import vit

pytestmark = pytest.mark.usefixtures("one_thread")


def hook(module, *_):
    return None


def first(model):
    return model.blocks[0].attn


def hooked(attn, name=""):
    attn.get_submodule(name).register_forward_hook(hook)


def subclass(model):
    cls = type(first(model))
    first(model).__class__ = type("Mine", (cls,), {"forward": lambda self, x: 2 * cls.forward(self, x)})


def change(cls, monkeypatch, factor=2.0):
    """The class as somebody patched it."""
    forward = cls.forward

    def patched(self, x, *args, **kwargs):
        out = forward(self, x, *args, **kwargs)
        return (factor * out[0], *out[1:]) if isinstance(out, tuple) else factor * out

    monkeypatch.setattr(cls, "forward", patched)


def replace_forward(model):
    first(model).forward = functools.partial(type(first(model)).forward, first(model))


def narrow_values(model):
    torch.manual_seed(4)
    first(model).to_v = nn.Linear(24, 6, bias=False, dtype=torch.float64)
    first(model).to_out = nn.Linear(12, 24, bias=False, dtype=torch.float64)


class Quantised(nn.Parameter):
    pass


# family, its options, what is done to the model, why it is left
LEFT = {
    "subclass": ("vit-pytorch DeepViT", {}, subclass, "Mine is a subclass, and what it changes is not known"),
    "forward": ("Gong", {}, replace_forward, "it has a forward of its own"),
    "compiled": ("Gong", {}, lambda model: first(model).compile(backend="eager"), "it has a _compiled"),
    "hook": ("Gong", {}, lambda model: hooked(first(model)), "it has the hook hook: remove it"),
    "state hook": (
        "DeepViT",
        {},
        lambda model: first(model).register_load_state_dict_post_hook(hook),
        "it has the hook hook: remove it",
    ),
    "sharded": (
        "vit-pytorch CaiT",
        {},
        lambda model: first(model).register_parameter("mix_heads_pre_attn", Quantised(torch.ones(4, 4))),
        "mix_heads_pre_attn is a Quantised: fuse before it is sharded or quantised",
    ),
    "part": ("DeepViT", {}, lambda model: delattr(first(model), "proj_drop"), "it has no proj_drop"),
    "cos_reg": ("DeepViT", {}, lambda model: setattr(model, "cos_reg", True), "the maps for cos_reg"),
    "norm of maps": (
        "DeepViT",
        {},
        lambda model: setattr(first(model), "var_norm", nn.GroupNorm(1, 4, dtype=torch.float64)),
        "var_norm must be a BatchNorm2d",
    ),
    "hook of the mix": (
        "Gong",
        {},
        lambda model: first(model).proj_pre.register_forward_hook(hook),
        "proj_pre must be without hooks on its output and gradients, got hook",
    ),
    "hook of the dropout": (
        "DeepViT", {}, lambda model: hooked(first(model), "attn_drop"), "attn_drop must be without"
    ),
    "hook of the softmax": (
        "vit-pytorch CaiT", {}, lambda model: hooked(first(model), "attend"), "attend must be without"
    ),
    "dropout after the mix": ("Gong", {"attn_drop": 0.1}, None, "its attn_drop is 0.1, a dropout after"),
    "scale_post": ("x-transformers", {"scale_post": True}, None, "pre_scale_post_talking_heads multiplies"),
    "no mix": ("x-transformers", {"pre": False, "post": False}, None, "it has no talking heads"),
    "causal": ("x-transformers", {"causal": True}, None, "its option causal is on"),
    "sigmoid": (
        "x-transformers",
        {},
        lambda model: setattr(first(model).attend, "attn_fn", F.sigmoid),
        "another function than softmax",
    ),
    "residual": (
        "x-transformers",
        {},
        lambda model: setattr(model, "residual_attn", True),
        "passes logits from layer to layer (residual_attn)",
    ),
    "positions": ("x-transformers", {}, lambda model: setattr(model, "rel_pos", 1), "a bias of positions"),
    "owner": (
        "x-transformers",
        {},
        narrow_values,
        "what would take its place failed in a trial call: ValueError: v must have shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_and_why(case):
    family, options, change_it, why = LEFT[case]
    models = [made(family, **options) for _ in range(2)]
    for each in models:
        if change_it is not None:
            change_it(each)
    model = models[0]
    parts = {name: type(module) for name, module in model.named_modules()}
    report = vd.fuse(model)
    assert why in report.left[0].why
    assert report.left[0].number == 0
    assert {name: type(m) for name, m in model.named_modules() if name.startswith("blocks.0")} == {
        name: kind for name, kind in parts.items() if name.startswith("blocks.0")
    }
    if case not in ("part", "sharded"):  # which can't be called
        results = []
        for each in models:
            torch.manual_seed(2)
            results.append(trained(each))
        assert_same(*results)


@pytest.mark.parametrize("family", ["DeepViT", "Gong", "vit-pytorch DeepViT", "vit-pytorch CaiT"])
@pytest.mark.parametrize("factor", [1.001, -1.0])
def test_another_forward_under_the_same_name(family, factor, monkeypatch):
    model = made(family)
    change(type(first(model)), monkeypatch, factor)
    report = vd.fuse(model)
    assert not report.swapped
    assert "outputs in training would not be those of its own forward" in report.left[0].why


def test_what_is_returned_beside_the_output():
    def gong(rest):
        return foreign.Model(lambda dim: foreign.GongAttention(dim, 4, rest=rest), pair=True)

    report = vd.fuse(gong((torch.ones(2),)))
    assert "it returns more than its output" in report.left[0].why
    model = gong((None, "text"))
    vd.fuse(model)
    assert model.blocks[0].attn(torch.randn(1, 2, 24))[1:] == (None, "text")


def test_the_report():
    model = nn.Sequential(
        made("DeepViT"), nn.TransformerEncoderLayer(24, 4), vd.nn.TalkingHeadsAttention(24, 4)
    )
    report = vd.fuse(model, blocks=[-2], backend="reference")
    assert str(report).splitlines() == [
        'fused 1 of 3 attentions, backend "reference"',
        "   1  0.blocks.1.attn: ReAttention of DeepViT; its maps are None",
        "left as they are:",
        "   0  0.blocks.0.attn: ReAttention of DeepViT; not among blocks",
        "   2  2: TalkingHeadsAttention; not among blocks",
        "      1.self_attn: MultiheadAttention; fuse does not know it",
    ]
    report = vd.fuse(model)
    assert [(swap.number, swap.names) for swap in report.swapped] == [(0, ("0.blocks.0.attn",))]
    assert [left.why for left in report.left if left.number is not None] == [
        "it is fused already, with backend 'reference': unfuse the model to change that",
        "it has this package's kernels by itself",
    ]


@pytest.mark.parametrize(("blocks", "swapped"), [
    ([0], [0]), ([-1, 4], [4]), (range(1, 4), [1, 2, 3]), (iter([2, 2]), [2]), (numpy.array([3]), [3]),
    ((torch.tensor(1),), [1]),
])  # fmt: skip
def test_numbers_of_blocks(blocks, swapped):
    report = vd.fuse(made("Gong", depth=5), blocks=blocks)
    assert [swap.number for swap in report.swapped] == swapped


@pytest.mark.parametrize(("options", "error", "sentence"), [
    ({"blocks": [5]}, ValueError, "blocks must be from -2 to 1 in this model, got 5"),
    ({"blocks": [-3]}, ValueError, "blocks must be from -2 to 1 in this model, got -3"),
    ({"blocks": []}, ValueError, "blocks must name at least one attention, got none"),
    ({"blocks": 1}, TypeError, "blocks must be numbers of attentions, such as [0, 1], got 1"),
    ({"blocks": "all"}, TypeError, "blocks must be numbers of attentions, such as [0, 1], got 'all'"),
    ({"blocks": [True]}, TypeError, "blocks must be numbers of attentions, got True among them"),
    ({"blocks": [0.0]}, TypeError, "blocks must be numbers of attentions, got 0.0 among them"),
    ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', "),
])  # fmt: skip
def test_wrong_arguments(options, error, sentence):
    model = made("Gong")
    with pytest.raises(error, match=re.escape(sentence)):
        vd.fuse(model, **options)
    assert vd.unfuse(model) == []


OURS = vit.ViTConfig(8, 1, patch=4, dim=24, depth=2, heads=4, class_blocks=1)


def test_our_own_vit():
    report = vd.fuse(vit.ViT(replace(OURS, reattention=[1])), plain=True)
    assert [(left.number, left.names, left.why.partition(":")[0]) for left in report.left] == [
        (0, ("blocks.1.attn",), "it has this package's kernels by itself"),
        (None, ("blocks.0.attn",), "it mixes no heads"),
        (None, ("blocks_token_only.0.attn",), "its class token alone attends"),
    ]


def test_models_that_are_refused():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        vd.fuse([made("Gong")])
    with pytest.raises(
        TypeError, match=r"model must have an attention that fuse knows, .*; it has no attention"
    ):
        vd.fuse(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"fuse knows, .*; its attentions are MultiheadAttention$"):
        vd.fuse(nn.TransformerEncoderLayer(24, 4))
    with pytest.raises(TypeError, match=r"Attention at blocks.0.attn: it mixes no heads: list its block in"):
        vd.fuse(vit.ViT(OURS), plain=True)
    attention = foreign.GongAttention(24, 4)
    with pytest.raises(ValueError, match="model must hold its attentions, got an attention: put it into"):
        vd.fuse(attention)
    model = nn.Sequential(attention)
    vd.fuse(model)
    with pytest.raises(ValueError, match="model must hold its attentions, got an attention: put it into"):
        vd.unfuse(model[0])
    wrapped = type("FullyShardedDataParallel", (nn.Sequential,), {})(made("Gong"))
    with pytest.raises(ValueError, match="model must not be wrapped for FSDP: fuse it first"):
        vd.fuse(wrapped)


def test_dropout_and_a_backend_without_it():
    report = vd.fuse(made("DeepViT", attn_drop=0.2), backend="native")
    assert "its attn_drop is 0.2, and only the reference has dropout of maps" in report.left[0].why
    assert not report.swapped
    report = vd.fuse(made("DeepViT without mix", attn_drop=0.2), backend="native")
    assert len(report.swapped) == 2


# family, what is done to its first fused attention, the error at the next call
LATER = {
    "dropout, hook": ("DeepViT", lambda attn: hooked(attn, "attn_drop"), "attn_drop must be without hooks"),
    "dropout, mode": (
        "DeepViT",
        lambda attn: (setattr(attn.attn_drop, "p", 0.5), attn.attn_drop.eval()),
        "attn_drop.training must be that of its attention, True",
    ),
    "dropout after the mix": ("Gong", lambda attn: setattr(attn.attn_drop, "p", 0.3), "attn_drop must be 0"),
    "mix, hook": ("Gong", lambda attn: hooked(attn, "proj_post"), "proj_post must be without hooks"),
    "norm, hook": (
        "vit-pytorch DeepViT",
        lambda attn: attn.reattn_norm[1].register_forward_hook(hook),
        "reattn_norm must be without hooks, got hook: a fused attention never calls it",
    ),
    "norm": (
        "vit-pytorch DeepViT",
        lambda attn: setattr(attn, "reattn_norm", nn.GroupNorm(1, 4)),
        "reattn_norm must hold a LayerNorm",
    ),
    "softmax, hook": (
        "vit-pytorch CaiT",
        lambda attn: attn.attend.register_forward_pre_hook(hook),
        "attend must be without hooks",
    ),
    "core, hook": (
        "x-transformers",
        lambda attn: attn.attend.pre_softmax_talking_heads.register_forward_hook(hook),
        "pre_softmax_talking_heads must be without hooks .* or unfuse the model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LATER)
def test_changes_that_would_not_be_seen_raise(case):
    family, change_it, sentence = LATER[case]
    model = made(family)
    vd.fuse(model)
    change_it(first(model))
    with pytest.raises((TypeError, ValueError), match=sentence):
        model(tokens())


@pytest.mark.parametrize("options", [
    {"mask": torch.ones(3, 7, dtype=torch.bool)}, {"attn_bias": torch.ones(7, 7)},
    {"prev_attn": torch.ones(3, 4, 7, 7)},
])  # fmt: skip
def test_masks_and_biases_raise(options):
    model = made("x-transformers")
    vd.fuse(model)
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be None: fused talking heads mix maps over all keys"):
        first(model)(tokens(), **options)


def test_unfuse_refuses_and_changes_nothing():
    model = made("Gong")
    vd.fuse(model)
    handle = model.blocks[1].attn.register_forward_hook(hook)
    with pytest.raises(
        ValueError, match=r"can't be unfused at blocks.1.attn: it has the hook hook: remove it"
    ):
        vd.unfuse(model)
    assert all(isinstance(block.attn, vd.nn.TalkingHeadsAttention) for block in model.blocks)
    handle.remove()
    model.blocks[1].attn.adapter = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"at blocks.1.attn: its adapter is new, and the original has none"):
        vd.unfuse(model)
    del model.blocks[1].attn.adapter
    model.blocks[1].attn.__class__ = type("Sharded", (type(model.blocks[1].attn),), {})
    with pytest.raises(
        ValueError, match=r"at blocks.1.attn: its class was changed to Sharded: undo that first"
    ):
        vd.unfuse(model)
