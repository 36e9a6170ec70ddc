"""Regions of two mixed images, and the contrast of neighbours, against formulas patch by patch."""

import random

import pytest
import torch
from loss_checks import (
    assert_autocast_has_no_influence,
    assert_is_its_formula,
    assert_reductions,
    assert_takes_halves,
    value_and_gradients,
)
from torch.nn.functional import kl_div, normalize

from vitdiv_kernels import losses

B, C, D = 3, 5, 6
GRID = (4, 5)
MASKS = losses.region_masks(GRID, share=0.3, generator=torch.Generator().manual_seed(1))
PATCHES, IMAGES, LOGITS = (
    torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    for shape in ((B, 20, D), (B, 2, 8, 15), (B, 2, C))
)
TARGETS = torch.rand(B, C, generator=torch.Generator().manual_seed(3)).softmax(-1)
ORDER = torch.tensor([2, 0, 1])
BOTH = torch.stack([TARGETS, TARGETS[ORDER]], 1)


def released_box(size, share, draw):
    """`generate_mask` of the released code for a square: top, bottom, left and right."""
    patches = int(size * size * share)
    length = draw(1, max(1, min(size, patches) - 1))
    width = patches // length
    if width > size:
        width = size
        length = patches // width
    top = draw(0, max(0, size - length))
    left = draw(0, max(0, size - width))
    return top, top + length, left, left + width


@pytest.mark.parametrize("size", [4, 7, 14])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.77, 0.99, 1.0])
def test_boxes_are_those_of_the_released_code(size, share, monkeypatch):
    """The same, when both draw the same numbers from the same ranges."""
    for seed in range(5):
        generators, ranges = [random.Random(seed) for _ in range(2)], ([], [])

        def draw(low, high, which=1, generators=generators, ranges=ranges):
            ranges[which].append((low, high))
            return generators[which].randint(low, high)

        with monkeypatch.context() as patched:
            patched.setattr(torch, "randint", lambda low, high, *_, draw=draw, **__: draw(low, high - 1, 0))
            got = losses.region_masks(size, share=share)
        top, bottom, left, right = released_box(size, share, draw)
        expected = torch.zeros(size, size)
        expected[top:bottom, left:right] = 1
        assert torch.equal(got, torch.stack([expected, 1 - expected]))
        assert ranges[0] == ranges[1]


def test_boxes_have_at_most_the_share_and_are_not_all_alike():
    generator = torch.Generator().manual_seed(0)
    for share in (0.2, 0.5):
        masks = [losses.region_masks((6, 9), share=share, generator=generator) for _ in range(40)]
        assert all(mask[0].sum() <= share * 54 for mask in masks)
        assert sum(mask[0].sum().item() for mask in masks) > 0.7 * 40 * share * 54
        assert len({tuple(mask[0].flatten().tolist()) for mask in masks}) > 10
        assert all(torch.equal(mask.sum(0), torch.ones(6, 9)) for mask in masks)
    areas = [losses.region_masks(14, generator=generator)[0].mean().item() for _ in range(300)]
    assert 0.38 < sum(areas) / 300 < 0.52  # uniform, less what does not fit


