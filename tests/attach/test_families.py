"""Objective and monitor on models of other packages: tokens, maps and weights against plain computations."""

import copy
import importlib
import itertools
import math
import pickle

import foreign_models as foreign
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitdiv_kernels import AttentionNames, CollapseMonitor, DiversityObjective, ModelParts, Term, losses
from vitdiv_kernels.attach import monitor
from vitdiv_kernels.nn import ReAttention

LABELS = torch.tensor([0, 1]), torch.tensor([1, 0])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def parts_of(config, model, x, parts=None, mixing=None, **options):
    with DiversityObjective(config, **options).attach(model, parts) as objective:
        model(x)
        return objective(mixing=mixing)[1]


def real(package, name):
    """A class of a package that is installed, or skips."""
    return getattr(pytest.importorskip(package), name)


VIT = dict(image_size=16, patch_size=4, num_classes=5, dim=24, depth=3, heads=2, dim_head=8, mlp_dim=24)
VIT_PYTORCH = {
    "like vit": lambda: foreign.VitPytorch("vit"),
    "like vit, no class token": lambda: foreign.VitPytorch("vit", prefix=0),
    "like deepvit": lambda: foreign.VitPytorch("deepvit"),
    "like cait": lambda: foreign.VitPytorch("cait"),
    "vit": lambda: real("vit_pytorch.vit", "ViT")(**VIT),
    "vit, mean": lambda: real("vit_pytorch.vit", "ViT")(**VIT, pool="mean"),
    "simple_vit": lambda: real("vit_pytorch.simple_vit", "SimpleViT")(**VIT),
    "deepvit": lambda: real("vit_pytorch.deepvit", "DeepViT")(**VIT),
    "cait": lambda: real("vit_pytorch.cait", "CaiT")(**VIT, cls_depth=1),
}


def layered_tokens(model, x):
    """The tokens that enter the layers of vit-pytorch, and those that leave the last, layer by layer."""
    body = getattr(model, "patch_transformer", None) or model.transformer
    tokens = []
    handle = body.register_forward_pre_hook(lambda module, args: tokens.append(args[0]))
    model(x)
    handle.remove()
    for attn, ff in body.layers:
        z = attn(tokens[-1]) + tokens[-1]
        tokens.append(ff(z) + z)
    return tokens


def layered_maps(model, tokens, kind):
    """Softmax maps and the maps applied, of each layer, by the formulas of vit-pytorch."""
    found = []
    body = getattr(model, "patch_transformer", None) or model.transformer
    for (attn, _), x in zip(body.layers, tokens, strict=False):
        attn = getattr(attn, "fn", attn)
        x = attn.norm(x)
        packed = torch.cat([attn.to_q(x), attn.to_kv(x)], -1) if kind == "cait" else attn.to_qkv(x)
        q, k, _ = foreign.split(packed, attn.heads)
        logits = attn.scale * q @ k.mT
        if kind == "cait":
            maps = torch.einsum("bhij,hg->bgij", logits, attn.mix_heads_pre_attn).softmax(-1)
            found.append((maps, torch.einsum("bhij,hg->bgij", maps, attn.mix_heads_post_attn)))
        else:
            found.append((logits.softmax(-1),) * 2)
    return found


def diversity(maps):
    """The mean cosine of all pairs of heads, also of a head with itself."""
    unit = F.normalize(maps.flatten(2), dim=-1)
    return (unit @ unit.mT).mean()


def neighbours(maps):
    cosines = [F.cosine_similarity(a, b, dim=1).mean() for a, b in itertools.pairwise(maps)]
    return sum(cosines) / len(cosines)


