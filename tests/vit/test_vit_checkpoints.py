"""`vit.load`: published checkpoints, in whatever wraps them, and files that are none."""

import argparse
import copy
import functools
import os
import re
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from published_vits import gong_shapes, random_state
from torch import nn

from vitdiv_kernels import fuse
from vitdiv_kernels.vit import CONFIGS, ViT, ViTConfig, load

SMALL = ViTConfig(image_size=32, patch=8, dim=24, depth=2, heads=4, classes=5)
DISTILLED = replace(SMALL, distilled=True)
CAIT = replace(SMALL, attention="talking_heads", layer_scale=0.1, class_blocks=2)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def timm(torchvision):
    return pytest.importorskip("timm")


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return ViT(SMALL).state_dict()


def randomised(model):
    """In float64, with no weight that is zero or as good as zero."""
    for p in model.double().parameters():
        nn.init.normal_(p, std=0.2)
    return model.eval()


def same(model, state):
    ours = model.state_dict()
    return ours.keys() == state.keys() and all(torch.equal(ours[key], state[key]) for key in state)


SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4, "num_classes": 5}


@pytest.mark.parametrize(
    ("where", "name", "config"),
    [
        ("vision_transformer", "VisionTransformer", SMALL),
        ("deit", "VisionTransformerDistilled", DISTILLED),
        ("cait", "Cait", CAIT),
    ],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_models_of_timm_load_and_give_the_same_logits(timm, tmp_path, where, name, config, suffix):
    theirs = randomised(getattr(getattr(timm.models, where), name)(**SHAPE))
    path = tmp_path / f"model.{suffix}"
    if suffix == "pth":
        torch.save(theirs.state_dict(), path)
    else:
        pytest.importorskip("safetensors.torch").save_file(theirs.state_dict(), path)
    ours, x = load(path, ViT(config).double().eval()), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        *((f"deit_{size}", f"deit_{size}_patch16_224") for size in ("tiny", "small", "base")),
        *((f"deit_{size}_distilled", f"deit_{size}_distilled_patch16_224") for size in ("tiny", "small")),
        ("deit_base_384", "deit_base_patch16_384"),
        ("deit_base_distilled_384", "deit_base_distilled_patch16_384"),
        ("cait_xxs24_224", "cait_xxs24_224"),
    ],
)
def test_names_and_shapes_are_those_of_timm(timm, name, theirs):
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it skips on the meta device
        expected = timm.create_model(theirs).state_dict()
        ours = ViT(CONFIGS[name]).state_dict()
    assert {key: t.shape for key, t in ours.items()} == {key: t.shape for key, t in expected.items()}


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("cait")])
def test_cait_has_the_numbers_of_timm(timm, name, monkeypatch):
    cait, config = timm.models.cait, CONFIGS[name]
    monkeypatch.setattr(cait, "_create_cait", lambda variant, pretrained, **numbers: numbers)
    assert getattr(cait, name)() == {
        "patch_size": config.patch, "embed_dim": config.dim, "depth": config.depth,
        "num_heads": config.heads, "init_values": config.layer_scale,
    }  # fmt: skip
    assert timm.get_pretrained_cfg(name).input_size == (3, config.image_size, config.image_size)


def wrapped(state):
    """What training scripts save, by the name of who does."""
    options = argparse.Namespace(lr=5e-4, model="deit_small", output_dir="out")
    average = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    module = {f"module.{key}": value for key, value in state.items()}
    return {
        "bare": state,
        "deit": {"model": state, "optimizer": {}, "epoch": 3, "model_ema": average, "args": options},
        "cait": {"model": module, "epoch": 3},
        "timm": {"state_dict": state, "state_dict_ema": average, "arch": "x", "version": 2, "args": options},
        "ddp": module,
        "compiled": {f"_orig_mod.module.{key}": value for key, value in state.items()},
        "swa": module | {"n_averaged": torch.tensor(4)},
        "nested": {"model": {"state_dict": state, "epoch": 1}},
    }