def test_two_images_are_mixed_patch_by_patch():
    mixed, targets, regions = losses.mix_two_images(IMAGES, TARGETS, MASKS, ORDER)
    expected = IMAGES.clone()
    for b in range(B):
        for y in range(8):
            for x in range(15):
                if not MASKS[0, y // 2, x // 3]:
                    expected[b, :, y, x] = IMAGES[ORDER[b], :, y, x]
    assert torch.equal(mixed, expected)
    assert not torch.equal(mixed, IMAGES)
    assert torch.equal(regions, BOTH)
    share = MASKS[0].mean()
    torch.testing.assert_close(targets, share * TARGETS + (1 - share) * TARGETS[ORDER])
    for like in (mixed, targets):
        assert like.dtype == torch.float32
    as_bool = losses.mix_two_images(IMAGES, TARGETS, MASKS.bool(), ORDER)
    assert all(torch.equal(a, b) for a, b in zip(as_bool, (mixed, targets, regions), strict=True))


def released_means(patches, masks):
    image = patches.mT.reshape(len(patches), -1, *GRID)
    pooled = [(image * m).mean((2, 3)) * m.numel() / (m.sum() + 1e-4) for m in masks.to(patches)]
    return torch.stack(pooled, 1)


@pytest.mark.parametrize("masks", [MASKS, torch.rand(3, *GRID), torch.zeros(1, *GRID)], ids=len)
def test_means_of_regions(masks):
    def loss(x):
        return losses.region_means(x, masks)

    assert_is_its_formula(loss, lambda x: released_means(x, masks), PATCHES)
    assert_autocast_has_no_influence(loss, PATCHES)
    exact = losses.region_means(PATCHES.double(), masks[:1], eps=0)
    if masks.any():
        weights = masks[0].double().flatten()
        torch.testing.assert_close(exact[:, 0], (weights @ PATCHES.double()) / weights.sum())


def released_regions(logits, targets, masks):
    """Region by region, as published."""
    total = 0
    for r, mask in enumerate(masks):
        log_p = (1e-8 + logits[:, r].softmax(-1)).log()
        total = total + mask.sum() / mask.numel() * kl_div(log_p, targets[:, r], reduction="batchmean")
    return total


def test_region_mixing():
    targets = BOTH.clone()
    targets[0, 0] = torch.eye(C)[2]  # 0 log 0

    def loss(z):
        return losses.region_mixing(z, targets.to(z), MASKS)

    assert_is_its_formula(loss, lambda z: released_regions(z, targets.to(z), MASKS.to(z)), LOGITS)
    assert_autocast_has_no_influence(loss, LOGITS)
    assert_takes_halves(loss, LOGITS)

    def reduced(z, reduction="mean"):
        targets = BOTH.to(z)[-len(z) :]
        return losses.region_mixing(z, targets, MASKS, reduction=reduction)

    assert_reductions(reduced, LOGITS.double())
    right = BOTH.log()
    assert losses.region_mixing(right, BOTH, MASKS, eps=0).abs() < 1e-6  # the smallest value
    assert torch.equal(
        losses.region_mixing(LOGITS, BOTH, MASKS), losses.region_mixing(LOGITS, BOTH, MASKS.bool())
    )


def test_a_probability_of_zero_is_finite():
    logits, targets = LOGITS.clone(), torch.zeros_like(LOGITS)
    targets[..., 0] = 1
    logits[..., 1] = -torch.inf
    value, (grad,) = value_and_gradients(lambda z: losses.region_mixing(z, targets, MASKS, eps=0), [logits])
    assert value.isfinite()
    assert grad.isfinite().all()
    far = torch.full_like(LOGITS, 0.0)
    far[..., 1:] = 1e4
    value, (grad,) = value_and_gradients(lambda z: losses.region_mixing(z, targets, MASKS), [far])
    assert value.item() == pytest.approx(-torch.tensor(1e-8).log().item(), rel=1e-5)
    assert grad.isfinite().all()


def contrast(x, grid, order, released=False):
    """Patch by patch: `reg_engine.py`."""
    rows, columns = grid
    x = normalize(x, dim=-1).unflatten(1, grid)
    inner = [(i, j) for i in range(1, rows - 1) for j in range(1, columns - 1)]
    patches = torch.stack([torch.stack([image[i, j] for i, j in inner]) for image in x])
    if released:  # the wrong axes, in the order in which the numbers lie in memory
        count, width = patches.shape[1:]
        flat = patches.flatten(1)
        patches = torch.stack([flat[:, p::count][:, :width] for p in range(count)], 1)
    others = patches.flatten(0, 1)[order].view_as(patches)
    values = []
    for image, own, other in zip(x, patches, others, strict=True):
        for p, (i, j) in enumerate(inner):
            near = [
                (image[i, j] @ image[i + di, j + dj]).exp()
                for di in (-1, 0, 1)
                for dj in (-1, 0, 1)
                if (di, dj) != (0, 0)
            ]
            positive = (1e-10 + sum(near) / 8).log()
            negative = torch.cat([own[p] @ own.detach().T, own[p] @ other.detach().T])
            logits = torch.cat([positive.unsqueeze(0), negative])
            values.append(logits.logsumexp(0) - logits[0])
    return torch.stack(values).mean()


@pytest.mark.parametrize("variant", ["corrected", "released"])
@pytest.mark.parametrize("grid", [(4, 5), (3, 3)])
def test_region_contrast(grid, variant):
    x = PATCHES[:, : grid[0] * grid[1]]
    order = torch.randperm(B * (grid[0] - 2) * (grid[1] - 2), generator=torch.Generator().manual_seed(5))

    def loss(x, **options):
        generator = torch.Generator().manual_seed(5)
        return losses.region_contrast(x, grid=grid, variant=variant, generator=generator, **options)

    value, (grad,) = value_and_gradients(loss, [x.double()])
    expected, (expected_grad,) = value_and_gradients(
        lambda x: contrast(x, grid, order, variant == "released"), [x.double()]
    )
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, expected_grad, atol=1e-9, rtol=1e-6)
    assert_autocast_has_no_influence(loss, x)
    assert_takes_halves(loss, x)
    each = loss(x, reduction="none")
    assert each.shape == (B,)
    torch.testing.assert_close(loss(x), each.mean())
    torch.testing.assert_close(loss(x, reduction="sum"), each.sum())
    torch.testing.assert_close(loss(1e20 * x, backend="reference"), loss(x))