@pytest.mark.parametrize("name", VIT_PYTORCH)
def test_vit_pytorch(name, torchvision):
    model, x = VIT_PYTORCH[name]().eval(), foreign.images()
    tokens = layered_tokens(model, x)
    prefix = tokens[0].shape[1] - 16
    assert prefix == (0 if any(word in name for word in ("cait", "no class", "mean", "simple")) else 1)
    patches = [t[:, prefix:] for t in tokens]
    kind = name.removeprefix("like ").partition(",")[0]
    config = {
        "first": Term("koleo", layers=[0]),
        "last": Term("koleo"),
        "contrast": Term("patch_contrast", layers=("embeddings", -1)),
        "heads": Term("attention_diversity", layers=[1]),
        "weight_soft_orthogonality": 1.0,
        "neighbours": Term("neighbourhood_contrast", options={"grid": (4, 4)}),
        "patch_mixing": 1.0,
    }
    if kind != "deepvit":
        config["cos_reg"] = 1.0
    mixing = (*LABELS, torch.rand(16))
    got = parts_of(config, model, x, mixing=mixing)
    torch.testing.assert_close(got["first"], losses.koleo(patches[1]))
    torch.testing.assert_close(got["last"], losses.koleo(patches[3]))
    torch.testing.assert_close(got["contrast"], losses.patch_contrast(patches[0], patches[3]))
    maps = layered_maps(model, tokens, kind)
    torch.testing.assert_close(got["heads"], diversity(maps[1][0]))
    if kind != "deepvit":
        torch.testing.assert_close(got["cos_reg"], neighbours([mixed for _, mixed in maps]))
    body = getattr(model, "patch_transformer", None) or model.transformer
    attentions = [getattr(attn, "fn", attn) for attn, _ in body.layers]
    weights = [
        torch.cat([a.to_q.weight, a.to_kv.weight]) if kind == "cait" else a.to_qkv.weight for a in attentions
    ]
    expected = losses.weight_soft_orthogonality([w.unflatten(0, (3, -1)) for w in weights])
    torch.testing.assert_close(got["weight_soft_orthogonality"], expected)
    norm, head = getattr(body, "norm", None), getattr(model, "linear_head", None) or model.mlp_head
    normed, head = (norm(patches[3]), head) if norm is not None else (head[0](patches[3]), head[1])
    torch.testing.assert_close(got["patch_mixing"], losses.patch_mixing(head(normed), *mixing))
    near = losses.neighbourhood_contrast(normed, model.to_patch_embedding(x), grid=(4, 4))
    torch.testing.assert_close(got["neighbours"], near)


@pytest.mark.parametrize("kind", ["vit", "deepvit", "cait"])
def test_vit_pytorch_is_measured(kind):
    model, x = foreign.VitPytorch(kind), foreign.images()
    if kind == "deepvit":
        with pytest.raises(TypeError, match=r"are no fixed mix \(Sequential\).* unless mixed is False"):
            CollapseMonitor(model).measure(x)
    tokens = layered_tokens(model, x)
    prefix = tokens[0].shape[1] - 16
    records = CollapseMonitor(model, mixed=kind != "deepvit").measure(x)
    maps = layered_maps(model, tokens, kind)
    for i, record in enumerate(records):
        softmax, mixed = maps[i]
        entropy = torch.special.entr(softmax).sum(-1).mean().item()
        assert record["attention_entropy"] == pytest.approx(entropy, rel=1e-5)
        assert record["head_cosine"] == pytest.approx(2 * diversity(softmax).item() - 1, abs=1e-5)
        assert record["residual"] == pytest.approx(
            monitor.residual(tokens[i + 1][:, prefix:]).item(), rel=1e-5
        )
        likeness = [
            F.cosine_similarity(other.flatten(2), mixed.flatten(2), dim=-1).mean() for _, other in maps
        ]
        torch.testing.assert_close(torch.tensor(record["attention_cosine"]), torch.stack(likeness))


def test_vit_pytorch_that_drops_layers_is_refused():
    model = foreign.VitPytorch("cait")
    model.patch_transformer.layer_dropout = 0.1
    with pytest.raises(TypeError, match=r"layer_dropout must be 0, got 0.1: layers dropped"):
        DiversityObjective({"koleo": 1}).attach(model)


