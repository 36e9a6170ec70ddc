"""IoU by hand, and windows that add up to the whole image."""

import math

import pytest
import torch
from torch import nn

from vitdiv_kernels.train.segment import measures
from vitdiv_kernels.train.segment.windows import Windows, starts


def test_the_confusion_of_a_hand_made_prediction():
    truth = torch.tensor([[0, 0, 1], [1, 255, 1]], dtype=torch.uint8)
    found = torch.tensor([[0, 1, 1], [0, 2, 1]])
    counts = measures.confusion(truth, found, 4)
    # class 0: 1 of 2 right, and one pixel of class 1 beside; class 1: 2 of 3, and one of class 0 beside
    assert counts[:2, :2].tolist() == [[1, 1], [1, 2]]
    assert counts.sum() == 5
    found = measures.iou(counts).tolist()
    assert found[:2] == pytest.approx([1 / 3, 2 / 4])
    assert all(map(math.isnan, found[2:]))  # nobody has them: they do not count
    assert measures.mean_iou(counts) == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert measures.pixel_accuracy(counts) == pytest.approx(3 / 5)


def test_a_class_that_is_found_where_it_is_not_counts():
    counts = measures.confusion(torch.tensor([0, 0]), torch.tensor([0, 2]), 3)
    assert measures.mean_iou(counts) == pytest.approx((1 / 2 + 0) / 2)


def test_the_iou_is_that_of_scikit_learn():
    jaccard_score = pytest.importorskip("sklearn.metrics").jaccard_score
    truth, found = torch.randint(0, 5, (2, 1000))
    expected = jaccard_score(truth.numpy(), found.numpy(), average=None)
    assert measures.iou(measures.confusion(truth, found, 5)).tolist() == pytest.approx(expected.tolist())


@pytest.mark.parametrize(
    ("length", "window", "stride", "expected"),
    [
        (8, 8, 5, [0]),
        (5, 8, 5, [0]),
        (9, 8, 5, [0, 1]),
        (18, 8, 5, [0, 5, 10]),
        (19, 8, 5, [0, 5, 10, 11]),
        (16, 8, 8, [0, 8]),
    ],
)
def test_windows_cover_a_side_and_end_with_it(length, window, stride, expected):
    assert starts(length, window, stride) == expected


class Doubles(nn.Module):
    """Two classes, by the pixel alone: windows of any place agree."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, images):
        self.calls.append(tuple(images.shape))
        return torch.cat([images, 1 - images], 1)


def test_one_window_is_the_whole_image():
    images, model = torch.rand(3, 1, 8, 8), nn.Conv2d(1, 2, 3, padding=1)
    assert torch.equal(Windows(8, 8, 5)(model, images), model(images))


@pytest.mark.parametrize("shape", [(8, 8), (20, 13), (5, 30), (3, 4)])
def test_windows_of_a_pointwise_model_add_up_to_the_image(shape):
    images, model = torch.rand(2, 1, *shape), Doubles()
    logits = Windows(8, 8, 5)(model, images)
    torch.testing.assert_close(logits, torch.cat([images, 1 - images], 1))
    assert {call[1:] for call in model.calls} == {(1, 8, 8)}


def test_where_windows_overlap_the_logits_are_means():
    class Position(nn.Module):
        def forward(self, images):
            return torch.arange(4.0).expand(len(images), 1, 4, 4)

    # of windows at 0 and 2 the columns are 0 1 2 3 and . . 0 1 2 3
    logits = Windows(4, 4, 2)(Position(), torch.zeros(1, 1, 4, 6))
    assert logits[0, 0, 0].tolist() == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("shape", [(17, 9), (4, 20), (13, 13)])
@pytest.mark.parametrize("stride", [1, 4, 6])
def test_windows_of_any_model_are_the_mean_pixel_by_pixel(shape, stride):
    class Model(nn.Module):
        def forward(self, images):
            return torch.cat([images.cumsum(-1), images.cumsum(-2)], 1)

    model, images = Model(), torch.rand(2, 1, *shape)
    height, width = (max(6, side) for side in shape)
    padded = torch.zeros(2, 1, height, width)
    padded[..., : shape[0], : shape[1]] = images
    total, times = torch.zeros(2, 2, height, width), torch.zeros(height, width)
    for top in {*range(0, height - 5, stride), height - 6}:
        for left in {*range(0, width - 5, stride), width - 6}:
            place = (..., slice(top, top + 6), slice(left, left + 6))
            total[place] += model(padded[place])
            times[place] += 1
    expected = (total / times)[..., : shape[0], : shape[1]]
    torch.testing.assert_close(Windows(6, 6, stride)(model, images), expected)


def test_other_windows_are_resized_for_the_model_and_back():
    model = Doubles()
    images = torch.full((1, 1, 24, 30), 0.25)
    logits = Windows(8, 12, 12)(model, images)
    assert logits.shape == (1, 2, 24, 30)
    torch.testing.assert_close(logits[:, 0], images[:, 0])
    assert model.calls == [(6, 1, 8, 8)]


def test_images_are_resized_first_and_logits_back():
    model = Doubles()
    logits = Windows(8, 8, 8, resize=8)(model, torch.full((1, 1, 16, 32), 0.5))
    assert model.calls == [(2, 1, 8, 8)]
    assert logits.shape == (1, 2, 16, 32)


def test_windows_with_gaps_are_refused():
    with pytest.raises(ValueError, match=r"--stride must be at most the window \(8\)"):
        Windows(8, 8, 9)
