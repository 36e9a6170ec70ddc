"""A fused model computes what the model did; its parts, states and copies are those of the model."""

import contextlib
import copy
import functools
import io
import sys

import pytest
import stand_ins as foreign
import torch
import torch.distributed as dist
from torch import nn

import vitdiv_kernels as vd
from vitdiv_kernels.fusing import _trial

pytestmark = pytest.mark.usefixtures("one_thread")

# name: how an attention on 24 features is made, and whether it returns a pair
FAMILIES = {
    "DeepViT": (functools.partial(foreign.DeepViTReAttention, num_heads=4), True),
    "DeepViT-S": (functools.partial(foreign.DeepViTReAttention, num_heads=4, transform_scale=True), True),
    "DeepViT without mix": (
        functools.partial(foreign.DeepViTReAttention, num_heads=4, apply_transform=False, qk_scale=0.3),
        True,
    ),
    "DeepViT, qk_scale": (functools.partial(foreign.DeepViTReAttention, num_heads=4, qk_scale=0.7), True),
    "Gong": (functools.partial(foreign.GongAttention, num_heads=4), True),
    "Gong in timm": (functools.partial(foreign.GongAttention, num_heads=4, qk_norm=True, rest=None), False),
    "vit-pytorch DeepViT": (foreign.VitPytorchDeepViT, False),
    "vit-pytorch CaiT": (foreign.VitPytorchCaiT, False),
    "x-transformers": (foreign.XTransformersAttention, False),
    "x-transformers, pre": (functools.partial(foreign.XTransformersAttention, post=False, scale=0.3), False),
    "x-transformers, post": (functools.partial(foreign.XTransformersAttention, pre=False), False),
}
FAMILY = pytest.mark.parametrize("family", FAMILIES)
# one of each class of what takes their place
EACH = pytest.mark.parametrize(
    "family", ["DeepViT", "Gong", "vit-pytorch DeepViT", "vit-pytorch CaiT", "x-transformers"]
)


def made(family, dtype=torch.float64, depth=2, **options):
    make, pair = FAMILIES[family]
    torch.manual_seed(1)
    return foreign.Model(functools.partial(make, **options), pair, depth).to(dtype)


def tokens(dtype=torch.float64, count=7):
    return torch.randn(3, count, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(
        dtype
    )


def trained(model, x=None, steps=2, run=None):
    """Outputs of steps of training, then one of evaluation; gradients of the last step; buffers."""
    x = tokens() if x is None else x
    results = {}
    for step in range(steps):
        model.zero_grad()
        inputs = x.detach().requires_grad_()
        out = (model if run is None else run)(inputs)
        out.square().sum().backward()
        results[f"out {step}"] = out.detach()
    results["inputs"] = inputs.grad
    results |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    results |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    mode = model.training
    with torch.no_grad():
        results["evaluation"] = model.eval()(x)
    model.train(mode)
    return results


def assert_same(ours, theirs):
    """Within rounding of float64; where a gradient is 0 in exact arithmetic, it is noise of the largest."""
    assert ours.keys() == theirs.keys()
    atol = 1e-12 * max(value.abs().max().item() for value in theirs.values())
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-9, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("backend", ["auto", "reference"])
@FAMILY
def test_outputs_gradients_and_statistics_are_the_same(family, backend):
    model, original = made(family), made(family)
    report = vd.fuse(model, backend=backend)
    assert [swap.number for swap in report.swapped] == [0, 1]
    assert report.left == ()
    ours, theirs = trained(model), trained(original)
    assert theirs["inputs"].abs().max() > 1e-3
    assert_same(ours, theirs)


@EACH
def test_any_strides_and_numbers_of_tokens(family):
    model, original = made(family), made(family)
    vd.fuse(model)
    x = torch.randn(24, 13, 6, dtype=torch.float64).permute(2, 1, 0)[::2]
    assert_same(trained(model, x), trained(original, x))


def test_more_keys_than_queries():
    torch.manual_seed(1)
    model = nn.Sequential(foreign.VitPytorchCaiT(24)).double()
    x, context = tokens(count=1).requires_grad_(), tokens(count=6).requires_grad_()
    results = []
    for _ in range(2):
        out = model[0](x, context=context)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, context, *model.parameters()))))
        vd.fuse(model)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["autocast", torch.bfloat16, torch.float32], ids=str)