@pytest.mark.parametrize("change", ["another module", "triples", "other layers"])
def test_what_only_looks_like_vit_pytorch_is_refused(change):
    """Of registers behind the patches, or streams beside the tokens, nothing is guessed."""
    model = foreign.VitPytorch("vit")
    if change == "another module":
        model.transformer.streams = nn.Linear(2, 2)
    elif change == "triples":
        model.transformer.layers[0].append(nn.Identity())
    else:
        model.transformer.layers[0][0] = nn.Identity()
    with pytest.raises(TypeError, match=r"VitPytorch is none: give parts, a vitdiv_kernels.ModelParts"):
        DiversityObjective({"koleo": 1}).attach(model)


@pytest.mark.parametrize("number", [1, 4])
def test_registers_behind_the_patches_are_not_taken_for_prefix_tokens(number):
    """vit-pytorch's SimpleViT with registers has them there, and no class token."""
    model = foreign.VitPytorch("vit", prefix=number)
    model.registers = model._parameters.pop("cls_token")
    model.forward = lambda x: model.transformer(
        torch.cat([model.to_patch_embedding(x), model.registers.expand(len(x), -1, -1)], 1)
    )
    sentence = (
        rf"gives {16 + number} tokens where model.patch_embed made 16 .* has 0 prefix tokens by parts.num"
    )
    with pytest.raises(ValueError, match=sentence):
        parts_of({"koleo": 1.0}, model, foreign.images())


class Turned(foreign.Attend):
    def forward(self, x, polar=None):
        return super().forward(x)


@pytest.mark.parametrize("change", ["scale", "argument"])
def test_maps_of_attentions_of_another_kind_are_refused(change):
    """vit-pytorch's attentions with norms of q and k have no scale; others turn q and k by an argument."""
    model = foreign.VitPytorch("vit")
    for attn, _ in model.transformer.layers:
        if change == "scale":
            del attn.scale
        else:
            attn.__class__ = Turned
    sentence = "or to_qkv, heads and scale: give" if change == "scale" else "its softmax, by polar: "
    with pytest.raises(TypeError, match=sentence):
        DiversityObjective({"head_mhs": 1.0}).attach(model)


def test_a_list_of_several_batches_has_no_maps():
    """DINOv2 calls its blocks so, with tokens of crops of several sizes side by side."""

    class Nested(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.attn = block.attn

        def forward(self, x):
            tokens = torch.cat([each.flatten(0, 1) for each in x])[None]
            self.attn(tokens)
            return x

    model = foreign.Released("gong")
    model.blocks = nn.ModuleList([Nested(block) for block in model.blocks])
    with DiversityObjective({"head_mhs": 1.0}).attach(model) as objective:
        model.blocks[0]([torch.randn(2, 17, 24), torch.randn(2, 5, 24)])
        with pytest.raises(ValueError, match="blocks were called with a list of several tensors"):
            objective()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["gong", "deepvit"])
def test_the_released_models_whose_blocks_give_tuples(kind, training):
    model, x = foreign.Released(kind).train(training), foreign.images()
    found = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: found.append(out[0][:, 1:]))
    config = {
        "contrast": Term("patch_contrast", layers=(1, 2)),
        "heads": Term("attention_diversity", layers=[1]),
        "cos_reg": 1.0,
    }
    with DiversityObjective(config).attach(model) as objective:
        model(x)
        total, parts = objective()
    attentions = [block.attn for block in model.blocks]
    torch.testing.assert_close(parts["contrast"], losses.patch_contrast(found[1], found[2]))
    torch.testing.assert_close(parts["heads"], diversity(attentions[1].maps))
    mixed = [attn.mixed for attn in attentions]
    torch.testing.assert_close(parts["cos_reg"], neighbours(mixed), rtol=1e-4, atol=1e-5)
    expected = losses.patch_contrast(found[1], found[2]) + diversity(attentions[1].maps) + neighbours(mixed)
    parameters = [p for attn in attentions for p in attn.parameters()]
    wanted = torch.autograd.grad(expected, parameters, retain_graph=True, allow_unused=True)
    for got, want in zip(torch.autograd.grad(total, parameters, allow_unused=True), wanted, strict=True):
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
        else:
            assert got is None or got.abs().max() < 1e-6
    found.clear()
    records = CollapseMonitor(model).measure(x)
    assert records[2]["residual"] == pytest.approx(monitor.residual(found[2]).item(), rel=1e-5)
    entropy = torch.special.entr(attentions[2].maps).sum(-1).mean().item()
    assert records[2]["attention_entropy"] == pytest.approx(entropy, rel=1e-5)