@pytest.mark.parametrize("kind", wrapped({}))
@pytest.mark.parametrize("zipped", [True, False])
def test_wrappers(state, tmp_path, kind, zipped):
    torch.save(wrapped(state)[kind], tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(load(tmp_path / "x.pth", SMALL), state)
        assert same(load(str(tmp_path / "x.pth"), ViT(SMALL)), state)
        assert same(load(wrapped(state)[kind], SMALL), state)


@pytest.mark.parametrize("kind", ["deit", "timm"])
def test_moving_averages_are_taken_when_asked_for(state, kind):
    checkpoint = wrapped(state)[kind]
    torch.testing.assert_close(load(checkpoint, SMALL, ema=True).pos_embed, state["pos_embed"] + 1)
    weights = "model" if kind == "deit" else "state_dict"
    del checkpoint[weights]
    with pytest.raises(ValueError, match=r"has no model or state_dict but .*: give ema=True for the moving"):
        load(checkpoint, SMALL)
    with pytest.raises(ValueError, match=r"has no model_ema or state_dict_ema but .*: give ema=False"):
        load({weights: state}, SMALL, ema=True)


def test_options_let_through_stay_as_the_caller_has_them(state, tmp_path):
    torch.save(wrapped(state)["deit"], tmp_path / "x.pth")
    before = set(torch.serialization.get_safe_globals())
    load(tmp_path / "x.pth", SMALL)
    assert set(torch.serialization.get_safe_globals()) == before
    with torch.serialization.safe_globals([argparse.Namespace]):
        load(tmp_path / "x.pth", SMALL)
        assert argparse.Namespace in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("strict", [True, False])
def test_a_model_with_new_mixes_takes_the_plain_models_weights(timm, strict):
    plain, model = (randomised(timm.models.vision_transformer.VisionTransformer(**SHAPE)) for _ in range(2))
    fuse(model, plain=True)
    mixes = [block.attn.reatten_matrix for block in model.blocks]
    nn.init.normal_(mixes[0].weight)
    saved = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(plain.state_dict(), model, strict=strict)
    assert all(mix.is_identity() for mix in mixes)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(x))
    del saved["blocks.1.attn.reatten_matrix.bias"]
    with pytest.raises(ValueError, match=r"missing: blocks\.1\.attn\.reatten_matrix\.bias$"):
        load(saved, model)


def test_talking_heads_of_gong_are_renamed():
    config = replace(SMALL, attention="talking_heads", talking_bias=False, patch_head=True)
    state = random_state(gong_shapes(24, 2, 4, patches=16, patch=8, classes=5), torch.float32)
    attn = load(state, config).blocks[1].attn
    assert torch.equal(attn.proj_l.weight, state["blocks.1.attn.proj_pre.weight"])
    assert torch.equal(attn.proj_w.weight, state["blocks.1.attn.proj_post.weight"])


@pytest.mark.parametrize("config", [SMALL, DISTILLED, CAIT], ids=["class", "distilled", "cait"])
@pytest.mark.parametrize("size", [16, 48])
def test_position_embeddings_are_resized_as_timm_does(timm, config, size):
    model = ViT(config)
    prefix, side = model.num_prefix_tokens, size // 8
    with pytest.warns(UserWarning, match=f"pos_embed was resized from 4 x 4 to {side} x {side} patches"):
        larger = load(model.state_dict(), replace(config, image_size=size))
    expected = timm.layers.resample_abs_pos_embed(
        model.pos_embed, [side, side], [4, 4], num_prefix_tokens=prefix
    )
    torch.testing.assert_close(larger.pos_embed, expected)
    assert torch.equal(larger.pos_embed[:, :prefix], model.pos_embed[:, :prefix])
    assert larger(torch.randn(1, 3, size, size)).shape == (1, 5)


def test_timm_models_take_positions_of_a_grid_that_is_no_square(timm, state):
    wide = timm.models.vision_transformer.VisionTransformer(**SHAPE | {"img_size": (16, 48)})
    with pytest.warns(UserWarning, match="resized from 4 x 4 to 2 x 6 patches"):
        load(state, wide)
    expected = timm.layers.resample_abs_pos_embed(state["pos_embed"], [2, 6], [4, 4])
    torch.testing.assert_close(wide.pos_embed, expected)