def test_released_vectors_are_other_ones():
    x = PATCHES.double()
    values = [
        losses.region_contrast(x, grid=GRID, variant=v, generator=torch.Generator().manual_seed(1))
        for v in ("corrected", "released")
    ]
    assert abs(values[0] - values[1]) > 1e-3


def test_smooth_images_have_less_contrast_than_shuffled_ones():
    """What it is for: neighbours alike, patches far away not."""
    smooth = torch.linspace(0, 3, 64).unflatten(0, (8, 8))
    x = torch.stack([smooth.cos(), smooth.sin()], -1).flatten(0, 1).expand(2, 64, 2)
    shuffled = x[:, torch.randperm(64)]
    generator = torch.Generator().manual_seed(0)
    assert losses.region_contrast(x, generator=generator) < losses.region_contrast(
        shuffled, generator=generator
    )


BAD = [
    (lambda: losses.region_masks(0), ValueError, ["grid", "positive", "0"]),
    (lambda: losses.region_masks((2, 3, 4)), ValueError, ["grid", "one or two", "(2, 3, 4)"]),
    (lambda: losses.region_masks(4, share=1.5), ValueError, ["share", "at most 1", "1.5"]),
    (lambda: losses.mix_two_images(IMAGES[0], TARGETS, MASKS, ORDER), ValueError, ["images", "[2, 8, 15]"]),
    (lambda: losses.mix_two_images(IMAGES, TARGETS[0], MASKS, ORDER), ValueError, ["targets", "[3, C]"]),
    (
        lambda: losses.mix_two_images(IMAGES, ORDER, MASKS, ORDER),
        TypeError,
        ["targets", "int64"],
    ),
    (
        lambda: losses.mix_two_images(IMAGES, TARGETS, torch.ones(2, 3, 5), ORDER),
        ValueError,
        ["masks", "divide 8 x 15", "[2, 3, 5]"],
    ),
    (
        lambda: losses.mix_two_images(IMAGES, TARGETS, MASKS, ORDER.float()),
        TypeError,
        ["order", "int64", "float32"],
    ),
    (lambda: losses.mix_two_images(IMAGES, TARGETS, MASKS, ORDER[:2]), ValueError, ["order", "[3]", "[2]"]),
    (lambda: losses.mix_two_images(IMAGES, TARGETS, MASKS, ORDER + 1), ValueError, ["order", "0 to 2", "3"]),
    (lambda: losses.mix_two_images(IMAGES, TARGETS, MASKS, ORDER - 1), ValueError, ["order", "0 to 2", "-1"]),
    (lambda: losses.region_means(PATCHES[0], MASKS), ValueError, ["patches", "[B, N, D]", "[20, 6]"]),
    (lambda: losses.region_means(PATCHES, MASKS[:, :2]), ValueError, ["masks", "20 patches", "[2, 2, 5]"]),
    (lambda: losses.region_means(PATCHES, MASKS.long()), TypeError, ["masks", "floating or bool", "int64"]),
    (lambda: losses.region_means(PATCHES, MASKS[0]), ValueError, ["masks", "[R, rows, columns]", "[4, 5]"]),
    (lambda: losses.region_mixing(LOGITS[0], BOTH, MASKS), ValueError, ["logits", "[B, R, C]", "[2, 5]"]),
    (lambda: losses.region_mixing(LOGITS, TARGETS, MASKS), ValueError, ["targets", "[3, 2, 5]", "[3, 5]"]),
    (lambda: losses.region_mixing(LOGITS, BOTH, MASKS[:1]), ValueError, ["masks", "[2, rows, columns]"]),
    (lambda: losses.region_mixing(LOGITS, BOTH, MASKS, eps=-1), ValueError, ["eps", "at least 0"]),
    (lambda: losses.region_contrast(PATCHES), ValueError, ["grid", "20", "a square"]),
    (lambda: losses.region_contrast(PATCHES, grid=(2, 10)), ValueError, ["grid", "3 x 3", "2 x 10"]),
    (lambda: losses.region_contrast(PATCHES[0]), ValueError, ["x", "[B, N, D]", "[20, 6]"]),
    (
        lambda: losses.region_contrast(PATCHES, grid=GRID, variant="paper"),
        ValueError,
        ["variant", "'corrected', 'released'", "'paper'"],
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD)
def test_bad_input_gets_a_sentence(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
