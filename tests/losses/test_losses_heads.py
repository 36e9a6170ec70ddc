"""Losses on attention maps against their formulas on the maps themselves, in float64."""

import math

import pytest
import torch
from formulas import softmax_maps
from loss_checks import (
    assert_finite,
    assert_is_its_formula,
    assert_reductions,
    bad_input,
    value_and_gradients,
)
from torch.nn.functional import normalize

from vitdiv_kernels import losses

B, H, N, M, d = 2, 3, 4, 5, 3
GENERATOR = torch.Generator().manual_seed(7)
Q, Q2 = torch.randn(2, B, H, N, d, generator=GENERATOR)
K, K2 = torch.randn(2, B, H, M, d, generator=GENERATOR)
START = torch.randn(2, H, generator=GENERATOR, dtype=torch.float64)
OFF = ~torch.eye(H, dtype=torch.bool)


def maps(q, k):
    return softmax_maps(q, k).flatten(2)


def cosines(q, k, *other):
    first = normalize(maps(q, k), dim=-1)
    return first @ (normalize(maps(*other), dim=-1) if other else first).mT


def contrast(q, k, q2, k2):
    c = cosines(q, k, q2, k2)
    own, others = c.diagonal(dim1=-2, dim2=-1), c[:, OFF].unflatten(-1, (H, H - 1)).mean(-1)
    return -(own.exp() / (own.exp() + others.exp())).log().mean()


def mhs(q, k):
    return -(2 - 2 * cosines(q, k))[:, OFF].amin(-1).mean()


def mgd(q, k, ridge=1e-6):
    return -torch.logdet(torch.exp(2 * cosines(q, k) - 2) + ridge * torch.eye(H, dtype=q.dtype)).mean()


def soft_orthogonality(q, k):
    a = maps(q, k)
    return (a @ a.mT - torch.eye(H)).square().sum((-2, -1)).mean()


def condition_orthogonality(q, k):
    """As published: eigenvalues of matrices, image by image."""

    def quotient(matrix, v):
        v = matrix @ v
        return (v @ (matrix @ v)) / (v @ v + 1e-6)

    values = []
    for a in maps(q, k):
        gram = a @ a.mT
        largest = quotient(gram, START[0].to(gram))
        smallest = quotient(gram - largest * torch.eye(H, dtype=gram.dtype), START[1].to(gram)) + largest
        values.append((largest - smallest) ** 2)
    return torch.stack(values).mean()


def head_condition_orthogonality(q, k, **options):
    return losses.head_condition_orthogonality(q, k, start=START, **options)


TWO = [(losses.head_cross_cosine, lambda *x: cosines(*x).abs().mean()), (losses.head_contrast, contrast)]
ONE = [
    (losses.head_mhs, mhs),
    (lambda q, k, **options: losses.head_mhs(q, k, variant="released", **options), mhs),
    (losses.head_mgd, mgd),
    (
        lambda q, k, ridge=0.1, **options: losses.head_mgd(q, k, ridge=ridge, **options),
        lambda q, k: mgd(q, k, 0.1),
    ),
    (losses.head_soft_orthogonality, soft_orthogonality),
    (head_condition_orthogonality, condition_orthogonality),
]


@pytest.mark.parametrize(("loss", "formula"), ONE)
def test_heads_of_a_layer(loss, formula):
    assert_is_its_formula(loss, formula, Q, K)


@pytest.mark.parametrize(("loss", "formula"), TWO)
def test_heads_of_two_layers(loss, formula):
    assert_is_its_formula(loss, formula, Q, K, Q2, K2)


def test_penalty_and_reductions():
    x = Q.double(), K.double(), Q2.double(), K2.double()
    c = cosines(*x)
    torch.testing.assert_close(losses.head_cross_cosine(*x, penalty="square"), c.square().mean())
    torch.testing.assert_close(losses.head_cross_cosine(*x, reduction="none"), c.mean((1, 2)))
    torch.testing.assert_close(losses.head_cross_cosine(*x, reduction="sum"), c.sum())
    each = losses.head_soft_orthogonality(*x[:2], reduction="none")
    assert each.shape == (B,)
    torch.testing.assert_close(losses.head_soft_orthogonality(*x[:2], reduction="sum"), each.sum())