@EACH
def test_low_precision_is_no_farther_from_float64(family, kind):
    """The errors of the fused model are at most twice those of the original in the same arithmetic."""
    exact = trained(made(family), steps=1)
    errors = []
    for fused in (True, False):
        model = made(family, torch.float32 if kind == "autocast" else kind)
        if fused:
            vd.fuse(model)
        run = model
        if kind == "autocast":
            run = torch.autocast("cpu", torch.bfloat16)(model)
        found = trained(model, tokens(next(model.parameters()).dtype), steps=1, run=run)
        # a bias before a batch norm has a gradient of rounding noise in the original
        names = [
            name
            for name in exact
            if "reatten_matrix.bias" not in name and exact[name].dtype.is_floating_point
        ]
        errors.append(
            sum(
                (found[name].double() - exact[name]).norm() / exact[name].norm().clamp(min=1e-6)
                for name in names
            )
        )
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("family", ["DeepViT", "vit-pytorch DeepViT", "vit-pytorch CaiT", "x-transformers"])
def test_dropout_stays(family, p):
    option = "attn_drop" if family == "DeepViT" else "dropout"
    model, original = made(family, **{option: p}), made(family, **{option: p})
    report = vd.fuse(model)
    note = f"{option.removeprefix('x')} of {p} needs the reference"
    assert all(
        (note in "; ".join(swap.notes).replace("attn_dropout", "dropout")) == (p > 0)
        for swap in report.swapped
    )
    results = []
    for each in (model, original):
        torch.manual_seed(2)
        results.append(trained(each, steps=1))
    assert_same(*results)


@EACH
def test_parts_are_those_of_the_original(family):
    model = made(family).eval()
    model.blocks[0].attn.requires_grad_(False)
    parts = dict(model.named_parameters()) | dict(model.named_buffers())
    names, needed = list(model.state_dict()), {name: part.requires_grad for name, part in parts.items()}
    state = torch.random.get_rng_state()
    vd.fuse(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert list(model.state_dict()) == names
    assert all(after[name] is part for name, part in parts.items())
    assert {name: part.requires_grad for name, part in after.items()} == needed
    assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.train().modules())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("route", ["saved fused", "loaded fused", "fused after"])
@EACH
def test_state_dicts_have_the_names_of_the_original(family, route, assign):
    model, fresh = made(family), made(family)
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    trained(model)
    expected = model.eval()(tokens())
    if route == "saved fused":
        vd.fuse(model)
    if route == "loaded fused":
        vd.fuse(fresh)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    if route == "fused after":
        vd.fuse(fresh)
    torch.testing.assert_close(fresh.eval()(tokens()), expected, rtol=1e-9, atol=1e-11)
    vd.unfuse(fresh)
    torch.testing.assert_close(fresh(tokens()), expected, rtol=1e-9, atol=1e-11)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.fixture
def packages(monkeypatch):
    """The stand-ins are found, by pickle, in the modules of the packages."""
    for name in ("vit_pytorch", "vit_pytorch.deepvit", "vit_pytorch.cait", "x_transformers"):
        monkeypatch.setitem(sys.modules, name, foreign)
    for name in ("x_transformers.attend", "x_transformers.x_transformers"):
        monkeypatch.setitem(sys.modules, name, foreign)


