"""Losses on weight matrices: many at once against one at a time, written out in float64."""

import pytest
import torch
from loss_checks import (
    assert_autocast_has_no_influence,
    assert_finite,
    assert_is_its_formula,
    assert_takes_halves,
    bad_input,
    value_and_gradients,
)
from torch.nn.functional import normalize

from vitdiv_kernels import losses

GENERATOR = torch.Generator().manual_seed(11)
WIDE = torch.randn(3, 4, 6, generator=GENERATOR)  # q, k and v
TALL = torch.randn(6, 4, generator=GENERATOR)
SQUARE = torch.randn(4, 4, generator=GENERATOR)
START = torch.rand(2, 4, generator=GENERATOR, dtype=torch.float64)


def cosines(w, eps=1e-8):
    w = normalize(w, dim=-1, eps=eps)
    return w @ w.mT


def mhs(w, eps=1e-8):
    s = cosines(w, eps)
    return -(2 - 2 * s[~torch.eye(len(s), dtype=torch.bool)]).min()


def mgd(w, ridge=1e-6, eps=1e-8):
    return -torch.logdet(torch.exp(2 * cosines(w, eps) - 2) + ridge * torch.eye(len(w), dtype=w.dtype))


def soft_orthogonality(w):
    return torch.linalg.norm(w @ w.mT - torch.eye(len(w))) ** 2


def condition(gram, start):
    """As published, with one step of power iteration from each start vector."""

    def quotient(matrix, v):
        v = matrix @ v
        return (v @ (matrix @ v)) / (v @ v)

    largest = quotient(gram, start[0].to(gram))
    identity = torch.eye(len(gram), dtype=gram.dtype)
    smallest = quotient(gram - largest * identity, start[1].to(gram)) + largest
    return (largest - smallest) ** 2


LOSSES = {
    "mhs": (losses.weight_mhs, mhs),
    "mhs released": (lambda w, **options: losses.weight_mhs(w, variant="released", **options), mhs),
    "mgd": (losses.weight_mgd, mgd),
    "soft orthogonality": (losses.weight_soft_orthogonality, soft_orthogonality),
    "condition orthogonality": (
        lambda w, **options: losses.weight_condition_orthogonality(w, start=START, **options),
        lambda w: condition(w @ w.mT, START),
    ),
    "condition orthogonality of columns": (
        lambda w, **options: losses.weight_condition_orthogonality(
            w.mT if isinstance(w, torch.Tensor) else [m.mT for m in w], start=START, of="columns", **options
        ),
        lambda w: condition(w @ w.mT, START),
    ),
}
ALL = pytest.mark.parametrize("name", LOSSES)


@ALL
def test_of_packed_and_single_matrices_together(name):
    loss, formula = LOSSES[name]

    def together(packed, single):
        return loss([packed, single])

    def one_by_one(packed, single):
        return sum(formula(w) for w in packed) + formula(single)

    assert_is_its_formula(together, one_by_one, WIDE, SQUARE)
    assert_autocast_has_no_influence(together, WIDE, SQUARE)


@pytest.mark.parametrize("name", ["mhs", "mgd", "soft orthogonality"])
def test_of_tall_matrices(name):
    loss, formula = LOSSES[name]
    assert_is_its_formula(loss, formula, TALL)


def test_ridge_and_eps():
    """Some rows are shorter than eps, or all."""
    norms = TALL.norm(dim=-1)
    assert norms.min() < 2 < norms.max() < 9
    assert_is_its_formula(lambda w: losses.weight_mhs(w, eps=9.0), lambda w: mhs(w, 9.0), TALL)
    assert_is_its_formula(
        lambda w: losses.weight_mgd(w, ridge=0.1, eps=2.0), lambda w: mgd(w, 0.1, 2.0), TALL
    )


@ALL
def test_reductions_keep_the_order(name):
    loss, formula = LOSSES[name]
    matrices = [SQUARE, WIDE, SQUARE + 1, WIDE[0] * 2]
    flat = [w.double() for w in (SQUARE, *WIDE, SQUARE + 1, WIDE[0] * 2)]
    matrices = [w.double() for w in matrices]
    expected = torch.stack([formula(w) for w in flat])
    torch.testing.assert_close(loss(matrices, reduction="none"), expected)
    torch.testing.assert_close(loss(matrices, reduction="mean"), expected.mean())
    torch.testing.assert_close(loss(iter(matrices)), expected.sum())


