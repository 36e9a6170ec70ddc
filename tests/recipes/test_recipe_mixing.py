"""Batches mixed by recipes: timm's and Diverse-ViT's formulas, and what timm makes of a recipe."""

import math
import sys
from dataclasses import replace

import pytest
import released_steps as released
import torch
from torch import nn

from vitdiv_kernels import losses, recipes
from vitdiv_kernels.recipes import mixing, with_timm

CLASSES = 5
IMAGES = torch.rand(6, 3, 12, 12, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])
RECIPE = recipes.load("diverse_vit_deit_small")


def mixed(recipe, seed=0, images=IMAGES):
    generator = torch.Generator().manual_seed(seed)
    labels = LABELS[: len(images)]
    return recipes.mix(recipe, images, labels, classes=CLASSES, grid=(3, 3), generator=generator)


def share_of_own(batch):
    """The share of each pixel that is the image's own, from images that differ everywhere."""
    own, other = IMAGES, IMAGES.flip(0)
    return (batch.images - other) / (own - other)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("changes", [{}, {"cutmix": 0.0}, {"mixup": 0.0}], ids=["both", "mixup", "cutmix"])
def test_labels_are_those_of_the_pixels(seed, changes):
    recipe = replace(RECIPE, **changes)
    batch = mixed(recipe, seed)
    weights = share_of_own(batch)[0, 0]
    labels, others, shares = batch.mixing
    assert torch.equal(labels, LABELS)
    assert torch.equal(others, LABELS.flip(0))
    by_patch = weights.unfold(0, 4, 4).unfold(1, 4, 4).mean((-2, -1)).flatten()
    torch.testing.assert_close(shares, by_patch, rtol=1e-3, atol=1e-3)
    expected = released.mixed_labels(LABELS, CLASSES, weights.mean(), 0.1, IMAGES)
    torch.testing.assert_close(batch.targets, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(batch.targets.sum(-1), torch.ones(6))
    is_box = ((weights - weights.round()).abs() < 1e-3).all()
    assert is_box or not recipe.cutmix or recipe.mixup
    assert not is_box or recipe.cutmix
    assert batch.regions is None
    again = mixed(recipe, seed)
    assert torch.equal(again.images, batch.images)
    assert torch.equal(again.targets, batch.targets)


def test_mixup_and_cutmix_take_turns_by_their_probability():
    def cut(batch):
        shares = batch.mixing[2]
        return len(set(shares.tolist())) > 1

    for probability, low, high in ((0.0, 0, 0), (0.5, 60, 130), (1.0, 140, 200)):
        recipe = replace(RECIPE, cutmix_probability=probability)
        assert low <= sum(cut(mixed(recipe, seed)) for seed in range(200)) <= high
    unmixed = replace(RECIPE, mix_probability=0.3)
    whole = sum(torch.equal(mixed(unmixed, seed).images, IMAGES) for seed in range(200))
    assert 110 < whole < 170
    plain = mixed(replace(RECIPE, mixup=0.0, cutmix=0.0))
    assert torch.equal(plain.images, IMAGES)
    assert torch.equal(plain.mixing[2], torch.ones(9))
    # Beta(0.1, 0.1) is near 0 or 1, Beta(100, 100) near a half
    extreme = [mixed(replace(RECIPE, mixup=a, cutmix=0.0)).mixing[2][0].item() for a in (0.01, 1000.0)]
    assert min(extreme[0], 1 - extreme[0]) < 0.1
    assert abs(extreme[1] - 0.5) < 0.1


def test_half_images_and_odd_batches():
    half = mixed(recipes.load("gong2021"), images=IMAGES.bfloat16())
    assert (half.images.dtype, half.targets.dtype) == (torch.bfloat16, torch.float32)
    batch = mixed(replace(RECIPE, cutmix=0.0), images=IMAGES[:3])
    torch.testing.assert_close(batch.images[1], IMAGES[1])
    assert not torch.equal(batch.images[0], IMAGES[0])


@pytest.mark.parametrize("seed", range(4))
def test_gong_mixes_twice(seed):
    recipe = recipes.load("gong2021")
    batch = mixed(recipe, seed)
    targets, masks = batch.regions
    generator = torch.Generator().manual_seed(seed)
    before = recipes.mix(
        replace(recipe, two_image_mixing=False, losses={}), IMAGES, LABELS,
        classes=CLASSES, grid=(3, 3), generator=generator,
    )  # fmt: skip
    again = losses.region_masks(3, generator=generator)
    assert torch.equal(masks, again)
    order = torch.randperm(6, generator=generator)
    expected = losses.mix_two_images(before.images, before.targets, masks, order)
    for got, want in zip((batch.images, batch.targets, targets), expected, strict=True):
        assert torch.equal(got, want)
    torch.testing.assert_close(targets.sum(-1), torch.ones(6, 2))


class Draw:
    """Gives the numbers of a list."""

    def __init__(self, *numbers):
        self.numbers = iter(numbers)

    def randrange(self, _):
        return next(self.numbers)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.01, 1.0, 0.5])