def test_pairs_of_tokens_are_refused():
    model = foreign.Released("gong")
    model.blocks[2].register_forward_hook(lambda module, args, out: (out[0], out[0]))
    with pytest.raises(TypeError, match=r"blocks\[2\] must give tokens \[B, N, D\], or a tuple of which the"):
        parts_of({"koleo": 1.0}, model, foreign.images())


def timm_model(module, name, **options):
    size = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5)
    return getattr(pytest.importorskip(f"timm.models.{module}"), name)(**(size | options)).eval()


def test_maps_of_timm_cait_are_those_of_its_talking_heads(torchvision):
    """The class token joins in its last blocks, which have no patches of their own."""
    model, x = timm_model("cait", "Cait", depth=3), torch.randn(2, 3, 32, 32)
    for block in model.blocks:
        for mix in (block.attn.proj_l, block.attn.proj_w):
            nn.init.normal_(mix.weight)
            nn.init.normal_(mix.bias)
    maps, mixed = [], []
    for block in model.blocks:
        block.attn.proj_w.register_forward_hook(lambda module, args, out: maps.append(args[0].movedim(-1, 1)))
        block.attn.attn_drop.register_forward_hook(lambda module, args, out: mixed.append(out))
    model(x)
    expected = {"heads": diversity(maps[0]), "cos_reg": neighbours(mixed)}
    entropy = torch.special.entr(maps[1]).sum(-1).mean().item()
    copied = timm_model("cait", "Cait", depth=3)
    copied.load_state_dict(model.state_dict())
    got = parts_of({"heads": Term("attention_diversity"), "cos_reg": 1.0}, copied, x)
    torch.testing.assert_close(got, expected)
    record = CollapseMonitor(copied).measure(x)[1]
    assert record["attention_entropy"] == pytest.approx(entropy, rel=1e-5)
    mixed = [each.flatten(2) for each in mixed[:3]]
    likeness = torch.stack([F.cosine_similarity(each, mixed[1], dim=-1).mean() for each in mixed])
    torch.testing.assert_close(torch.tensor(record["attention_cosine"]), likeness)


SWIN = dict(
    img_size=16, patch_size=2, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4, num_classes=5
)


def swin(version="swin_transformer", name="SwinTransformer", **options):
    module = pytest.importorskip(f"timm.models.{version}")
    return getattr(module, name)(**(SWIN | options)).eval()


