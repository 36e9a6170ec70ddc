"""Crops for training: the mask follows the image."""

import pytest
import torch

from vitdiv_kernels.train.segment.augment import IGNORED, Crop, Ragged


def numbered(height, width):
    """An image whose pixels are the numbers of its mask."""
    mask = torch.randint(0, 200, (height, width), dtype=torch.uint8)
    return mask[None].float(), mask


@pytest.mark.parametrize("shape", [(8, 8), (20, 11), (5, 6), (5, 30)])
def test_the_mask_follows_the_image(shape):
    """At scale 1 no pixel is interpolated, so that each crop has the same numbers in both."""
    images, masks = zip(*(numbered(*shape) for _ in range(32)), strict=True)
    crop = Crop(8, mirror=True)
    out, labels = crop(Ragged(images), Ragged(masks), torch.Generator().manual_seed(0))
    assert out.shape == (32, 1, 8, 8)
    inside = labels != IGNORED
    assert torch.equal(out[:, 0][inside], labels[inside].float())
    assert (out[:, 0][~inside] == 0).all()
    # as much of the image as there is room for
    expected = min(8, shape[0]) * min(8, shape[1])
    assert inside.sum((1, 2)).tolist() == [expected] * 32


def test_half_of_the_crops_are_mirrored_with_their_masks():
    image, mask = numbered(8, 8)
    out, labels = Crop(8, mirror=True)(
        image.expand(64, -1, -1, -1), mask.expand(64, -1, -1), torch.Generator().manual_seed(0)
    )
    turned = [torch.equal(each, mask.flip(-1)) for each in labels]
    assert 20 < sum(turned) < 44
    for each, pixels, flipped in zip(labels, out, turned, strict=True):
        assert torch.equal(each, mask.flip(-1) if flipped else mask)
        assert torch.equal(pixels[0], each.float())


@pytest.mark.parametrize(("scale", "side"), [(2.0, 4), (0.5, 16)])
def test_a_scaled_crop_shows_the_same_place_in_both(scale, side):
    """The edge of two halves stays where it is."""
    mask = torch.zeros(32, 32, dtype=torch.uint8)
    mask[:, 16:] = 1
    image = mask[None].float()
    out, labels = Crop(8, scale=(scale, scale))(
        image.expand(16, -1, -1, -1), mask.expand(16, -1, -1), torch.Generator().manual_seed(1)
    )
    # where a pixel is half of either, its class is one of the two
    assert ((out[:, 0] - labels).abs() <= 0.5).all()
    wide = {labels[i].float().mean().item() for i in range(16)}
    assert len(wide) > 2  # places differ
    again = Crop(side).centres(image[None], mask[None])[1][0]
    assert again[:, : side // 2].max() == 0
    assert again[:, side // 2 :].min() == 1


def test_images_are_resized_before_the_crop():
    image, mask = torch.ones(1, 64, 40), torch.ones(64, 40, dtype=torch.uint8)
    out, labels = Crop(8, resize=8).centres(Ragged([image]), Ragged([mask]))
    assert out.shape == (1, 1, 8, 8)
    assert (labels == 1).all()  # 40 pixels became 8: the crop is as wide as the image


def test_parts_of_a_batch_are_what_they_are_in_the_whole():
    images, masks = zip(*(numbered(12, 12) for _ in range(6)), strict=True)
    images, masks, crop = torch.stack(images), torch.stack(masks), Crop(8, scale=(0.5, 2.0), mirror=True)
    whole = crop(images, masks, torch.Generator().manual_seed(2))
    places = [0, 3, 5]
    part = crop(images[places], masks[places], torch.Generator().manual_seed(2), places, 6)
    for each, expected in zip(part, whole, strict=True):
        assert torch.equal(each, expected[places])
    assert not torch.equal(whole[0], crop(images, masks, torch.Generator().manual_seed(3))[0])


def test_nothing_is_drawn_from_the_global_state():
    state = torch.get_rng_state()
    image, mask = numbered(9, 9)
    state = torch.get_rng_state()
    Crop(8, scale=(0.5, 2.0))(image[None], mask[None], torch.Generator())
    assert torch.equal(state, torch.get_rng_state())


def test_a_ragged_batch_is_indexed_by_lists():
    batch = Ragged([torch.zeros(1), torch.ones(2), torch.ones(3)])
    assert [len(each) for each in batch[[2, 0]]] == [3, 1]
    assert isinstance(batch[[2, 0]].to("cpu"), Ragged)
    assert len(batch[1]) == 2