def test_heads_for_other_classes_are_dropped():
    published = ViT(replace(DISTILLED, classes=7)).state_dict()
    model = ViT(DISTILLED)
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="it keeps its initial values") as warned:
        assert load(published, model) is model
    sentence = "the state dict: {} is for 7 classes and the model's for 5: it keeps its initial values"
    assert [str(w.message) for w in warned] == [sentence.format("head"), sentence.format("head_dist")]
    heads = {key: value for key, value in before.items() if "head" in key}
    assert same(model, published | heads)


REATTENTION = replace(SMALL, reattention=(1,))


@pytest.mark.parametrize(
    ("source", "target", "sentences"),
    [
        (
            SMALL,
            DISTILLED,
            ["missing: dist_token, head_dist.weight, head_dist.bias", "of other shapes: pos_e"],
        ),
        (DISTILLED, SMALL, ["unexpected: dist_token, head_dist", r"\[1, 18, 24\], expected \[1, 17, 24\]"]),
        (
            SMALL,
            REATTENTION,
            [r"missing: blocks.1.attn.reatten_matrix.weight, .*var_norm.weight.* and 1 more"],
        ),
        (REATTENTION, SMALL, [r"unexpected: blocks.1.attn.reatten_matrix.weight"]),
        (replace(SMALL, depth=3), SMALL, ["unexpected: blocks.2.norm1.weight, .* and 6 more"]),
        (replace(SMALL, mlp_ratio=3.0), SMALL, [r"blocks.0.mlp.fc1.weight \[72, 24\], expected \[96, 24\]"]),
        (replace(SMALL, channels=1), SMALL, [r"patch_embed.proj.weight \[24, 1, 8, 8\], expected \[24, 3,"]),
        (CONFIGS["deit_tiny"], SMALL, ["It fits deit_tiny of CONFIGS"]),
        (CONFIGS["digits24"], CONFIGS["deit_tiny"], ["does not fit the ViTConfig", "It fits digits24 of"]),
    ],
)
def test_another_architecture_is_refused_and_nothing_is_loaded(source, target, sentences):
    model = ViT(target)
    before = copy.deepcopy(model.state_dict())
    for into in (target, model):
        with pytest.raises(
            ValueError, match=r"the state dict does not fit th.*: (missing|unexp|of oth)"
        ) as error:
            load(ViT(source).state_dict(), into)
        for sentence in sentences:
            if "ViTConfig" not in sentence or into is target:
                error.match(sentence)
    assert same(model, before)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("pos_embed", (16, 24)),
        ("pos_embed", (1, 17)),
        ("pos_embed", (1, 5, 25)),
        ("pos_embed", (2, 5, 24)),
        ("pos_embed", (1, 8, 24)),
        ("head.weight", ()),
        ("head.weight", (7, 25)),
        ("cls_token", (24,)),
    ],
)
def test_tensors_of_odd_shapes_are_listed(state, name, shape):
    changed = {**state, name: torch.ones(shape)}
    with pytest.raises(
        ValueError, match=f"of other shapes: .*{name} {re.escape(str(list(shape)))}, expected"
    ):
        load(changed, SMALL)


def test_a_model_without_memory_is_refused(state):
    with torch.device("meta"):
        model = ViT(SMALL)
    with pytest.raises(ValueError, match="model must have memory, got one on the meta device"):
        load(state, model)


def test_what_both_have_can_be_loaded(state):
    with pytest.warns(UserWarning, match="the state dict: missing: blocks.1.attn.reatten_matrix.weight"):
        model = load(state, REATTENTION, strict=False)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    with pytest.warns(UserWarning, match="unexpected: blocks.1.attn.reatten_matrix.weight"):
        assert same(load(model.state_dict(), SMALL, strict=False), state)
    with pytest.raises(ValueError, match=r"does not fit the ViTConfig: of other shapes: cls_token"):
        load(state, replace(SMALL, dim=32), strict=False)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ({}, "holds no state dict: expected tensors by name, .* got nothing"),
        ({"epoch": 3, "weights": {"a": 1}}, "expected tensors by name, .* got epoch, weights"),
        ({"module.head.bias": torch.ones(5), "head.bias": torch.ones(5)}, "with and without module. before"),
    ],
)
def test_what_is_no_state_dict(source, sentence):
    with pytest.raises(ValueError, match=f"the state dict (holds|has) .*{sentence.split(' ', 1)[1]}"):
        load(source, SMALL)


