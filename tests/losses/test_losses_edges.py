"""All losses at the edges of their input: no images, one patch, integers, labels out of range."""

import inspect
import math

import pytest
import torch
from loss_checks import bad_input, value_and_gradients

from vitdiv_kernels import losses

PATCHES, HEADS = ("B", "N", 6), ("B", 2, "N", 4)
LABELS, MASKS = torch.tensor([0, 1]), torch.ones(2, 3, 3)


def of_layers(q, k):
    return losses.cos_reg([(q, k), (k, q)])


def of_regions(logits):
    return losses.region_mixing(logits, torch.full_like(logits, 0.2), MASKS)


def of_labels(logits):
    labels = torch.zeros(len(logits), dtype=torch.int64)
    return losses.patch_mixing(logits, labels, labels, torch.ones(9))


# name: (loss, shapes, its value of one patch; None where that does not follow from the formula at once, or
# that is another test; a text: words of the error)
LOSSES = {
    "pairwise_cosine": (losses.pairwise_cosine, [PATCHES], "N >= 2"),
    "patch_contrast": (losses.patch_contrast, [PATCHES] * 2, "N >= 2"),
    "patch_mhs": (losses.patch_mhs, [PATCHES], "N >= 2"),
    "patch_mgd": (losses.patch_mgd, [PATCHES], -math.log(1 + 1e-6)),
    "patch_soft_orthogonality": (losses.patch_soft_orthogonality, [PATCHES], 0.0),
    "patch_condition_orthogonality": (losses.patch_condition_orthogonality, [PATCHES], 0.0),
    "neighbourhood_contrast": (losses.neighbourhood_contrast, [PATCHES] * 2, "N >= 2"),
    "koleo": (losses.koleo, [PATCHES], "N >= 2"),
    "uniformity": (losses.uniformity, [PATCHES], "N >= 2"),
    "info_nce": (losses.info_nce, [PATCHES] * 2, 0.0),
    "linear_cka": (losses.linear_cka, [PATCHES] * 2, 0.0),
    "gram_anchoring": (losses.gram_anchoring, [PATCHES] * 2, 0.0),
    "vf_loss": (losses.vf_loss, [PATCHES] * 2, None),
    "region_contrast": (losses.region_contrast, [PATCHES], "at least 3 x 3 patches, got 1 x 1"),
    "region_mixing": (of_regions, [("B", 2, 5)], None),
    "patch_mixing": (of_labels, [("B", 9, 5)], None),
    # the map of one key is 1
    "attention_diversity": (losses.attention_diversity, [HEADS] * 2, 1.0),
    "head_mhs": (losses.head_mhs, [HEADS] * 2, 0.0),
    "head_mgd": (losses.head_mgd, [HEADS] * 2, -math.log((1 + 1e-6) ** 2 - 1)),
    "head_soft_orthogonality": (losses.head_soft_orthogonality, [HEADS] * 2, 2.0),
    "head_condition_orthogonality": (losses.head_condition_orthogonality, [HEADS] * 2, 4.0),
    "head_cross_cosine": (losses.head_cross_cosine, [HEADS] * 4, 1.0),
    "head_contrast": (losses.head_contrast, [HEADS] * 4, math.log(2)),
    "cos_reg": (of_layers, [HEADS] * 2, 1.0),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def given(name, batch=2, n=9):
    """The loss, and tensors for it."""
    loss, shapes, _ = LOSSES[name]
    sizes = {"B": batch, "N": n}
    return loss, [torch.randn([sizes.get(size, size) for size in shape]) for shape in shapes]


@every_loss
def test_no_images(name):
    """As torch's own losses: a mean of nothing is nan, a sum 0, and there is nothing to differentiate."""
    loss, inputs = given(name, batch=0)
    value, grads = value_and_gradients(loss, inputs)
    assert value.shape == ()
    assert value.isnan()
    assert [grad.shape for grad in grads] == [x.shape for x in inputs]
    if "reduction" in inspect.signature(loss).parameters:
        assert loss(*inputs, reduction="sum") == 0
        assert loss(*inputs, reduction="none").shape[0] == 0


@every_loss
def test_one_patch(name):
    loss, inputs = given(name, n=1)
    expected = LOSSES[name][2]
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            loss(*inputs)
        return
    value, grads = value_and_gradients(loss, inputs)
    assert all(grad.isfinite().all() for grad in grads)
    assert value.isfinite()
    if expected is not None:
        assert value.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@every_loss
def test_integers_and_one_dimension_are_refused(name):
    loss, inputs = given(name)
    with pytest.raises(TypeError, match=r"must have one of the dtypes float32, .* got int64"):
        loss(*(x.long() for x in inputs))
    with pytest.raises(ValueError, match=r"must have shape \[.*\], got \[\d+\]"):
        loss(*(x.flatten() for x in inputs))


def mixing(labels=LABELS, others=LABELS):
    return losses.patch_mixing(
        torch.randn(2, 9, 5), torch.as_tensor(labels), torch.as_tensor(others), torch.ones(9)
    )


test_numbers_out_of_range = bad_input(
    [
        (lambda: mixing(labels=[0, 5]), ValueError, ["labels must be classes from 0 to 4, got 5"]),
        (lambda: mixing(labels=[-1, 5]), ValueError, ["labels must be classes from 0 to 4, got -1"]),
        (lambda: mixing(others=[7, 0]), ValueError, ["others must be classes from 0 to 4, got 7"]),
        (
            lambda: losses.patch_targets(LABELS, LABELS + 4, torch.ones(9), num_classes=5),
            ValueError,
            ["others must be classes from 0 to 4, got 5"],
        ),
        (
            lambda: losses.mix_two_images(torch.rand(2, 3, 6, 6), torch.eye(2), MASKS, torch.tensor([0, -1])),
            ValueError,
            ["order must be numbers of images from 0 to 1, got -1"],
        ),
        (
            lambda: losses.region_mixing(torch.randn(2, 2, 5), torch.full((2, 2, 5), -0.5), MASKS),
            ValueError,
            ["targets must not be negative, got -0.5"],
        ),
        (
            lambda: losses.region_means(torch.randn(2, 9, 5), -MASKS),
            ValueError,
            ["masks must not be negative, got -1"],
        ),
    ]
)