@pytest.mark.parametrize("centre", [(5, 7), (0, 12), (3, 2), (10, 0)])
def test_boxes_are_those_of_the_released_code(share, centre):
    """`rand_bbox` of Diverse-ViT's mix.py and of the timm 0.3 that the others use."""
    expected = []
    for pixels, middle in zip((11, 13), centre, strict=True):
        half = int(pixels * math.sqrt(1 - share)) // 2
        expected += [min(max(middle - half, 0), pixels), min(max(middle + half, 0), pixels)]
    assert list(mixing._box(11, 13, share, Draw(*centre))) == expected


@pytest.mark.parametrize("alpha", [1.0, 20.0])
def test_areas_are_those_of_the_beta_distribution(alpha):
    """The mean area over a grid of lambdas, weighted by their density, and over all centres."""
    lambdas = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    density = (lambdas * (1 - lambdas)) ** (alpha - 1)
    sides = []
    for pixels in (24, 48):
        half, centre = ((1 - lambdas).sqrt() * pixels).long().unsqueeze(1) // 2, torch.arange(pixels)
        sides.append(((centre + half).clamp_max(pixels) - (centre - half).clamp_min(0)).double() / pixels)
    recipe = replace(RECIPE, mixup=0.0, cutmix=alpha, losses={})
    draws, images = torch.Generator().manual_seed(0), torch.zeros(2, 1, 24, 48)
    images[0] = 1
    areas = []
    for _ in range(1500):
        batch = recipes.mix(recipe, images, LABELS[:2], classes=2, grid=(1, 1), generator=draws)
        areas.append(1 - batch.images[0].mean())
    areas = torch.stack(areas).double()
    for power in (1, 2):
        each = (sides[0] ** power).mean(1) * (sides[1] ** power).mean(1)
        expected = float((density * each).sum() / density.sum())
        found = areas**power
        assert abs(found.mean() - expected) < 4 * found.std() / math.sqrt(len(found))


@pytest.mark.parametrize("images", [IMAGES[0], IMAGES[:5]])
def test_images_and_labels_that_do_not_fit_get_a_sentence(images):
    generator = torch.Generator()
    with pytest.raises(
        ValueError, match=r"images and labels must have shapes \[B, channels, height, width\]"
    ):
        recipes.mix(RECIPE, images, LABELS, classes=CLASSES, grid=(3, 3), generator=generator)


@pytest.mark.parametrize(
    ("labels", "given"), [([0, 1], "list"), (torch.zeros(2, dtype=torch.int32), "int32")]
)
def test_labels_are_whole_numbers_of_64_bits(labels, given):
    options = dict(classes=2, grid=(2, 2), generator=torch.Generator())
    with pytest.raises(TypeError, match=f"labels must be a torch.Tensor of dtype int64, got {given}"):
        recipes.mix(recipes.load("digits"), torch.rand(2, 3, 8, 8), labels, **options)


@pytest.mark.parametrize(("labels", "given"), [([0, 5], "0 to 5"), ([-1, 2], "-1 to 2")])
def test_labels_are_of_the_classes(labels, given):
    options = dict(classes=5, grid=(2, 2), generator=torch.Generator())
    sentence = rf"labels must be from 0 to 4 \(classes=5\), got {given}"
    with pytest.raises(ValueError, match=sentence):
        recipes.mix(RECIPE, torch.rand(2, 3, 8, 8), torch.tensor(labels), **options)


