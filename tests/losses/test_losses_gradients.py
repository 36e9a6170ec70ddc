"""Gradient diversity against its formula."""

import math

import pytest
import torch
from loss_checks import (
    assert_autocast_has_no_influence,
    assert_finite,
    assert_is_its_formula,
    assert_takes_halves,
    bad_input,
)

from vitdiv_kernels import losses

G = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(19)) + 0.2


def formula(g):
    values = [sum(v @ v for v in image) / (image.sum(0) @ image.sum(0)) for image in g]
    return -sum(values) / len(values)


def test_gradient_diversity():
    assert_is_its_formula(losses.gradient_diversity, formula, G)
    assert_autocast_has_no_influence(losses.gradient_diversity, G)
    assert_takes_halves(losses.gradient_diversity, G)
    each = losses.gradient_diversity(G, reduction="none")
    torch.testing.assert_close(each[1], formula(G[1:]))
    torch.testing.assert_close(losses.gradient_diversity(G, reduction="sum"), each.sum())
    for scale in (1e-4, 1e-9, 1e9):  # of a small loss, of a mean over many images
        torch.testing.assert_close(losses.gradient_diversity(scale * G), formula(G))


def test_equal_opposite_zero_and_single_gradients():
    assert losses.gradient_diversity(torch.ones(1, 4, 3)).item() == pytest.approx(-1 / 4)
    assert losses.gradient_diversity(torch.ones(1, 1, 3)).item() == pytest.approx(-1)
    assert_finite(losses.gradient_diversity, torch.tensor([[1.0, 2.0], [-1.0, -2.0]]))
    value, (grad,) = assert_finite(losses.gradient_diversity, torch.zeros(2, 4, 3))
    assert value.item() == 0
    assert not grad.any()


def test_nan_is_kept_unless_asked():
    g = G.clone()
    g[0, 0, 0] = math.nan
    assert losses.gradient_diversity(g).isnan()
    torch.testing.assert_close(
        losses.gradient_diversity(g, replace_nan=True), formula(torch.where(g.isnan(), 1e-8, g))
    )
    nan = torch.full((4, 3), math.nan)
    assert losses.gradient_diversity(nan, replace_nan=True, eps=1e-20).item() == pytest.approx(-1 / 4)
    g[0, 0, 0] = math.inf
    assert losses.gradient_diversity(g, replace_nan=True).isnan()


def test_it_can_be_trained_on():
    patches = G.clone().requires_grad_()
    (g,) = torch.autograd.grad((patches**3).sum(), patches, create_graph=True)
    losses.gradient_diversity(g).backward()
    squares = (3 * G**2).requires_grad_()
    formula(squares).backward()
    torch.testing.assert_close(patches.grad, squares.grad * 6 * G)


BAD = [
    (lambda: losses.gradient_diversity(None), TypeError, ["gradients", "NoneType"]),
    (lambda: losses.gradient_diversity(G[0, 0]), ValueError, ["gradients", "[..., N, D]", "[4]"]),
    (lambda: losses.gradient_diversity(G, eps=0), ValueError, ["eps", "positive"]),
    (lambda: losses.gradient_diversity(G, reduction="max"), ValueError, ["reduction", "'max'"]),
]

test_bad_input_gets_a_sentence = bad_input(BAD)
