"""torch's default dtype and device have no influence on losses and measures of tensors that are given."""

import contextlib
import inspect
from dataclasses import replace

import pytest
import torch

from vitdiv_kernels import CollapseMonitor, DiversityObjective, Term, losses, recipes
from vitdiv_kernels.attach.terms import LOSSES
from vitdiv_kernels.vit import ViT, ViTConfig

CONFIG = ViTConfig(image_size=8, channels=1, patch=2, dim=16, depth=3, heads=2, mlp_ratio=1.0, classes=5)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# "meta" stands for a GPU: what is made there can't meet what is on the CPU
DEFAULTS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "device": lambda: torch.device("meta"),
}


@pytest.fixture(params=DEFAULTS)
def defaults(request):
    return DEFAULTS[request.param]


def same(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ViT(replace(CONFIG, reattention=(1,), patch_head=True))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_an_objective(name, model, defaults):
    x, labels, shares = torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.rand(16)
    masks = losses.region_masks(4, share=0.5, generator=torch.Generator().manual_seed(1))
    regions = torch.rand(2, 2, CONFIG.classes).softmax(-1), masks
    found = []
    for context in (contextlib.nullcontext, defaults):
        with DiversityObjective({name: 1.0}).attach(model) as objective:
            model(x)
            generator = torch.Generator().manual_seed(3)
            with context():
                mixing = labels, labels.flip(0), shares
                total, _ = objective(mixing=mixing, regions=regions, generator=generator)
                found.append([total.detach(), *torch.autograd.grad(total, model.blocks[0].attn.qkv.weight)])
    same(*found)


VARIANTS = {
    "patch_mhs": {"variant": "released"},
    "patch_contrast": {"normalise": False},
    "neighbourhood_contrast": {"border": "inside", "window": 3},
    "head_mhs": {"variant": "released"},
    "weight_mhs": {"variant": "released"},
    "cos_reg": {"along": "rows"},
    "patch_mixing": {"smoothing": 0.1},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, model, defaults):
    x, labels, shares = torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.rand(16)
    found = []
    for context in (contextlib.nullcontext, defaults):
        with DiversityObjective({"it": Term(name, options=VARIANTS[name])}).attach(model) as objective:
            model(x)
            with context():
                found.append(objective(mixing=(labels, labels.flip(0), shares))[0].detach())
    same(*found)


PAIRS = ("gram_anchoring", "linear_cka", "vf_loss", "info_nce")
SINGLE = ("koleo", "uniformity", "gradient_diversity", "effective_rank")


@pytest.mark.parametrize("name", [name for name in (*PAIRS, *SINGLE) if hasattr(losses, name)])
def test_dense_losses(name, defaults):
    inputs = [torch.randn(2, 9, 8) for _ in range(2 if name in PAIRS else 1)]
    function = getattr(losses, name)
    expected = function(*inputs)
    with defaults():
        got = function(*inputs)
    same(got, expected)


def test_layers_and_ratios(defaults):
    layers = [(torch.randn(2, 3, 9, 4), torch.randn(2, 3, 9, 4)) for _ in range(3)]
    similarity = losses.layer_similarity(layers)
    expected = losses.similar_block_ratio(similarity, threshold=0.5, token_ratio=0.1)
    with defaults():
        same(losses.layer_similarity(layers), similarity)
        got = losses.similar_block_ratio(similarity, threshold=0.5, token_ratio=0.1)
    same(got, expected)
    assert got[0].dtype == torch.float32
    assert got[0].item() == pytest.approx(2 / 3)


def test_shares_of_a_box(defaults):
    boxes = torch.tensor([[3, 77, 100, 201], [0, 224, 5, 6]])
    with defaults():
        shares = losses.cutmix_shares(boxes, image_size=224, grid=14)
        targets = losses.patch_targets(boxes[:, 0], boxes[:, 2], shares, num_classes=101, smoothing=0.1)
    inside = torch.zeros(2, 224, 224)
    for image, (top, bottom, left, right) in zip(inside, boxes.tolist(), strict=True):
        image[top:bottom, left:right] = 1
    expected = 1 - inside.unfold(1, 16, 16).unfold(2, 16, 16).mean((-2, -1)).flatten(1)
    assert shares.dtype == torch.float32
    torch.testing.assert_close(shares, expected)
    torch.testing.assert_close(targets.sum(-1), torch.ones(2, 196))


def test_two_mixed_images(defaults):
    images, targets = torch.rand(3, 1, 8, 8), torch.rand(3, 5).softmax(-1)
    patches, order = torch.rand(3, 16, 6), torch.tensor([1, 2, 0])

    def made():
        masks = losses.region_masks(4, generator=torch.Generator().manual_seed(3))
        return (
            masks,
            *losses.mix_two_images(images, targets, masks, order),
            losses.region_means(patches, masks),
        )

    expected = made()
    with defaults():
        got = made()
    for one, other in zip(got, expected, strict=True):
        same(one, other)


@pytest.mark.parametrize("name", ["gong2021", "deepvit_32b", "diverse_vit_deit_small"])
def test_images_mixed_by_a_recipe(name, defaults):
    images, labels, recipe = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]), recipes.load(name)

    def tensors(seed):
        draws = torch.Generator().manual_seed(seed)
        batch = recipes.mix(recipe, images, labels, classes=3, grid=(4, 4), generator=draws)
        return [batch.images, batch.targets, *batch.mixing, *(batch.regions or ())]

    for seed in range(3):
        expected = tensors(seed)
        with defaults():
            got = tensors(seed)
        for one, other in zip(got, expected, strict=True):
            same(one, other)


def test_monitor(model, defaults):
    x = torch.randn(2, 1, 8, 8)
    expected = CollapseMonitor(model).measure(x)
    with defaults():
        assert CollapseMonitor(model).measure(x) == expected


def test_every_loss_is_in_a_test_here():
    functions = {name for name, f in vars(losses).items() if inspect.isfunction(f)}
    other = {"layer_similarity", "similar_block_ratio", "cutmix_shares", "patch_targets"}
    other |= {"region_masks", "mix_two_images", "region_means"}
    assert functions - {*LOSSES, *PAIRS, *SINGLE, *other} == set()