@pytest.mark.parametrize("name", ["deit_small", "deepvit_32b", "gong2021"])
def test_the_transforms_of_timm(torchvision, name):
    pytest.importorskip("timm")
    image = pytest.importorskip("PIL.Image").new("RGB", (300, 260), (200, 100, 50))
    recipe = replace(recipes.load(name), image_size=64)
    for training in (True, False):
        transform = with_timm.transform(recipe, training)
        assert transform(image).shape == (3, 64, 64)
    expected = (torch.tensor([200, 100, 50]) / 255 - torch.tensor(recipe.mean)) / torch.tensor(recipe.std)
    torch.testing.assert_close(transform(image)[:, 30, 30], expected)
    parts = {type(part).__name__: part for part in with_timm.transform(recipe).transforms}
    assert tuple(parts["RandomResizedCropAndInterpolation"].scale) == (0.08, 1.0)
    assert parts["RandomErasing"].probability == 0.25
    assert "ColorJitter" not in parts  # beside RandAugment
    resize = with_timm.transform(recipe, training=False).transforms[0].size
    assert (resize if isinstance(resize, int) else resize[0]) == math.floor(64 / recipe.test_crop)


@pytest.mark.parametrize("training", [True, False])
def test_a_recipe_without_augmentation_gives_the_image(torchvision, training):
    pytest.importorskip("timm")
    pixels = torch.arange(64, dtype=torch.uint8).view(8, 8)
    image = pytest.importorskip("PIL.Image").fromarray(pixels.numpy())
    transform = with_timm.transform(recipes.load("digits"), training)
    torch.testing.assert_close(transform(image), pixels[None] / 255)


@pytest.mark.parametrize("name", ["deit_small", "deepvit_32b"])
def test_the_schedule_of_timm(torchvision, name):
    """Linear from warmup_lr, then half a cosine to min_lr, which stays."""
    pytest.importorskip("timm")
    recipe = recipes.load(name)
    optimizer = torch.optim.AdamW(nn.Linear(1, 1).parameters(), lr=recipe.learning_rate)
    schedule = with_timm.schedule(recipe, optimizer)
    top, low = recipe.learning_rate, recipe.min_lr
    for epoch in (0, 1, 4, 5, 100, 299, 300, 309):
        schedule.step(epoch)
        expected = low + (top - low) * (1 + math.cos(math.pi * min(epoch, 300) / 300)) / 2
        if epoch < 5:
            expected = 1e-6 + epoch / 5 * (top - 1e-6)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
    with pytest.raises(ValueError, match="a recipe with epochs and warmup_epochs"):
        with_timm.schedule(recipes.load("digits"), optimizer)


def test_the_sampler_and_the_average_of_timm(torchvision):
    pytest.importorskip("timm")
    deit, digits = recipes.load("deit_small"), recipes.load("digits")
    sampler = with_timm.sampler(deit, range(512), num_replicas=2, rank=0)
    other = with_timm.sampler(deit, range(512), num_replicas=2, rank=1)
    seen = [*sampler, *other]
    assert len(sampler) == 256
    assert max(map(seen.count, seen)) == 3
    assert with_timm.sampler(digits, range(512)) is None
    model = nn.Linear(2, 2)
    average = with_timm.average(deit, model)
    before = average.module.weight.clone()
    with torch.no_grad():
        model.weight.add_(1)
    average.update(model)
    torch.testing.assert_close(average.module.weight, before + (1 - deit.ema))
    assert with_timm.average(digits, model) is None


def test_timm_that_is_absent_is_named_with_its_extra(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    recipe, layer = recipes.load("diverse_vit_deit_small"), torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=recipe.learning_rate)
    for use in (
        lambda: with_timm.transform(recipe),
        lambda: with_timm.schedule(recipe, optimizer),
        lambda: with_timm.sampler(recipe, range(8), num_replicas=1, rank=0),
        lambda: with_timm.average(recipe, layer),
    ):
        with pytest.raises(ImportError, match=r"vitdiv-kernels\[timm\]"):
            use()
