"""DiversityObjective: values against losses called by hand, hooks, compile, processes, bad input."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import together
from small_vit import hooks_of, images, query_key, small_vit, softmax_maps
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitdiv_kernels import DiversityObjective, Term, losses
from vitdiv_kernels.attach.presets import PRESETS
from vitdiv_kernels.attach.terms import LOSSES
from vitdiv_kernels.nn import ReAttention


def a_model(reattention=()):
    return small_vit(depth=4, reattention=reattention)


def evaluate(config, model, x, *, mixing=None, generator=None, **options):
    with DiversityObjective(config, **options).attach(model) as objective:
        logits, tokens = model(x, return_tokens=True)
        total, parts = objective(mixing=mixing, generator=generator)
    return total, parts, tokens, logits


def maps_of(model, tokens, i):
    """The published maps of a block: softmax, and of re-attention the 1x1 convolution and the batch norm."""
    maps = softmax_maps(model, tokens, i)
    attn = model.blocks[i].attn
    if hasattr(attn, "reatten_matrix"):
        norm = attn.var_norm
        maps = attn.reatten_matrix(maps)
        of_batch = norm.training or norm.running_mean is None
        mean, variance = (None, None) if of_batch else (norm.running_mean, norm.running_var)
        maps = F.batch_norm(maps, mean, variance, norm.weight, norm.bias, of_batch, eps=norm.eps)
    return maps


def test_deit_small_is_its_losses_with_the_published_weights():
    model, x = a_model(), images()
    labels, others, shares = torch.tensor([1, 2, 3]), torch.tensor([3, 2, 1]), torch.rand(16)
    start = torch.Generator().manual_seed(3)
    total, parts, tokens, _ = evaluate(
        "diverse_vit_deit_small", model, x, mixing=(labels, others, shares), generator=start
    )
    first, last = tokens[0][:, 1:], tokens[-1][:, 1:]  # what enters the first block, as released
    unit = F.normalize(last, dim=-1)
    torch.testing.assert_close(parts["cosine"], (unit @ unit.mT).mean())
    torch.testing.assert_close(parts["contrast"], losses.patch_contrast(first, last))
    maps = F.normalize(maps_of(model, tokens, 0).flatten(2), dim=-1)
    torch.testing.assert_close(parts["heads"], (maps @ maps.mT).mean())
    weights = [block.attn.qkv.weight.unflatten(0, (3, -1)) for block in model.blocks]
    again = torch.Generator().manual_seed(3)
    torch.testing.assert_close(
        parts["weights"], losses.weight_condition_orthogonality(weights, generator=again)
    )
    targets = losses.patch_targets(labels, others, shares, num_classes=5, smoothing=0.1)
    logits = model.head(model.norm(tokens[-1]))[:, 1:]
    torch.testing.assert_close(parts["mixing"], F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1)))
    factors = {"cosine": 0.5, "contrast": 0.5, "heads": 1e-4, "weights": 5e-4, "mixing": 1}
    torch.testing.assert_close(total, sum(factors[name] * parts[name] for name in factors))


@pytest.mark.parametrize(
    ("terms", "task_weight", "mixing_weight"),
    [
        ({"mixing": Term("patch_mixing", 2.0, with_task=True)}, 1 / 17, 2 * 16 / 17),
        ({"mixing": Term("patch_mixing", 2.0)}, 1, 2),
        ({"mixing": Term("patch_mixing", 0.0, with_task=True)}, 1, 0),
    ],
)
def test_the_loss_of_the_task_is_weighed(terms, task_weight, mixing_weight):
    """Of 16 patches; a loss of weight 0 divides nothing."""
    model, labels = a_model(), torch.tensor([1, 2, 3])
    mixing = labels, labels.flip(0), torch.rand(16)
    with DiversityObjective(terms | {"koleo": 0.1}).attach(model) as objective:
        for shape in ((), (1,)):
            task = F.cross_entropy(model(images()), labels)
            total, parts = objective(task=task.view(shape), mixing=mixing)
            expected = task_weight * task + mixing_weight * parts["mixing"] + 0.1 * parts["koleo"]
            torch.testing.assert_close(total, expected)
            assert total.shape == ()
            assert list(parts) == ["mixing", "koleo"]
        task = F.cross_entropy(model(images()), labels)
        total, parts = objective(mixing=mixing)  # the caller's weight
        torch.testing.assert_close(total, terms["mixing"].weight * parts["mixing"] + 0.1 * parts["koleo"])


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def test_region_mixing_goes_through_a_head_of_its_own():
    model = a_model()
    model.patch_head = nn.Linear(16, 5)
    model.fc_norm = nn.LayerNorm(16)
    nn.init.normal_(model.fc_norm.weight)
    masks = losses.region_masks(4, share=0.4)
    targets = torch.rand(3, 2, 5).softmax(-1)
    term = Term("region_mixing", layers=(1, -1))
    for drop in (nn.Identity(), Twice()):
        model.head_drop = drop
        with DiversityObjective({"mine": term}).attach(model) as objective:
            _, tokens = model(images(), return_tokens=True)
            total, _ = objective(regions=(targets, masks))
        expected = 0
        for t in (tokens[2], tokens[4]):
            means = losses.region_means(model.fc_norm(model.norm(t))[:, 1:], masks)
            logits = model.patch_head(drop(means))
            expected = expected + losses.region_mixing(logits, targets, masks) / 2
        torch.testing.assert_close(total, expected)
    with torch.autocast("cpu", torch.bfloat16), DiversityObjective({"mine": term}).attach(model) as objective:
        model(images())
        total, _ = objective(regions=(targets, masks))
    total.backward()
    assert total.dtype == torch.float32
    assert model.patch_head.weight.grad.abs().sum() > 0
    half = model.bfloat16()
    with DiversityObjective({"mine": term}).attach(half) as objective:
        half(images().bfloat16())
        assert objective(regions=(targets, masks))[0].isfinite()


def test_region_contrast_takes_the_grid_of_the_images():
    model = a_model()
    model.pos_embed = nn.Parameter(torch.randn(1, 16, 16))
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    with DiversityObjective({"region_contrast": 1.0}).attach(model) as objective:
        _, tokens = model(torch.randn(3, 1, 6, 10), return_tokens=True)
        total, _ = objective(generator=generators[0])
    expected = losses.region_contrast(tokens[-1][:, 1:], grid=(3, 5), generator=generators[1])
    torch.testing.assert_close(total, expected)


def test_gong_is_the_sum_of_its_three_losses():
    labels = torch.tensor([1, 2, 3])
    mixing = labels, labels.flip(0), torch.ones(16)
    total, parts, tokens, _ = evaluate("gong2021", a_model(), images(), mixing=mixing)
    unit = F.normalize(tokens[-1][:, 1:], dim=-1)
    cosines = (unit @ unit.mT).abs()
    torch.testing.assert_close(parts["cosine"], (cosines.sum() / 3 - 16) / (16 * 15))
    torch.testing.assert_close(total, parts["cosine"] + parts["contrast"] + parts["mixing"])
    first, last = tokens[1], tokens[-1]
    expected = losses.patch_contrast(first.detach()[:, 1:], last[:, 1:])  # the first layer is a target
    torch.testing.assert_close(parts["contrast"], expected)
    gradients = [torch.autograd.grad(x, first, retain_graph=True)[0] for x in (parts["contrast"], expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reattention", [(), (1, 2)])
@pytest.mark.parametrize("tracked", [True, False])
def test_cos_reg_takes_the_published_maps(reattention, training, tracked):
    model, x = a_model(reattention).train(training), images()
    for block in model.blocks:
        if hasattr(block.attn, "var_norm"):
            if not tracked:
                block.attn.var_norm = nn.BatchNorm2d(2, track_running_stats=False).train(training)
            else:
                block.attn.var_norm.running_mean.fill_(0.1)
                block.attn.var_norm.running_var.fill_(0.3)
            nn.init.normal_(block.attn.var_norm.weight)
            nn.init.normal_(block.attn.var_norm.bias)
            nn.init.normal_(block.attn.reatten_matrix.bias)
    total, parts, tokens, _ = evaluate("deepvit_cos_reg", model, x)
    maps = [maps_of(model, tokens, i) for i in range(3)]
    cosines = [F.cosine_similarity(maps[i], maps[i + 1], dim=1).mean() for i in range(2)]
    torch.testing.assert_close(parts["cos_reg"], sum(cosines) / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(total, 0.1 * parts["cos_reg"])


def test_cos_reg_takes_mixed_maps_without_a_norm():
    model = a_model()
    attn = model.blocks[1].attn = ReAttention(16, 2, norm="none")
    nn.init.normal_(attn.reatten_matrix.bias)
    term = Term("cos_reg", layers=(0, 1))
    _, parts, tokens, _ = evaluate({"cos_reg": term}, model, images())
    mixed = attn.reatten_matrix(softmax_maps(model, tokens, 1))
    expected = F.cosine_similarity(softmax_maps(model, tokens, 0), mixed, dim=1).mean()
    torch.testing.assert_close(parts["cos_reg"], expected)


def test_neighbourhood_contrast_takes_what_the_released_code_takes():
    """Patches after the final norm, and embeddings without positions; also under autocast."""
    model, x = a_model(), images()
    nn.init.normal_(model.norm.bias)
    model.fc_norm = nn.LayerNorm(16)
    nn.init.normal_(model.fc_norm.weight)
    term = Term("neighbourhood_contrast", layers=(1, -1), options={"window": 3})
    _, parts, tokens, _ = evaluate({"mine": term}, model, x)
    values = [
        losses.neighbourhood_contrast(model.fc_norm(model.norm(t))[:, 1:], model.patch_embed(x), window=3)
        for t in (tokens[2], tokens[4])
    ]
    torch.testing.assert_close(parts["mine"], sum(values) / 2)
    with torch.autocast("cpu", torch.bfloat16):
        total, _, _, _ = evaluate({"mine": term}, model, x)
    total.backward()
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, sum(values) / 2, rtol=0.05, atol=0.05)


def test_the_logits_of_patches_are_those_of_both_norms():
    model, x = a_model(), images()
    model.fc_norm = nn.LayerNorm(16)
    nn.init.normal_(model.fc_norm.weight)
    mixing = torch.tensor([0, 1, 2]), torch.tensor([2, 1, 0]), torch.rand(3, 16)
    config = {"last": Term("patch_mixing"), "two": Term("patch_mixing", layers=(1, -1))}
    _, parts, tokens, _ = evaluate(config, model, x, mixing=mixing)
    middle, last = (
        losses.patch_mixing(model.head(model.fc_norm(model.norm(t)))[:, 1:], *mixing)
        for t in (tokens[2], tokens[4])
    )
    torch.testing.assert_close(parts["last"], last)
    torch.testing.assert_close(parts["two"], (middle + last) / 2)


def by_hand(name, model, tokens):
    """The value of each loss with its default layers, from tokens taken by the model itself."""
    patches = [t[:, 1:] for t in tokens]
    kind, count, _ = LOSSES[name]
    if kind == "weights":
        return getattr(losses, name)([b.attn.qkv.weight.unflatten(0, (3, -1)) for b in model.blocks])
    if kind == "heads":
        first = query_key(model, tokens, 0)
        inputs = first if count == 1 else (*first, *query_key(model, tokens, 3))
        return getattr(losses, name)(*inputs)
    if name == "cos_reg":
        return losses.cos_reg([query_key(model, tokens, i) for i in range(3)])
    if name == "patch_cross_cosine":
        return losses.pairwise_cosine(patches[1], patches[-1])
    if kind == "embeddings":
        embedded = patches[0] - model.pos_embed[:, 1:]
        return getattr(losses, name)(model.norm(tokens[-1])[:, 1:], embedded)
    return getattr(losses, name)(*((patches[-1],) if count == 1 else (patches[1], patches[-1])))


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("patch_mixing", "region_mixing")])
def test_every_loss_is_its_function_with_its_gradients(name):
    model, x = a_model(), images()
    torch.manual_seed(7)
    total, parts, tokens, _ = evaluate({name: 0.25}, model, x)
    total.backward()
    found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    tokens = model(x, return_tokens=True)[1]
    torch.manual_seed(7)
    value = by_hand(name, model, tokens)
    (0.25 * value).backward()
    torch.testing.assert_close(parts[name], value)
    for got, p in zip(found, model.parameters(), strict=True):
        assert (got is None) == (p.grad is None)
        if got is not None:
            torch.testing.assert_close(got, p.grad, rtol=1e-3, atol=1e-5 * p.grad.abs().max().item() + 1e-9)


def test_layers_are_averaged_and_options_reach_the_function():
    term = Term("pairwise_cosine", layers="all", options={"penalty": "square"})
    _, parts, tokens, _ = evaluate({"mine": term}, a_model(), images())
    values = [losses.pairwise_cosine(t[:, 1:], penalty="square") for t in tokens[1:]]
    torch.testing.assert_close(parts["mine"], torch.stack(values).mean())


def test_prefix_tokens_are_those_of_the_model_or_as_given():
    model = a_model()
    for given, dropped in ((None, 1), (0, 0), (4, 4)):
        _, parts, tokens, _ = evaluate({"koleo": 1.0}, model, images(), num_prefix_tokens=given)
        torch.testing.assert_close(parts["koleo"], losses.koleo(tokens[-1][:, dropped:]))
    with pytest.raises(ValueError, match="num_prefix_tokens must be an integer of at least 0, got -1"):
        evaluate({"koleo": 1.0}, model, images(), num_prefix_tokens=-1)


def test_a_start_of_its_own_needs_no_generator():
    start = torch.randn(2, 16)
    term = Term("patch_condition_orthogonality", options={"start": start})
    config = {"start": term, "drawn": Term("patch_condition_orthogonality")}
    model, x, generator = a_model(), images(), torch.Generator().manual_seed(5)
    _, parts, tokens, _ = evaluate(config, model, x, generator=generator)
    last = tokens[-1][:, 1:]
    torch.testing.assert_close(parts["start"], losses.patch_condition_orthogonality(last, start=start))
    expected = losses.patch_condition_orthogonality(last, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(parts["drawn"], expected)


def test_a_scale_of_its_own_and_norms_of_q_and_k_count():
    model, x = a_model((0, 1)), images()
    old = model.blocks[0].attn
    attn = ReAttention(16, 2, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm)
    attn.qkv = old.qkv
    attn.scale = 0.7
    for norm in (attn.q_norm, attn.k_norm):
        nn.init.normal_(norm.weight)
    model.blocks[0].attn = attn
    _, parts, tokens, _ = evaluate({"attention_diversity": 1.0}, model, x)
    q, k = query_key(model, tokens, 0)
    expected = losses.attention_diversity(attn.q_norm(q), attn.k_norm(k), scale=0.7)
    torch.testing.assert_close(parts["attention_diversity"], expected)


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_hooks_cost_no_operator_and_leave_no_trace():
    model, x = a_model((1,)), images()
    config = {"cos_reg": 1.0, "koleo": 1.0, "neighbourhood_contrast": 1.0}
    keys = list(model.state_dict())
    with Operators() as plain:
        model(x)
    objective = DiversityObjective(config).attach(model)
    # q and k of blocks 0, 1, 2; the last block's output; the embeddings, their start, shape and grid; masks
    assert hooks_of(model) == 9
    with Operators() as hooked:
        model(x)
    assert hooked.names == plain.names
    assert list(model.state_dict()) == keys
    objective()
    objective.detach()
    with DiversityObjective({"koleo": 1.0}).attach(model):
        assert hooks_of(model) == 5
    objective.detach()
    assert hooks_of(model) == 0
    model(x)
    with pytest.raises(RuntimeError, match="the objective is not attached"):
        objective()
    with pytest.raises(KeyError), objective.attach(model):
        raise KeyError
    assert hooks_of(model) == 0


def test_validation_leaves_no_trace_and_nothing_is_counted_twice():
    model = a_model()
    with DiversityObjective({"koleo": 1.0}).attach(model) as objective:
        _, tokens = model(images(), return_tokens=True)
        with torch.no_grad():
            model(images(7))
        _, parts = objective()
        torch.testing.assert_close(parts["koleo"], losses.koleo(tokens[-1][:, 1:]))
        assert objective.recorder.kept == {}
        with pytest.raises(RuntimeError, match="no forward pass was recorded since the last call"):
            objective()


def test_autocast_runs_and_gives_float32():
    model = a_model((1,))
    objective = DiversityObjective({"koleo": 1.0, "cos_reg": 0.1, "head_mhs": 0.1}).attach(model)
    with objective, torch.autocast("cpu", torch.bfloat16):
        model(images())
        total, _ = objective()
    total.backward()
    assert total.dtype == torch.float32
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_hooks_are_compiled_with_the_model():
    torch.compiler.reset()
    x = images()
    config = {"pairwise_cosine": 1.0, "attention_diversity": 1.0, "weight_soft_orthogonality": 1e-3}
    found = []
    for compiled in (False, True):
        model = a_model()
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        with DiversityObjective(config).attach(run) as objective:
            for _ in range(2):
                model.zero_grad()
                logits = run(x)
                total, _ = objective()
                (logits.square().mean() + total).backward()
        assert hooks_of(model) == 0
        found.append([total.detach(), *(p.grad for p in model.parameters())])
    for got, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, expected)


def test_a_model_compiled_without_hooks_gets_a_sentence():
    model = a_model()
    run = torch.compile(model, backend="eager")
    run(images())
    with DiversityObjective({"koleo": 1.0}).attach(run) as objective:
        run(images())
        with pytest.raises(RuntimeError, match="before the first call of a compiled model"):
            objective()


@pytest.fixture
def guards_on_hooks():
    torch.compiler.reset()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        yield
    torch.compiler.reset()


@pytest.mark.usefixtures("guards_on_hooks")
def test_guards_on_hooks_tell_models_and_blocks_apart():
    """What the docstring says to do where another model, or block, was compiled without hooks."""
    torch.compile(a_model(), backend="eager")(images())
    x, found = images(), []
    for way in ("eager", "whole", "blocks"):
        model = a_model()
        run = torch.compile(model, backend="eager") if way == "whole" else model
        for block in model.blocks if way == "blocks" else ():
            block.compile(backend="eager")
        config = {"koleo": 1.0, "heads": Term("attention_diversity", layers=[2])}
        with DiversityObjective(config).attach(model) as objective:
            run(x)
            found.append(objective()[0])
    for got in found[1:]:
        torch.testing.assert_close(got, found[0])


def gradients(model, run, x, config):
    labels = torch.arange(len(x))
    regions = torch.eye(5)[torch.zeros(len(x), 2, dtype=torch.int64)], torch.ones(2, 4, 4)
    with DiversityObjective(config).attach(run) as objective:
        task = run(x).square().mean()
        total, _ = objective(task=task, mixing=(0 * labels, 0 * labels, torch.ones(16)), regions=regions)
        total.backward()
    return [p.grad for p in model.parameters()]


DDP_CONFIG = {
    "pairwise_cosine": 1.0, "patch_contrast": 1.0, "attention_diversity": 1.0, "weight_mgd": 1e-3,
    "region_mixing": 1.0, "mixing": Term("patch_mixing", with_task=True),
}  # fmt: skip


def worker():
    dist.init_process_group("gloo")
    rank, model = dist.get_rank(), headed()
    run = nn.parallel.DistributedDataParallel(model)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    found = gradients(model, run, x[2 * rank : 2 * rank + 2], DDP_CONFIG)
    dist.destroy_process_group()
    return found


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_have_the_gradients_of_one():
    first, second = together(2, worker)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    model = headed()
    for a, b, whole in zip(first, second, gradients(model, model, x, DDP_CONFIG), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, whole, rtol=1e-4, atol=1e-6)


def test_it_attaches_to_timm(torchvision):
    VisionTransformer = pytest.importorskip("timm.models.vision_transformer").VisionTransformer
    config = {**PRESETS["diverse_vit_deit_small"], **PRESETS["deepvit_cos_reg"]}
    for attention in (
        {},
        {"attn_layer": ReAttention},
        {"qk_norm": True, "global_pool": "avg", "reg_tokens": 4},
    ):
        model = VisionTransformer(
            img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=5, **attention
        )
        labels = torch.tensor([0, 1])
        with DiversityObjective(config).attach(model) as objective:
            model(torch.randn(2, 3, 32, 32)).sum()
            total, parts = objective(mixing=(labels, labels.flip(0), torch.rand(16)))
            total.backward()
        assert set(parts) == set(config)
        assert model.blocks[0].attn.qkv.weight.grad.isfinite().all()


def test_attention_of_timm_that_is_no_softmax_of_its_projection_is_refused(torchvision):
    """Its maps would be others than those that it has; losses on tokens and weights are free to be taken."""
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    diff_attention = pytest.importorskip("timm.layers.diff_attention")
    from timm.models import beit, vision_transformer_relpos, xcit

    size = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    models = [
        vision_transformer.VisionTransformer(**size, attn_layer=diff_attention.DiffAttention),
        beit.Beit(**size, use_rel_pos_bias=True),
        xcit.Xcit(**size),
        vision_transformer_relpos.VisionTransformerRelPos(**size),
    ]
    for model in models:
        with pytest.raises(TypeError, match="biases between its projection and its softmax"):
            DiversityObjective({"head_mhs": 1}).attach(model)
        with DiversityObjective({"koleo": 1, "weight_mhs": 1}).attach(model.train()) as objective:
            model(torch.randn(2, 3, 32, 32))
            total, _ = objective()
            total.backward()


class Tuples(nn.Module):
    def forward(self, x):
        return x, x


class Rotating(nn.Module):
    """Rotary embeddings, as timm's EvaAttention takes them."""

    def __init__(self, attn):
        super().__init__()
        self.qkv, self.num_heads = attn.qkv, attn.num_heads

    def forward(self, x, rope=None):
        return x