def whole_map_block(block, x):
    """A block of Swin v1 without windows: [B, rows, columns, D], attention over the whole map where only
    tokens of one window see one another, in their places."""
    _, rows, columns, _ = x.shape
    (win, _), (shift, _) = block.window_size, block.shift_size
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    # where a token is in the shifted map, and whether the shift moved it around the edge
    place = torch.stack([(row - shift) % rows, (column - shift) % columns], -1).flatten(0, 1)
    around = torch.stack([row < shift, column < shift], -1).flatten(0, 1)
    same = ((place[:, None] // win == place // win) & (around[:, None] == around)).all(-1)
    offset = place[:, None] - place + win - 1
    index = (offset[..., 0] * (2 * win - 1) + offset[..., 1]).where(same, 0)
    attn = block.attn
    q, k, v = foreign.split(attn.qkv(block.norm1(x).flatten(1, 2)), attn.num_heads)
    logits = attn.scale * q @ k.mT + attn.relative_position_bias_table[index].movedim(-1, 0)
    maps = logits.masked_fill(~same, -math.inf).softmax(-1)
    x = x.flatten(1, 2) + attn.proj((maps @ v).transpose(1, 2).flatten(2))
    return (x + block.mlp(block.norm2(x))).unflatten(1, (rows, columns))


def swin_tokens(model, x):
    """What enters the first block and what leaves each, as [B, N, D], of maps that are never cut."""
    x = model.patch_embed(x)
    tokens = [x.flatten(1, 2)]
    for stage in model.layers:
        x = stage.downsample(x)
        for block in stage.blocks:
            x = whole_map_block(block, x)
            tokens.append(x.flatten(1, 2))
    return tokens


def test_swin_is_taken_by_whole_maps_in_their_places(torchvision):
    model, x = swin(), torch.randn(2, 3, 16, 16)
    assert model.layers[0].blocks[1].shift_size == (2, 2)
    for stage in model.layers:
        for block in stage.blocks:
            nn.init.normal_(block.attn.relative_position_bias_table)
    tokens = swin_tokens(model, x)
    config = {
        "contrast": Term("patch_contrast", layers=("embeddings", 1)),
        "second": Term("patch_contrast", layers=(2, 3)),
        "cosine": Term("pairwise_cosine", layers="all"),
        "weight_mhs": 1.0,
        "patch_mixing": 1.0,
    }
    mixing = (*LABELS, torch.rand(16))
    got = parts_of(config, model, x, mixing=mixing)
    torch.testing.assert_close(got["contrast"], losses.patch_contrast(tokens[0], tokens[2]))
    torch.testing.assert_close(got["second"], losses.patch_contrast(tokens[3], tokens[4]))
    torch.testing.assert_close(
        got["cosine"], sum(losses.pairwise_cosine(t) for t in tokens[1:]) / len(tokens[1:])
    )
    blocks = [block for stage in model.layers for block in stage.blocks]
    weights = [block.attn.qkv.weight.unflatten(0, (3, -1)) for block in blocks]
    torch.testing.assert_close(got["weight_mhs"], losses.weight_mhs(weights))
    logits = model.head.fc(model.norm(tokens[4]))
    torch.testing.assert_close(got["patch_mixing"], losses.patch_mixing(logits, *mixing))
    watch = CollapseMonitor(model, maps=False)
    for record, t in zip(watch.measure(x), tokens[1:], strict=True):
        assert record["patch_cosine"] == pytest.approx(
            losses.pairwise_cosine(t, penalty="signed").item(), abs=1e-5
        )
        assert math.isnan(record["head_cosine"])
        assert len(record["attention_cosine"]) == 4


def test_a_swin_of_one_stage_tells_its_grid(torchvision):
    model, x = swin(depths=(2,), num_heads=(1,)), torch.randn(2, 3, 16, 16)
    last = model.norm(swin_tokens(model, x)[-1])
    expected = losses.neighbourhood_contrast(last, model.patch_embed(x).flatten(1, 2), grid=(8, 8))
    got = parts_of({"neighbourhood_contrast": 1.0}, model, x)
    torch.testing.assert_close(got["neighbourhood_contrast"], expected)


def test_what_swin_has_not_gets_a_sentence(torchvision, tmp_path):
    model, x = swin(), torch.randn(2, 3, 16, 16)
    with pytest.raises(
        ValueError, match=r"but layers\[0\].blocks\[0\] has \[2, 64, 8\] and layers\[1\].*one s"
    ):
        parts_of({"patch_contrast": 1.0}, model, x)
    sentence = (
        r"must have the patches that model.patch_embed makes, \[2, 64, 8\], but layers\[1\].blocks\[1\]"
    )
    with pytest.raises(ValueError, match=sentence):
        parts_of({"near": Term("neighbourhood_contrast", options={"grid": (4, 4)})}, model, x)
    sentence = r"layers\[0\].blocks\[0\].attn, WindowAttention, .* by mask, relative_.*_table: .*maps=False"
    with pytest.raises(TypeError, match=sentence):
        CollapseMonitor(model)
    with pytest.raises(TypeError, match=sentence):
        DiversityObjective("deepvit_cos_reg").attach(model)
    path = tmp_path / "collapse.csv"
    watch = CollapseMonitor(model, maps=False, csv=path)
    watch.measure(x)
    assert [r["residual"] for r in monitor.read_records(path)] == [r["residual"] for r in watch.records]


def test_swin_v2_and_that_of_its_authors(torchvision):
    model, x = swin("swin_transformer_v2", "SwinTransformerV2"), torch.randn(2, 3, 16, 16)
    found = []
    model.layers[1].blocks[1].register_forward_hook(lambda module, args, out: found.append(out))
    got = parts_of({"koleo": 1.0}, model, x)["koleo"]
    torch.testing.assert_close(got, losses.koleo(found[0].flatten(1, 2)))
    model, x, found = foreign.AuthorsSwin(), foreign.images(), []
    model.layers[1].blocks[1].register_forward_hook(lambda module, args, out: found.append(out))
    got = parts_of({"koleo": 1.0, "weight_mhs": 1.0}, model, x)
    assert found[0].shape == (2, 4, 16)
    torch.testing.assert_close(got["koleo"], losses.koleo(found[0]))


def test_registers_of_timm(torchvision):
    """DINOv2 with registers is timm's VisionTransformer, DINOv3 its Eva, whose attention rotates q and k."""
    x = torch.randn(2, 3, 32, 32)
    plain = timm_model("vision_transformer", "VisionTransformer", reg_tokens=4, no_embed_class=True)
    rotary = timm_model(
        "eva", "Eva", num_reg_tokens=4, use_rot_pos_emb=True, use_abs_pos_emb=False, rope_type="dinov3"
    )
    for model in (plain, rotary):
        found = []
        model.blocks[1].register_forward_hook(lambda module, args, out, found=found: found.append(out))
        got = parts_of({"koleo": 1.0}, model, x)["koleo"]
        assert found[0].shape[1] == 21
        torch.testing.assert_close(got, losses.koleo(found[0][:, 5:]))
    with pytest.raises(TypeError, match=r"EvaAttention, .* by rope, .*maps=False measures the patches alone"):
        CollapseMonitor(rotary)
    record = CollapseMonitor(rotary, maps=False).measure(x)[-1]
    assert record["residual"] == pytest.approx(monitor.residual(found[0][:, 5:]).item(), rel=1e-5)


def test_attention_of_convit_and_xcit(torchvision):
    """ConViT's gated blocks have no qkv, its others are plain; XCiT attends over channels."""
    model, x = timm_model("convit", "ConVit", local_up_to_layer=1), torch.randn(2, 3, 32, 32)
    with pytest.raises(TypeError, match=r"blocks\[0\].attn must have qkv"):
        DiversityObjective({"heads": Term("attention_diversity", layers=[0])}).attach(model)
    found = []
    model.blocks[1].attn.attn_drop.register_forward_hook(lambda module, args, out: found.append(out))
    got = parts_of({"heads": Term("attention_diversity", layers=[1])}, model, x)
    torch.testing.assert_close(got["heads"], diversity(found[0]))
    model, found = timm_model("xcit", "Xcit"), []
    model.blocks[1].register_forward_hook(lambda module, args, out: found.append(out))
    with pytest.raises(TypeError, match=r"XCA, .* by temperature: .*maps=False"):
        CollapseMonitor(model)
    record = CollapseMonitor(model, maps=False).measure(x)[1]
    assert record["residual"] == pytest.approx(monitor.residual(found[0]).item(), rel=1e-5)


@pytest.mark.parametrize("key_only", [False, True])
def test_padding_of_naflexvit_is_refused(key_only, torchvision):
    naflex = pytest.importorskip("timm.models.naflexvit")
    config = naflex.NaFlexVitCfg(
        patch_size=8, embed_dim=24, depth=2, num_heads=4, pos_embed_grid_size=(4, 4),
        use_key_only_attn_mask=key_only, reg_tokens=2,
    )  # fmt: skip
    model, x = naflex.NaFlexVit(config, num_classes=5).eval(), torch.randn(2, 3, 32, 32)
    found = []
    model.blocks[1].register_forward_hook(lambda module, args, out: found.append(out))
    got = parts_of({"koleo": 1.0}, model, x)["koleo"]
    torch.testing.assert_close(got, losses.koleo(found[0][:, model.num_prefix_tokens :]))
    coord = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).view(1, 16, 2)
    padded = {
        "patches": torch.randn(2, 16, 192),
        "patch_coord": coord.expand(2, -1, -1),
        "patch_valid": torch.arange(16) < torch.tensor([[16], [12]]),
    }
    with pytest.raises(ValueError, match="tokens are padded"):
        parts_of({"koleo": 1.0}, model, padded)


def test_a_model_that_is_not_known_is_taken_by_its_parts(torchvision):
    models = pytest.importorskip("torchvision.models")
    model = models.VisionTransformer(32, 8, 2, 2, 24, 24, num_classes=5).eval()
    x = torch.randn(2, 3, 32, 32)
    with pytest.raises(TypeError, match="VisionTransformer is none: give parts"):
        DiversityObjective({"koleo": 1.0}).attach(model)
    parts = ModelParts(
        model.encoder.layers, num_prefix_tokens=1, norms=[model.encoder.ln], head=model.heads.head
    )
    found = []
    model.encoder.layers[1].register_forward_hook(lambda module, args, out: found.append(out))
    mixing = (*LABELS, torch.rand(16))
    got = parts_of({"koleo": 1.0, "patch_mixing": 1.0}, model, x, parts, mixing)
    torch.testing.assert_close(got["koleo"], losses.koleo(found[0][:, 1:]))
    logits = model.heads.head(model.encoder.ln(found[0]))[:, 1:]
    torch.testing.assert_close(got["patch_mixing"], losses.patch_mixing(logits, *mixing))
    with pytest.raises(
        TypeError, match=r"encoder.layers.encoder_layer_0.attn must have qkv, .* give parts with names"
    ):
        DiversityObjective({"head_mhs": 1.0}).attach(model, parts)
    record = CollapseMonitor(model, maps=False, parts=parts).measure(x)[1]
    assert record["residual"] == pytest.approx(monitor.residual(found[0][:, 1:]).item(), rel=1e-5)
    nameless = ModelParts(model.encoder.layers)
    with pytest.raises(ValueError, match="tells no number of prefix tokens: give num_prefix_tokens"):
        parts_of({"koleo": 1.0}, model, x, nameless)


class Own(nn.Module):
    """Attention of names of its own, a level down: query, key, value."""

    def __init__(self):
        super().__init__()
        self.inside, self.out = nn.Module(), nn.Linear(24, 24)
        for name in ("query", "key", "value"):
            setattr(self.inside, name, nn.Linear(24, 24))
        self.inside.count = 3

    def forward(self, x):
        q, k, v = (
            module(x).unflatten(-1, (3, -1)).transpose(1, 2)
            for module in (self.inside.query, self.inside.key, self.inside.value)
        )
        self.maps = (q @ k.mT * 8**-0.5).softmax(-1)
        return x + self.out((self.maps @ v).transpose(1, 2).flatten(2))


def test_names_of_an_attention_are_data():
    model, x = nn.Sequential(Own(), Own()), torch.randn(2, 9, 24)
    names = AttentionNames(projections=("inside.query", "inside.key", "inside.value"), heads="inside.count")
    given = dict(attentions=list(model), num_prefix_tokens=0)
    config = {"head": Term("attention_diversity", layers=[1]), "weight_mgd": 1.0, "koleo": 1.0}
    with pytest.raises(TypeError, match=r"Own, mixes, rotates or biases .* by out: "):
        DiversityObjective(config).attach(model, ModelParts(model, **given, names=names))
    wrong = AttentionNames(projections=("query",))
    with pytest.raises(TypeError, match="must have what names of parts name"):
        DiversityObjective(config).attach(model, ModelParts(model, **given, names=wrong))
    names = AttentionNames(names.projections, names.heads, beside=("out",))
    got = parts_of(config, model, x, ModelParts(model, **given, names=names))
    torch.testing.assert_close(got["head"], diversity(model[1].maps))
    packed = [
        torch.cat([part.weight for part in (attn.inside.query, attn.inside.key, attn.inside.value)])
        for attn in model
    ]
    torch.testing.assert_close(
        got["weight_mgd"], losses.weight_mgd([w.unflatten(0, (3, -1)) for w in packed])
    )


@pytest.mark.parametrize(
    ("error", "sentence", "given"),
    [
        (TypeError, "blocks must be modules, one at least", dict(blocks=[])),
        (TypeError, "blocks must be modules, one at least", dict(blocks=[1])),
        (ValueError, "attentions must be one for each of 3 blocks, .* got 1", dict(attentions=[None])),
        (ValueError, "tokens must be 4 places, .* got 1", dict(tokens=[(nn.Identity(), "input")])),
        (TypeError, "tokens must be pairs of a module and", dict(tokens=[1, 2, 3, 4])),
        (ValueError, "num_prefix_tokens must be an integer of at least 0", dict(num_prefix_tokens=-1)),
        (ValueError, "blocks of parts must be modules of the model, .* entry 0, a Linear, is none",
         dict(blocks=[nn.Linear(2, 2)])),
        (ValueError, "head of parts must be modules of the model", dict(head=nn.Linear(2, 2))),
        (TypeError, "parts must be a ModelParts, got list", None),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_get_a_sentence(error, sentence, given):
    model = foreign.Released("gong")

    def attach():
        parts = [] if given is None else ModelParts(**({"blocks": model.blocks} | given))
        DiversityObjective({"koleo": 1.0}).attach(model, parts)

    with pytest.raises(error, match=sentence):
        attach()


def gradients(model, run, x, config):
    model.zero_grad()
    with DiversityObjective(config).attach(run) as objective:
        logits = run(x)
        total, _ = objective()
        (logits.square().mean() + total).backward()
    return [total.detach(), *(p.grad for p in model.parameters())]


MODELS = {
    "vit_pytorch": lambda: foreign.VitPytorch("cait"),
    "released": lambda: foreign.Released("gong"),
    "swin": lambda: swin(img_size=16),
}
TAKEN = {"koleo": 1.0, "weight_mgd": 0.1}


@pytest.mark.parametrize("name", MODELS)
def test_compiled(name, torchvision):
    torch.compiler.reset()
    model, x = MODELS[name](), foreign.images()
    config = TAKEN if name == "swin" else TAKEN | {"attention_diversity": 1.0}
    expected = gradients(model, model, x, config)
    got = gradients(model, torch.compile(model, backend="eager"), x, config)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", MODELS)
def test_copies_autocast_frozen_layers_and_two_at_once(name, torchvision):
    model, x = MODELS[name](), foreign.images()
    config = TAKEN if name == "swin" else TAKEN | {"attention_diversity": 1.0}
    expected = gradients(model, model, x, config)
    other = copy.deepcopy(model)
    with (
        DiversityObjective(config).attach(model) as first,
        DiversityObjective(config).attach(other) as second,
    ):
        model(x), other(x.flip(0) * 2)
        model(x)
        torch.testing.assert_close(first()[0], expected[0])
        assert abs(second()[0] - expected[0]) > 1e-5
        twin, objective = pickle.loads(pickle.dumps((model, first)))
        assert objective.parts.blocks[0] in set(twin.modules())
        twin(x)
        torch.testing.assert_close(objective()[0], expected[0])
        for parameter in list(model.parameters())[:-4]:
            parameter.requires_grad_(False)
        model(x)
        torch.testing.assert_close(first()[0], expected[0])
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
            total, _ = first()
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, expected[0], rtol=0.05, atol=0.05)


def test_checkpointed_swin(torchvision):
    model, x = swin(), torch.randn(2, 3, 16, 16)
    expected = gradients(model, model, x, TAKEN)
    importlib.import_module("timm.layers").set_reentrant_ckpt(False)
    model.set_grad_checkpointing()
    torch.testing.assert_close(gradients(model, model, x, TAKEN), expected)


def test_re_attention_in_place_of_a_known_attention():
    """Blocks of one model may have attentions of several kinds."""
    model, x = foreign.Released("gong"), foreign.images()

    class Wrapped(nn.Module):
        def __init__(self, attn):
            super().__init__()
            self.attn = attn

        def forward(self, x, atten=None):
            return x + self.attn(x), atten

    model.blocks[1] = Wrapped(ReAttention(24, 2))
    assert parts_of({"attention_diversity": 1.0, "cos_reg": 1.0}, model, x)["cos_reg"].isfinite()
