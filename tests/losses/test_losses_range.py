"""Losses where scale does not matter, of features far from 1: values and gradients are those near 1."""

import pytest
import torch
from far_vectors import EVERY_RANGE, assert_length_does_not_matter
from loss_checks import value_and_gradients

from vitdiv_kernels import losses
from vitdiv_kernels.attach import monitor

START = torch.randn(2, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
# name: (loss, number of sets); all take eps
WITH_NORMS = {
    "koleo": (losses.koleo, 1),
    "uniformity": (losses.uniformity, 1),
    "gram_anchoring": (losses.gram_anchoring, 2),
    "vf_loss": (losses.vf_loss, 2),
    "info_nce": (losses.info_nce, 2),
    "patch_contrast": (losses.patch_contrast, 2),
    "patch_mhs": (losses.patch_mhs, 1),
    "patch_mhs_released": (lambda x, **options: losses.patch_mhs(x, variant="released", **options), 1),
    "patch_mgd": (lambda x, **options: losses.patch_mgd(x, ridge=0.1, **options), 1),
    "patch_soft_orthogonality": (losses.patch_soft_orthogonality, 1),
    "patch_condition_orthogonality": (
        lambda x, **options: losses.patch_condition_orthogonality(x, start=START, **options),
        1,
    ),
    "weight_mhs": (losses.weight_mhs, 1),
    "weight_mgd": (lambda x, **options: losses.weight_mgd(x, ridge=0.1, **options), 1),
}


@EVERY_RANGE
@pytest.mark.parametrize("width", [4, 20])
@pytest.mark.parametrize("name", WITH_NORMS)
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_vectors_of_any_length(name, width, far):
    loss, sets = WITH_NORMS[name]
    vectors = torch.randn(2, 1, 9, width)[:sets]
    # eps of KoLeo is also added to the distances
    eps = {"eps": far[2]} if name == "koleo" else {}
    assert_length_does_not_matter(loss, lambda *v: loss(*v, **eps), far, *vectors)


MATRICES = pytest.mark.parametrize("shape", [(9, 4), (9, 20)], ids=["N>D", "N<D"])
SCALES = pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-9, 1e9, 1e19, 1e30])


def assert_scale_does_not_matter(loss, scale, *inputs):
    value, grads = value_and_gradients(loss, [(x * scale).float() for x in inputs])
    truth, expected = value_and_gradients(loss, [(x * scale).float().double() / scale for x in inputs])
    assert value.double().item() == pytest.approx(truth.item(), rel=1e-4)
    for a, b in zip(grads, expected, strict=True):
        assert (a.double() * scale - b).abs().max() <= 1e-4 * b.abs().max()


@MATRICES
@SCALES
def test_cka(shape, scale):
    x, y = torch.randn(2, 1, *shape, dtype=torch.float64)
    assert_scale_does_not_matter(losses.linear_cka, scale, x, y)


@MATRICES
def test_cka_of_patches_that_are_nearly_equal(shape):
    """As float32 holds them: the values differ by some units of the last place."""
    x, y = (t.float() for t in 1 + 1e-6 * torch.randn(2, 1, *shape, dtype=torch.float64))
    value, grads = value_and_gradients(losses.linear_cka, [x, y])
    truth, expected = value_and_gradients(losses.linear_cka, [x.double(), y.double()])
    assert value.item() == pytest.approx(truth.item(), rel=1e-5)
    for a, b in zip(grads, expected, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@SCALES
@pytest.mark.parametrize("name", ["gradient_diversity", "residual", "effective_rank"])
def test_measures(name, scale):
    measure = getattr(losses if name == "gradient_diversity" else monitor, name)
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    if name == "effective_rank":  # has an eps of 1e-12
        scale = max(scale, 1e-9)
        got, truth = measure((x * scale).float()), measure(x)
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=0)
    else:
        assert_scale_does_not_matter(lambda x: measure(x).sum(), scale, x)


@pytest.mark.parametrize("along", ["columns", "rows", "maps", "heads"])
def test_mixes_of_any_size(along):
    q, k = torch.randn(2, 2, 3, 5, 4, dtype=torch.float64)
    mix, bias = torch.randn(3, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    # along the heads one factor must be that of all
    sizes = torch.tensor([1e20, 1.0, 1e30] if along != "heads" else [1e20] * 3).double()

    def similarity(mix, dtype):
        mixed = q, k, sizes.unsqueeze(1) * mix, sizes * bias
        layers = [tuple(t.to(dtype) for t in layer) for layer in (mixed, (k, q))]
        return losses.layer_similarity(layers, along=along, reduction="mean")[0, 1]

    got, (grad,) = value_and_gradients(lambda mix: similarity(mix, torch.float32), [mix])
    truth, (expected,) = value_and_gradients(lambda mix: similarity(mix, torch.float64), [mix])
    assert got.item() == pytest.approx(truth.item(), rel=1e-5)
    assert (grad - expected).abs().max() <= 1e-4 * expected.abs().max()