def rotating():
    model = a_model()
    model.blocks[0].attn = Rotating(model.blocks[0].attn)
    return model


def tuples():
    model = a_model()
    model.blocks.append(Tuples())
    return model


def headed():
    model = a_model()
    model.patch_head = nn.Linear(16, 5)
    return model


def regions_of(model, masks):
    with DiversityObjective("gong2021_released").attach(model) as objective:
        model(images())
        objective(regions=(torch.ones(3, 2, 5) / 5, masks))


def with_task(task):
    model = a_model()
    with DiversityObjective({"koleo": 1.0}).attach(model) as objective:
        model(images())
        objective(task=task)


def headless():
    model = a_model()
    del model.norm
    return model


@pytest.mark.parametrize(
    ("error", "sentence", "call"),
    [
        (ValueError, "unknown preset 'gong': there are gong2021", lambda: DiversityObjective("gong")),
        (TypeError, "config must be a preset or a mapping", lambda: DiversityObjective(["koleo"])),
        (TypeError, "config must be a preset or a mapping", lambda: DiversityObjective({})),
        (ValueError, "unknown loss 'kolea': the objective has pairwise_cosine", lambda: Term("kolea")),
        (TypeError, "the weight of koleo must be a number, got str", lambda: Term("koleo", "1")),
        (ValueError, "the weight of koleo must be finite, got nan", lambda: Term("koleo", float("nan"))),
        (ValueError, "layers of koleo must be block numbers or 'embeddings' or 'all', got 'last'",
         lambda: Term("koleo", layers="last")),
        (ValueError, r"layers of koleo must be block numbers or 'embeddings' or 'all', got \(\)",
         lambda: Term("koleo", layers=())),
        (ValueError, "layers of koleo must be block numbers or 'embeddings' or 'all', got -1",
         lambda: Term("koleo", layers=-1)),
        (ValueError, "layers of head_mhs must be block numbers or .all., got",
         lambda: Term("head_mhs", layers=["embeddings"])),
        (ValueError, "layers of patch_contrast must be two blocks",
         lambda: Term("patch_contrast", layers=[1])),
        (ValueError, "layers of patch_contrast must be two blocks",
         lambda: Term("patch_contrast", layers="all")),
        (ValueError, "koleo has no option 'penalty'; its options are",
         lambda: Term("koleo", options={"penalty": "abs"})),
        (ValueError, "reduction of koleo must be 'mean' or 'sum'",
         lambda: Term("koleo", options={"reduction": "none"})),
        (ValueError, "koleo takes block 4, but the model has 4 blocks",
         lambda: DiversityObjective({"k": Term("koleo", layers=[4])}).attach(a_model())),
        (ValueError, "koleo takes block -5, but the model has 4 blocks",
         lambda: DiversityObjective({"k": Term("koleo", layers=[-5])}).attach(a_model())),
        (TypeError, "neighbourhood_contrast needs model.patch_embed and model.norm",
         lambda: DiversityObjective({"neighbourhood_contrast": 1}).attach(headless())),
        (TypeError, "model must have its blocks in model.blocks",
         lambda: DiversityObjective({"koleo": 1}).attach(nn.Linear(2, 2))),
        (TypeError, r"blocks\[0\].attn, Rotating, mixes, rotates or biases",
         lambda: DiversityObjective({"head_mhs": 1}).attach(rotating())),
        (TypeError, r"blocks\[4\].attn must have qkv",
         lambda: DiversityObjective({"weight_mhs": 1}).attach(tuples())),
        (RuntimeError, "attached already: detach it first",
         lambda: DiversityObjective({"koleo": 1}).attach(a_model()).attach(a_model())),
        (ValueError, r"patch_mixing needs mixing=\(labels, others, shares\)",
         lambda: evaluate("gong2021", a_model(), images())),
        (TypeError, "region_mixing needs model.norm and model.patch_head: set the latter to nn.Linear",
         lambda: DiversityObjective("gong2021_released").attach(a_model())),
        (ValueError, r"region_mixing needs regions=\(targets, masks\)",
         lambda: evaluate("gong2021_released", headed(), images())),
        (ValueError, r"masks must have shape \[R, rows, columns\] of 16 patches, got \[2, 3, 3\]",
         lambda: regions_of(headed(), torch.ones(2, 3, 3))),
        (TypeError, r"task must be a loss, a tensor of one number, got shape \[3\]",
         lambda: with_task(torch.ones(3))),
        (TypeError, "task must be a loss, a tensor of one number, got float", lambda: with_task(1.0)),
        (TypeError, "with_task of koleo must be True or False, got 'no'",
         lambda: Term("koleo", with_task="no")),
        (ValueError, "with_task must be False but for patch_mixing with reduction 'mean', got True for koleo",
         lambda: Term("koleo", with_task=True)),
        (ValueError, "with_task must be False but for patch_mixing with reduction 'mean', got True for patch",
         lambda: Term("patch_mixing", options={"reduction": "sum"}, with_task=True)),
        (ValueError, "cos_reg takes block 4, but the model has 4",
         lambda: DiversityObjective("deepvit_32b").attach(a_model())),
    ],
)  # fmt: skip
def test_bad_input_gets_a_sentence(error, sentence, call):
    with pytest.raises(error, match=sentence):
        call()


def test_blocks_that_give_no_tokens_get_a_sentence():
    model = tuples()
    with DiversityObjective({"koleo": 1}).attach(model) as objective:
        model.blocks[4](torch.randn(1, 5, 16))
        with pytest.raises(
            TypeError, match=r"blocks\[4\] must give tokens \[B, N, D\], or a tuple .*; its tokens are tuple"
        ):
            objective()


def test_a_patch_embedding_that_gives_no_tokens_gets_a_sentence():
    model = a_model()
    model.patch_embed = nn.Identity()
    with DiversityObjective({"neighbourhood_contrast": 1}).attach(model) as objective:
        model.patch_embed(torch.randn(1, 16, 4, 4))
        model.blocks[3](torch.randn(1, 17, 16))
        with pytest.raises(
            TypeError, match=r"model.patch_embed must give tokens \[B, N, D\]; they are \[1, 16, 4, 4\]"
        ):
            objective()


def test_a_failed_attach_leaves_no_hooks():
    model = a_model()
    with pytest.raises(ValueError, match="takes block 9"):
        DiversityObjective({"koleo": 1, "head_mhs": Term("head_mhs", layers=[9])}).attach(model)
    assert hooks_of(model) == 0