def test_layers_may_differ_in_heads():
    got = losses.head_cross_cosine(Q, K, Q2[:, :2], K2[:, :2])
    torch.testing.assert_close(got, cosines(Q, K, Q2[:, :2], K2[:, :2]).mean())


@pytest.mark.parametrize(
    ("loss", "inputs"), [(loss, (Q, K)) for loss, _ in ONE] + [(loss, (Q, K, Q2, K2)) for loss, _ in TWO]
)
def test_options_reach_the_maps(loss, inputs):
    scaled = [2 * d**0.5 * x if x is Q or x is Q2 else x for x in inputs]
    torch.testing.assert_close(loss(*inputs, scale=2.0, backend="reference"), loss(*scaled))
    with pytest.raises(RuntimeError, match="cannot run attention_gram"):
        loss(*inputs, backend="triton")
    if loss is not losses.head_cross_cosine:  # its sum is that of all pairs
        assert_reductions(loss, *inputs)


def test_the_draw_repeats():
    def draw(seed):
        return losses.head_condition_orthogonality(Q, K, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    start = torch.randn(B, 2, H, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draw(1), losses.head_condition_orthogonality(Q, K, start=start))


@pytest.mark.parametrize(("loss", "formula"), ONE)
def test_autocast_casts_queries_and_keys_and_nothing_else(loss, formula):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, grads = value_and_gradients(loss, [Q, K])
    assert value.dtype == torch.float32
    expected = loss(Q.bfloat16(), K.bfloat16())
    assert torch.equal(value, expected)
    assert all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize(("loss", "formula"), ONE)
def test_equal_heads_and_uniform_maps_are_finite(loss, formula):
    assert_finite(loss, Q[:, :1].expand(B, H, N, d), K[:, :1].expand(B, H, M, d))
    assert_finite(loss, torch.zeros_like(Q), K)
    assert_finite(loss, 1e4 * Q, K)


def test_what_equal_heads_give():
    equal = Q[:, :1].expand(B, H, N, d), K[:, :1].expand(B, H, M, d)
    assert losses.head_mhs(*equal).item() == pytest.approx(0, abs=1e-6)
    # H - 1 eigenvalues are the ridge, one is H + ridge
    expected = -(H - 1) * math.log(1e-6) - math.log(H + 1e-6)
    assert losses.head_mgd(*equal).item() == pytest.approx(expected, rel=1e-5)


def test_one_head():
    one = Q[:, :1], K[:, :1]
    assert losses.head_mgd(*one).item() == pytest.approx(0, abs=1e-5)
    assert losses.head_condition_orthogonality(*one).item() == pytest.approx(0, abs=1e-5)
    for call in (lambda: losses.head_mhs(*one), lambda: losses.head_contrast(*one, *one)):
        with pytest.raises(ValueError, match=r"H >= 2.*\[2, 1, 4, 3\]"):
            call()


BAD = [
    (lambda: losses.head_contrast(Q, K, Q2[:, :2], K2[:, :2]), ValueError, ["as many heads", "[2, 2, 4, 3]"]),
    (lambda: losses.head_cross_cosine(Q, K, Q2, K2[:1]), ValueError, ["k2", "[1, 3, 5, 3]"]),
    (lambda: losses.head_cross_cosine(Q, K, Q2, K2, penalty="max"), ValueError, ["penalty", "'max'"]),
    (lambda: losses.head_mgd(Q, None), TypeError, ["k must be a torch.Tensor", "NoneType"]),
    (lambda: losses.head_mhs(Q, K, variant=None), ValueError, ["variant", "None"]),
    (lambda: losses.head_mgd(Q, K, ridge=-1), ValueError, ["ridge", "-1"]),
    (lambda: losses.head_soft_orthogonality(Q, K, reduction=1), ValueError, ["reduction", "1"]),
    (
        lambda: losses.head_condition_orthogonality(Q, K, start=START[0]),
        ValueError,
        ["start", "[2, 3]", "[3]"],
    ),
]


test_bad_input_gets_a_sentence = bad_input(BAD)