@ALL
def test_halves(name):
    assert_takes_halves(LOSSES[name][0], WIDE)


@ALL
@pytest.mark.parametrize("w", [torch.zeros(2, 4, 6), torch.ones(2, 4, 6)], ids=["zero", "equal"])
def test_collapsed_weights_are_finite(name, w):
    assert_finite(LOSSES[name][0], w)


def test_values_of_orthogonal_and_zero_weights():
    rotation = torch.linalg.qr(SQUARE.double())[0]
    assert losses.weight_soft_orthogonality(rotation).item() == pytest.approx(0, abs=1e-12)
    assert losses.weight_soft_orthogonality(torch.zeros(4, 6)).item() == 4
    assert losses.weight_soft_orthogonality(torch.zeros(6, 4)).item() == 6
    assert losses.weight_condition_orthogonality(torch.zeros(4, 6)).item() == 0
    assert losses.weight_condition_orthogonality(rotation).item() == pytest.approx(0, abs=1e-12)


def test_the_draw_is_that_of_a_loop():
    """One call for all matrices draws what the published loop over matrices draws."""
    got = losses.weight_condition_orthogonality(WIDE, generator=torch.Generator().manual_seed(2))
    again = losses.weight_condition_orthogonality(WIDE, generator=torch.Generator().manual_seed(2))
    other = losses.weight_condition_orthogonality(WIDE, generator=torch.Generator().manual_seed(3))
    assert torch.equal(got, again)
    assert not torch.equal(got, other)
    generator = torch.Generator().manual_seed(2)
    total = 0
    for w in WIDE:
        start = [torch.rand(4, 1, generator=generator).flatten() for _ in range(2)]
        total = total + condition(w @ w.mT, start)
    torch.testing.assert_close(got, total)


def test_one_backward_reaches_every_parameter():
    parameters = [WIDE.clone(), SQUARE.clone(), WIDE.clone() + 1]
    _, grads = value_and_gradients(lambda *w: losses.weight_soft_orthogonality(w), parameters)
    for w, g in zip(parameters, grads, strict=True):
        gram = w @ w.mT - torch.eye(4)
        torch.testing.assert_close(g, 4 * gram @ w)


def test_soft_orthogonality_refuses_a_second_derivative():
    w = WIDE.clone().requires_grad_()
    (g,) = torch.autograd.grad(losses.weight_soft_orthogonality(w), w, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        g.sum().backward()


BAD = [
    (lambda: losses.weight_mhs([]), ValueError, ["weights", "empty"]),
    (lambda: losses.weight_mhs(5), TypeError, ["weights must be a tensor or a list", "int"]),
    (lambda: losses.weight_mhs([WIDE, "w"]), TypeError, ["weights[1] must be a torch.Tensor", "str"]),
    (lambda: losses.weight_mhs([WIDE, WIDE[0, 0]]), ValueError, ["weights[1]", "[..., N, D]", "[6]"]),
    (lambda: losses.weight_mhs(WIDE[:, :1]), ValueError, ["weights must hold N >= 2", "[3, 1, 6]"]),
    (lambda: losses.weight_mgd(WIDE, ridge=0), ValueError, ["ridge", "0"]),
    (lambda: losses.weight_mgd(WIDE.int()), TypeError, ["weights", "int32"]),
    (lambda: losses.weight_soft_orthogonality(WIDE, reduction="max"), ValueError, ["reduction", "'max'"]),
    (
        lambda: losses.weight_condition_orthogonality(WIDE, of="heads"),
        ValueError,
        ["of", "'rows'", "'heads'"],
    ),
    (
        lambda: losses.weight_condition_orthogonality([WIDE, TALL], start=START),
        ValueError,
        ["start", "[1, 2, 6] or [2, 6]", "[2, 4]"],
    ),
]


test_bad_input_gets_a_sentence = bad_input(BAD)
