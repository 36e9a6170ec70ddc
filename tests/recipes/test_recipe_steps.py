"""One step of each recipe on a tiny model: loss and gradients are those of the paper's released loop."""

import pytest
import released_steps as released
import torch
import torch.nn.functional as F
from small_vit import small_vit
from torch import nn

from vitdiv_kernels import DiversityObjective, losses, recipes
from vitdiv_kernels.attach.presets import PRESETS
from vitdiv_kernels.nn import TalkingHeadsAttention

B, CLASSES = 4, 5
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def batch(dtype):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(B, 1, 8, 8, generator=generator).to(dtype)
    return images, torch.randint(CLASSES, (B,), generator=generator)


def spread(model, dtype):
    """Weights and biases of all modules away from where they start."""
    torch.manual_seed(2)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3) if p.ndim == 1 else p.data.add_(0.1 * torch.randn_like(p))
    return model.to(dtype)


def gradients(model, loss):
    parameters = list(model.parameters())
    found = torch.autograd.grad(
        loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return torch.cat([g.flatten() for g in found]).double()


def cosine(model, ours, theirs):
    a, b = gradients(model, ours), gradients(model, theirs)
    return F.cosine_similarity(a, b, dim=0).item(), (a.norm() / b.norm()).item()


def assert_the_same_step(model, ours, theirs, value=1e-9):
    """value: how near that is in float64."""
    exact = ours.dtype == torch.float64
    assert ours.item() == pytest.approx(theirs.item(), rel=value if exact else 1e-5)
    likeness, length = cosine(model, ours, theirs)
    assert likeness > (1 - 1e-9 if exact else 0.99999)
    assert length == pytest.approx(1, abs=1e-6 if exact else 1e-4)


def run(recipe, model, images, targets, **given):
    """The package's step: the recipe's losses, and the cross-entropy of the class token."""
    with DiversityObjective(recipe.terms()).attach(model) as objective:
        task = F.cross_entropy(model(images), targets)
        return objective(task=task, **given)


@DTYPES
@pytest.mark.parametrize("mixed", ["cutmix", "mixup"])
def test_diverse_vit(dtype, mixed):
    recipe, model = recipes.load("diverse_vit_deit_small"), spread(small_vit(depth=4), dtype)
    images, labels = batch(dtype)
    cut = losses.cutmix_shares((1, 6, 0, 5), image_size=8, grid=4)
    shares = (cut if mixed == "cutmix" else torch.full((16,), 0.3)).to(dtype)
    share = shares.mean()
    targets = released.mixed_labels(labels, CLASSES, share, recipe.label_smoothing, images)
    total, parts = run(
        recipe, model, images, targets,
        mixing=(labels, labels.flip(0), shares), generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    start = torch.Generator().manual_seed(3)
    theirs = released.diverse_vit(model, images, labels, share, shares, start)
    assert_the_same_step(model, total, theirs)
    # the class token's loss with a weight of its own is another step
    task = F.cross_entropy(model(images), targets)
    undivided = task + sum(term.weight * parts[name] for name, term in recipe.terms().items())
    likeness, length = cosine(model, undivided, theirs)
    assert likeness < 0.99
    assert length > 1.5


@DTYPES
def test_deepvit_32b(dtype):
    recipe = recipes.load("deepvit_32b")
    model = spread(small_vit(depth=14, reattention=range(14)), dtype)
    images, labels = batch(dtype)
    assert (recipe.mixup, recipe.cutmix) == (0.1, 0)
    mixed = 0.8 * images + 0.2 * images.flip(0)
    targets = released.mixed_labels(labels, CLASSES, 0.8, recipe.label_smoothing, images)
    total, parts = run(recipe, model, mixed, targets)
    theirs = released.deepvit(model, mixed, targets, pairs=12)
    assert_the_same_step(model, total, theirs)
    assert parts["cos_reg"].abs() > 1e-3
    for pairs in (11, 13):
        assert abs(total.item() - released.deepvit(model, mixed, targets, pairs).item()) > 1e-4


def gong_model(dtype):
    model = small_vit()
    for block in model.blocks:
        block.attn = TalkingHeadsAttention(16, 2, qkv_bias=True)
    model.patch_head = nn.Linear(16, CLASSES)
    return spread(model, dtype)


@DTYPES
@pytest.mark.parametrize("share", [0.4, 0.0])
def test_gong(dtype, share):
    recipe, model = recipes.load("gong2021"), gong_model(dtype)
    images, labels = batch(dtype)
    targets = released.mixed_labels(labels, CLASSES, 0.7, recipe.label_smoothing, images)  # of CutMix
    assert recipe.two_image_mixing
    masks = losses.region_masks(4, share=share, generator=torch.Generator().manual_seed(4)).to(dtype)
    order = torch.tensor([2, 0, 1, 3])
    mixed, mean, regions = losses.mix_two_images(images, targets, masks, order)
    total, _ = run(recipe, model, mixed, mean, regions=(regions, masks))
    theirs = released.gong(model, images, targets, masks[0], order)
    assert_the_same_step(model, total, theirs, value=1e-7)  # 1e-8 in the class token's logarithm


@DTYPES
def test_deit(dtype):
    recipe, model = recipes.load("deit_small"), spread(small_vit(), dtype)
    images, labels = batch(dtype)
    targets = released.mixed_labels(labels, CLASSES, 0.7, recipe.label_smoothing, images)
    assert not recipe.terms()
    assert_the_same_step(
        model, F.cross_entropy(model(images), targets), released.deit(model, images, targets)
    )


@DTYPES
def test_digits(dtype):
    """Of no paper: the formulas."""
    recipe, model = recipes.load("digits"), spread(small_vit(), dtype)
    images, labels = batch(dtype)
    targets = released.mixed_labels(labels, CLASSES, 1.0, recipe.label_smoothing, images)
    total, _ = run(recipe, model, images, targets)
    tokens = model(images, return_tokens=True)[1]
    _, _, _, maps = released.forward(model, images)
    unit = F.normalize(tokens[-1][:, 1:], dim=-1)
    cosines = (unit @ unit.mT).abs()
    n = unit.shape[1]
    between = F.normalize(tokens[1][:, 1:], dim=-1) @ unit.mT
    own = between.diagonal(dim1=1, dim2=2)
    others = (between.sum(-1) - own) / (n - 1)
    heads = F.normalize(maps[0].flatten(2), dim=-1)
    expected = (
        released.deit(model, images, targets)
        + 0.5 * (cosines.sum((1, 2)) - n).mean() / (n * (n - 1))
        + 0.5 * F.softplus(others - own).mean()
        + 0.01 * (heads @ heads.mT)[:, ~torch.eye(2, dtype=torch.bool)].mean()
    )
    assert_the_same_step(model, total, expected)


@pytest.mark.parametrize(
    ("recipe", "preset"),
    [
        ("gong2021", "gong2021_released"),
        ("diverse_vit_deit_small", "diverse_vit_deit_small"),
        ("deepvit_32b", "deepvit_32b"),
    ],
)
def test_recipes_and_presets_are_the_same(recipe, preset):
    def shown(terms):
        defaults = {"along": "heads", "window": 7, "border": "zeros"}
        return {
            name: (t.loss, t.weight, t.layers, defaults | dict(t.options), t.with_task)
            for name, t in terms.items()
        }

    assert shown(recipes.load(recipe).terms()) == shown(PRESETS[preset])
