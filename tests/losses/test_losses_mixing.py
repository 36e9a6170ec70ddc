"""Patch-wise mixing against masks of pixels and a loop over patches."""

import pytest
import torch
from loss_checks import (
    assert_autocast_has_no_influence,
    assert_is_its_formula,
    assert_takes_halves,
    bad_input,
)
from torch.nn.functional import log_softmax

from vitdiv_kernels import losses

B, C = 3, 5
GRID, PIXELS = (2, 3), (16, 24)
LOGITS = 3 * torch.randn(B, 6, C, generator=torch.Generator().manual_seed(1))
LABELS, OTHERS = torch.tensor([0, 3, 4]), torch.tensor([4, 3, 0])
BOXES = [(0, 16, 0, 24), (0, 0, 5, 5), (3, 13, 2, 21), (8, 16, 8, 16), (0, 5, 20, 24)]


def shares_of_pixels(box):
    mask = torch.ones(PIXELS)
    mask[box[0] : box[1], box[2] : box[3]] = 0
    height, width = PIXELS[0] // GRID[0], PIXELS[1] // GRID[1]
    return mask.unfold(0, height, height).unfold(1, width, width).mean((-2, -1)).flatten()


@pytest.mark.parametrize("box", BOXES)
def test_shares(box):
    torch.testing.assert_close(losses.cutmix_shares(box, image_size=PIXELS, grid=GRID), shares_of_pixels(box))


def test_shares_of_many_boxes():
    got = losses.cutmix_shares(torch.tensor(BOXES), image_size=PIXELS, grid=GRID)
    torch.testing.assert_close(got, torch.stack([shares_of_pixels(box) for box in BOXES]))
    square = losses.cutmix_shares((32, 96, 0, 224), image_size=224, grid=14)
    assert square.shape == (196,)
    assert square.sum() == 196 - 4 * 14


def test_a_box_between_pixels_of_patches_that_do_not_fit():
    """7 pixels and 2 patches: each patch has 3.5."""
    got = losses.cutmix_shares((0, 7, 0, 4), image_size=7, grid=2)
    torch.testing.assert_close(got, torch.tensor([0, 1 - 0.5 / 3.5]).repeat(2))


def soft_labels(shares, smoothing):
    """As published: on and off values, mixed patch by patch."""
    result = torch.full((B, 6, C), smoothing / C, dtype=torch.float64)
    for b in range(B):
        for p in range(6):
            share = shares[p] if shares.dim() == 1 else shares[b, p]
            result[b, p, LABELS[b]] += (1 - smoothing) * share
            result[b, p, OTHERS[b]] += (1 - smoothing) * (1 - share)
    return result