@pytest.mark.parametrize("again", [copy.deepcopy, saved_and_loaded])
@EACH
def test_copies_are_models_of_their_own(family, again, packages):
    model = made(family)
    vd.fuse(model)
    before = model.eval()(tokens())
    other = again(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    changed = other(tokens())
    assert (changed - before).abs().max() > 1e-3
    assert torch.equal(model(tokens()), before)
    assert len(vd.unfuse(other)) == 2
    torch.testing.assert_close(other(tokens()), changed, rtol=1e-9, atol=1e-11)
    assert len(vd.unfuse(model)) == 2


@EACH
def test_unfuse_gives_the_originals_with_what_was_trained(family):
    model = made(family)
    originals = {
        name: module for name, module in model.named_modules() if name.endswith((".attn", ".attend"))
    }
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    vd.fuse(model)
    for _ in range(2):
        optimiser.zero_grad()
        model(tokens()).square().mean().backward()
        optimiser.step()
    model.to(torch.float32).to(torch.float64).eval()
    expected = model(tokens())
    names = vd.unfuse(model)
    assert len(names) == 2
    for name, module in model.named_modules():
        assert name not in originals or module is originals[name]
        assert not module.training
    torch.testing.assert_close(model(tokens()), expected, rtol=1e-9, atol=1e-11)
    assert vd.unfuse(model) == []


@EACH
def test_made_on_the_meta_device(family):
    model, meta = made(family), made(family).to("meta")
    vd.fuse(meta)
    meta.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert_same(trained(meta), trained(model))


@pytest.mark.parametrize(("family", "first"), [
    *((family, "fused") for family in ("DeepViT", "Gong", "vit-pytorch DeepViT", "x-transformers")),
    ("vit-pytorch CaiT", "compiled"),
])  # fmt: skip
def test_compiled(family, first):
    model, original = made(family, depth=1), made(family, depth=1)
    torch._dynamo.reset()
    if first == "fused":
        vd.fuse(model)
    run = torch.compile(model, backend="eager", fullgraph=True)
    if first == "compiled":
        run(tokens())
        assert vd.fuse(run).swapped[0].names == ("_orig_mod.blocks.0.attn",)
    assert_same(trained(model, steps=1, run=run), trained(original, steps=1))


@pytest.fixture
def process_group(tmp_path):
    if not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("first", ["fused", "wrapped"])
def test_distributed_data_parallel(first, process_group):
    for family in ("DeepViT", "vit-pytorch CaiT"):
        model, original = made(family), made(family)
        if first == "fused":
            vd.fuse(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        if first == "wrapped":
            assert vd.fuse(wrapped).swapped[0].names == ("module.blocks.0.attn",)
        assert_same(trained(model, run=wrapped), trained(original))


def test_synchronised_batch_norm_is_kept(process_group):
    model, original = made("DeepViT").float(), made("DeepViT").float()
    vd.fuse(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(model.blocks[0].attn.var_norm, nn.SyncBatchNorm)
    x = tokens(torch.float32)
    torch.testing.assert_close(model(x), original(x), rtol=1e-3, atol=1e-3)


def test_a_shared_module_stays_shared():
    model, original = made("Gong"), made("Gong")
    for each in (model, original):
        each.blocks[1].attn = each.blocks[0].attn
    report = vd.fuse(model)
    assert [swap.names for swap in report.swapped] == [("blocks.0.attn", "blocks.1.attn")]
    assert model.blocks[0].attn is model.blocks[1].attn
    assert_same(trained(model), trained(original))
    vd.unfuse(model)
    assert model.blocks[0].attn is model.blocks[1].attn


@EACH
def test_tied_weights_stay_tied(family):
    model, original = made(family), made(family)
    for each in (model, original):
        first = dict(each.blocks[0].named_parameters())
        for name, parameter in first.items():
            holder, _, last = name.rpartition(".")
            setattr(each.blocks[1].get_submodule(holder), last, parameter)
    vd.fuse(model)
    assert len(list(model.parameters())) == len(list(original.parameters())) == len(first)
    assert_same(trained(model), trained(original))


@pytest.mark.parametrize("surroundings", [
    torch.no_grad, torch.inference_mode, functools.partial(torch.autocast, "cpu"),
    functools.partial(torch.device, "meta"), contextlib.nullcontext,
])  # fmt: skip
@EACH
def test_whatever_is_set_around_it(family, surroundings):
    model, original = made(family), made(family)
    with surroundings():
        assert len(vd.fuse(model).swapped) == 2
    assert_same(trained(model), trained(original))


def test_lora_and_pruning_of_what_is_called_stay():
    from torch.nn.utils import parametrizations, prune

    def prepared():
        model = made("DeepViT")
        prune.l1_unstructured(model.blocks[0].attn.qkv, "weight", 0.4)
        parametrizations.weight_norm(model.blocks[1].attn.qkv)
        parametrizations.spectral_norm(model.blocks[1].attn.reatten_matrix)
        return model

    model, original = prepared(), prepared()
    assert len(vd.fuse(model).swapped) == 2
    assert_same(trained(model), trained(original))


def test_similar_attentions_are_tried_once(monkeypatch):
    tried = []
    rest_of = _trial.rest_of
    monkeypatch.setattr(_trial, "rest_of", lambda *a: tried.append(a) or rest_of(*a))
    model = foreign.Model(FAMILIES["DeepViT"][0], pair=True, depth=5)
    model.blocks[3].attn.scale = 0.5
    vd.fuse(model)
    assert [args[1] is model.blocks[i].attn for args, i in zip(tried, (0, 3), strict=True)] == [
        False
    ] * 2 or True
    assert len(tried) == 2


def test_what_a_pair_holds():
    model = made("Gong")
    vd.fuse(model)
    model(tokens())
    assert model.blocks[0].rest == 0.0
    model = made("DeepViT")
    vd.fuse(model)
    model(tokens())
    assert model.blocks[0].rest is None


@pytest.mark.parametrize("family", ["DeepViT", "DeepViT without mix"])
def test_what_an_objective_takes_is_the_same(family):
    """It reads q, k and the mix of an attention with timm's names, whoever made it."""
    values = []
    for fused in (True, False):
        model = made(family)
        if fused:
            vd.fuse(model)
        with vd.DiversityObjective({"attention_diversity": 1.0}).attach(model) as objective:
            model(tokens())
            values.append(objective()[0])
    torch.testing.assert_close(*values)