def test_arguments_of_another_kind(state):
    with pytest.raises(
        ValueError, match=r"model must be a ViTConfig, a module, or one of .*, got 'deit_smal'"
    ):
        load(state, "deit_smal")
    with pytest.raises(TypeError, match="source must be a path or a state dict, got a int"):
        load(3, SMALL)


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0, 0.0001, 0.001, 0.1, 0.5, 0.9, 0.999, -1])
def test_cut_files(state, tmp_path, share, zipped):
    path = tmp_path / "cut.pth"
    torch.save({"model": state}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    size = len(content) - 1 if share == -1 else int(share * len(content))
    write(path, content[:size])
    model = ViT(SMALL)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"cut.pth is cut or damaged, or no file of torch \({size} bytes"):
        load(path, model)
    assert same(model, before)


def test_a_changed_byte_is_found(state, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"model": state}, path)
    content = path.read_bytes()
    weights = state["blocks.1.mlp.fc1.weight"].numpy().tobytes()
    changed = content.replace(weights, weights[:99] + bytes([weights[99] ^ 1]) + weights[100:])
    assert len(changed) == len(content) != 0
    assert changed != content
    with pytest.raises(ValueError, match=r"x.pth is cut or damaged"):
        load(write(path, changed), SMALL)
    assert torch.load(path)  # torch doesn't see it


def test_files_without_checksums_load(state, tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert same(load(tmp_path / "x.pth", SMALL), state)


@pytest.mark.parametrize("content", [b"a text\n" * 99, b"\x89PNG\r\n\x1a\n" * 20, b"version https://git-lfs"])
def test_files_of_another_kind(tmp_path, content):
    with pytest.raises(ValueError, match=r"x.pth is cut or damaged, or no file of torch"):
        load(write(tmp_path / "x.pth", content), SMALL)


def test_cut_safetensors(state, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(state, tmp_path / "x.safetensors")
    write(tmp_path / "x.safetensors", (tmp_path / "x.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"x.safetensors is cut or damaged, or no file of safetensors"):
        load(tmp_path / "x.safetensors", SMALL)


def test_without_safetensors_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="safetensors must be installed: pip install safetensors"):
        load(write(tmp_path / "x.safetensors", b""), SMALL)


def test_paths_without_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*gone.pth"):
        load(tmp_path / "gone.pth", SMALL)
    with pytest.raises(ValueError, match=r"can't be read: Is a directory"):
        load(tmp_path, SMALL)


def test_a_tensor_alone_is_no_state_dict(tmp_path):
    torch.save(torch.ones(3), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x.pth holds no state dict but a Tensor"):
        load(tmp_path / "x.pth", SMALL)


class Runs:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Quiet:
    """Pickled by its name alone."""


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("made", "named"),
    [
        (Runs, "posix.mkdir"),
        (lambda path: Quiet(), f"{Quiet.__module__}.Quiet"),
        (lambda path: ViT(SMALL), "vitdiv_kernels.vit.model.ViT"),
        (functools.partial(functools.partial, os.mkdir), "functools.partial"),
    ],
)
def test_pickled_code_is_named_and_not_run(state, tmp_path, made, named, zipped):
    ran = tmp_path / "ran"
    checkpoint = {"model": state, "args": argparse.Namespace(more=made(ran))}
    torch.save(checkpoint, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=f"x.pth holds pickled code, {named}, and was not loaded"):
        load(tmp_path / "x.pth", SMALL)
    assert not ran.exists()
    if made is Runs:  # it would have
        torch.load(tmp_path / "x.pth", weights_only=False)
        assert ran.exists()