SHARES = torch.tensor([1, 0, 0.25, 0.5, 1, 0], dtype=torch.float64)
EACH = torch.rand(B, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shares", [SHARES, EACH], ids=["batch", "image"])
def test_mixing(shares, smoothing):
    targets = losses.patch_targets(LABELS, OTHERS, shares, num_classes=C, smoothing=smoothing)
    expected = soft_labels(shares, smoothing)
    torch.testing.assert_close(targets, expected)
    torch.testing.assert_close(targets.sum(-1), torch.ones(B, 6, dtype=torch.float64))

    def loss(z):
        return losses.patch_mixing(z, LABELS, OTHERS, shares, smoothing=smoothing)

    def formula(z):
        parts = [-(expected[:, p] * log_softmax(z[:, p], -1)).sum(-1).mean() for p in range(6)]
        return sum(parts) / 6

    assert_is_its_formula(loss, formula, LOGITS)
    assert_autocast_has_no_influence(loss, LOGITS)
    assert_takes_halves(loss, LOGITS)
    options = dict(smoothing=smoothing)
    total = losses.patch_mixing(LOGITS.double(), LABELS, OTHERS, shares, reduction="sum", **options)
    torch.testing.assert_close(total, 6 * formula(LOGITS.double()))
    each = losses.patch_mixing(LOGITS.double(), LABELS, OTHERS, shares, reduction="none", **options)
    torch.testing.assert_close(each, -(expected * log_softmax(LOGITS.double(), -1)).sum(-1))


def test_huge_logits_are_finite():
    assert losses.patch_mixing(1e4 * LOGITS, LABELS, OTHERS, SHARES, smoothing=0.1).isfinite()


BAD = [
    (lambda: losses.cutmix_shares((0, 1, 2), image_size=8, grid=2), ValueError, ["box", "[3]"]),
    (
        lambda: losses.cutmix_shares((0, 1, 2, 3), image_size=(8, 0), grid=2),
        ValueError,
        ["image_size", "(8, 0)"],
    ),
    (lambda: losses.cutmix_shares((0, 1, 2, 3), image_size=8, grid=(2, 2, 2)), ValueError, ["grid"]),
    (lambda: losses.patch_mixing(LOGITS[0], LABELS, OTHERS, SHARES), ValueError, ["logits", "[B, N, C]"]),
    (lambda: losses.patch_mixing(LOGITS, LABELS.float(), OTHERS, SHARES), TypeError, ["labels", "int64"]),
    (lambda: losses.patch_mixing(LOGITS, LABELS, OTHERS[:2], SHARES), ValueError, ["others", "[3]", "[2]"]),
    (
        lambda: losses.patch_mixing(LOGITS, LABELS, OTHERS, SHARES[:5]),
        ValueError,
        ["shares", "[6]", "[3, 6]"],
    ),
    (lambda: losses.patch_mixing(LOGITS, LABELS, OTHERS, 0.5), TypeError, ["shares", "float"]),
    (
        lambda: losses.patch_mixing(LOGITS, LABELS, OTHERS, SHARES, smoothing=2),
        ValueError,
        ["smoothing", "2"],
    ),
    (lambda: losses.patch_targets(LABELS, [1], SHARES, num_classes=C), TypeError, ["others", "list"]),
    (
        lambda: losses.patch_targets(LABELS, OTHERS[:2], SHARES, num_classes=C),
        ValueError,
        ["others", "labels"],
    ),
]


test_bad_input_gets_a_sentence = bad_input(BAD)


def test_a_probability_of_zero_with_share_zero_adds_nothing():
    """0 log 0 is 0, in the value and in the gradients."""
    logits, shares = LOGITS.clone(), SHARES.float()
    logits[:, shares == 1, OTHERS[0]] = -torch.inf  # of images 0 and 2 a label
    labels, others = torch.full((B,), 1), torch.full((B,), int(OTHERS[0]))
    given = logits.clone().requires_grad_()
    got = losses.patch_mixing(given, labels, others, shares, reduction="none")
    (grad,) = torch.autograd.grad(got.sum(), given)
    truth = logits.double().requires_grad_()
    log_p = log_softmax(truth, -1)
    own = shares == 1
    mixed = shares * log_p[..., 1] + (1 - shares) * log_p[..., OTHERS[0]].masked_fill(own, 0)
    (expected,) = torch.autograd.grad(-mixed.sum(), truth)
    assert got.isfinite().all()
    torch.testing.assert_close(got, -mixed.float())
    torch.testing.assert_close(grad, expected.float())


def test_a_probability_of_zero_with_a_share_is_infinite():
    logits = LOGITS.clone()
    logits[0, 2, 1] = -torch.inf
    smoothed = losses.patch_mixing(logits, LABELS, OTHERS, SHARES, smoothing=0.1, reduction="none")
    whole = losses.patch_mixing(logits, LABELS, OTHERS, SHARES, smoothing=1.0, reduction="none")
    for got in (smoothed, whole):
        assert got.isposinf().nonzero().tolist() == [[0, 2]]
        assert not got.isnan().any()


def test_the_gradient_of_shares_of_0_and_1():
    logits, labels, others = torch.randn(2, 3, 4), torch.tensor([0, 1]), torch.tensor([2, 3])
    shares = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)
    losses.patch_mixing(logits, labels, others, shares).backward()
    log_p = logits.log_softmax(-1)
    first, second = (log_p[torch.arange(2), :, y] for y in (labels, others))
    torch.testing.assert_close(shares.grad, (second - first).sum(0) / 6)
