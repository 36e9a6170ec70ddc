"""Losses on dense features against their formulas, with Gram matrices, in float64; and the reductions of
pairs below them."""

import math

import pytest
import torch
from conftest import need
from loss_checks import (
    assert_autocast_has_no_influence,
    assert_finite,
    assert_is_its_formula,
    assert_reductions,
    assert_takes_halves,
    bad_input,
    value_and_gradients,
)
from torch.nn.functional import cross_entropy, mse_loss, normalize

import vitdiv_kernels as vd
from vitdiv_kernels import losses

B, N = 2, 6
GENERATOR = torch.Generator().manual_seed(17)
NARROW, NARROW2 = torch.randn(2, B, N, 4, generator=GENERATOR)
WIDE, WIDE2 = torch.randn(2, B, N, 8, generator=GENERATOR)
LONG, LONG2 = torch.randn(2, B, 26, 4, generator=GENERATOR)  # in closed form
WIDTHS = pytest.mark.parametrize(
    ("x", "y"),
    [(LONG, LONG2), (NARROW, NARROW2), (WIDE, WIDE2), (NARROW, WIDE)],
    ids=["D<N/6", "D<N", "N<D", "two widths"],
)


def unit(x, eps=1e-8):
    return normalize(x, dim=-1, eps=eps)


def gram_loss(x, y, level="image", negatives="keep", normalise=True, eps=1e-12):
    """As published, with masks instead of writes."""
    if normalise:
        x, y = unit(x, eps), unit(y, eps)
    if level == "batch":
        x, y = x.flatten(0, 1), y.flatten(0, 1)
    student, teacher = x @ x.mT, y @ y.mT
    if negatives == "remove":
        student, teacher = student.clamp(min=0), teacher.clamp(min=0)
    if negatives == "remove_teacher":
        student = torch.where((student < 0) & (teacher < 0), 0.0, student)
        teacher = teacher.clamp(min=0)
    if negatives == "remove_teacher_released":
        teacher = teacher.clamp(min=0)
        student = torch.where((student < 0) & (teacher < 0), 0.0, student)
    return mse_loss(student, teacher)


@WIDTHS
@pytest.mark.parametrize("negatives", ["keep", "remove", "remove_teacher", "remove_teacher_released"])
@pytest.mark.parametrize("level", ["image", "batch"])
def test_gram_anchoring(x, y, level, negatives):
    options = dict(level=level, negatives=negatives)
    assert_is_its_formula(
        lambda x, y: losses.gram_anchoring(x, y, **options), lambda x, y: gram_loss(x, y, **options), x, y
    )


def test_gram_anchoring_options_differ():
    values = {losses.gram_anchoring(NARROW, NARROW2, negatives=n).item() for n in losses.dense.NEGATIVES}
    assert len(values) == 4


@WIDTHS
def test_gram_anchoring_of_inner_products(x, y):
    def loss(x, y):
        return losses.gram_anchoring(x, y, normalise=False)

    assert_is_its_formula(loss, lambda x, y: gram_loss(x, y, normalise=False), x, y)
    assert_autocast_has_no_influence(losses.gram_anchoring, x, y)
    assert_takes_halves(losses.gram_anchoring, x, y)


def test_gram_anchoring_keeps_its_digits_near_the_teacher():
    """float32 features, 1e-4 apart: the closed form is as close as the difference of the matrices."""
    teacher = torch.randn(B, 56, 8)
    student = teacher + 1e-4 * torch.randn(B, 56, 8)
    expected = gram_loss(student.double(), teacher.double())
    torch.testing.assert_close(losses.gram_anchoring(student, teacher).double(), expected, rtol=1e-3, atol=0)
    assert losses.gram_anchoring(teacher, teacher).item() == 0


def koleo(x, eps=1e-8):
    x = unit(x, eps)
    n = x.shape[-2]
    nearest = (x @ x.mT - 3 * torch.eye(n)).argmax(-1)
    chosen = torch.stack([a[i] for a, i in zip(x, nearest, strict=True)])
    return -((x - chosen).norm(dim=-1) + eps).log().mean()


@pytest.mark.parametrize("x", [NARROW, WIDE])
def test_koleo(x):
    assert_is_its_formula(losses.koleo, koleo, x)
    assert_autocast_has_no_influence(losses.koleo, x)
    assert_takes_halves(losses.koleo, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_koleo_of_duplicates_is_finite(dtype):
    x = NARROW.to(dtype).clone()
    x[0, 3] = x[0, 1]
    x[1] = 1
    value, (grad,) = assert_finite(lambda x: losses.koleo(x, reduction="none"), x)
    assert value[1].item() == pytest.approx(-math.log(1e-8), rel=1e-6)
    assert not grad[1].any()
    assert grad[0, 0].any()
    assert grad.abs().max() < 1e3


def test_koleo_takes_some_images_at_a_time(monkeypatch):
    x = torch.randn(5, N, 4, dtype=torch.float64)
    expected = value_and_gradients(losses.koleo, [x])
    for chunk in (1, 2 * N * 4):  # one image, two images
        monkeypatch.setattr(losses.dense._DistanceToOne, "CHUNK", chunk)
        value, (grad,) = value_and_gradients(losses.koleo, [x])
        assert torch.equal(value, expected[0])
        assert torch.equal(grad, expected[1][0])


def uniformity(x, t=2.0):
    x = unit(x)
    pairs = [torch.pdist(a).pow(2).mul(-t).exp().mean().log() for a in x]
    return sum(pairs) / len(x)


@pytest.mark.parametrize("t", [2.0, 0.5])
def test_uniformity(t):
    assert_is_its_formula(lambda x: losses.uniformity(x, t=t), lambda x: uniformity(x, t), NARROW)
    assert_autocast_has_no_influence(losses.uniformity, NARROW)
    assert losses.uniformity(NARROW, t=1e3).isfinite()


def cka(x, y):
    n = x.shape[-2]
    h = torch.eye(n, dtype=x.dtype) - 1 / n
    k, l = h @ x @ x.mT @ h, h @ y @ y.mT @ h  # noqa: E741
    return ((k * l).sum((1, 2)) / (k.square().sum((1, 2)) * l.square().sum((1, 2))).sqrt()).mean()


@WIDTHS
def test_linear_cka(x, y):
    assert_is_its_formula(losses.linear_cka, cka, x, y)
    assert_autocast_has_no_influence(losses.linear_cka, x, y)
    # invariant to rotations and scale
    rotation = torch.linalg.qr(torch.randn(x.shape[-1], x.shape[-1], dtype=torch.float64))[0]
    turned = 3 * x.double() @ rotation + 5
    torch.testing.assert_close(losses.linear_cka(turned, x.double()).item(), 1.0)
    torch.testing.assert_close(losses.linear_cka(1e-3 * x, y), losses.linear_cka(x, y))


def vf(z, f, distance_margin=0.25, cosine_margin=0.5, distance_weight=1.0, cosine_weight=1.0, eps=1e-8):
    z, f = unit(z, eps), unit(f, eps)
    distance = ((z @ z.mT - f @ f.mT).abs() - distance_margin).relu().mean()
    cosine = (1 - cosine_margin - (z * f).sum(-1)).relu().mean()
    return distance_weight * distance + cosine_weight * cosine


@pytest.mark.parametrize("margins", [(0.25, 0.5), (0.0, 0.0)])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0)])
def test_vf_loss(margins, weights):
    names = "distance_margin", "cosine_margin", "distance_weight", "cosine_weight"
    options = dict(zip(names, margins + weights, strict=True))

    def loss(z, f):
        return losses.vf_loss(z, f, **options)

    assert_is_its_formula(loss, lambda z, f: vf(z, f, *margins, *weights), NARROW, NARROW2)
    assert_autocast_has_no_influence(loss, NARROW, NARROW2)
    torch.testing.assert_close(losses.vf_loss(WIDE, WIDE2), vf(WIDE, WIDE2))


def info_nce(x, y, temperature=0.1, eps=1e-8):
    logits = unit(x, eps) @ unit(y, eps).mT / temperature
    return cross_entropy(logits.flatten(0, 1), torch.arange(N).repeat(B))


def test_info_nce():
    assert_is_its_formula(losses.info_nce, info_nce, NARROW, NARROW2)

    def loss(x, y):
        return losses.info_nce(x, y, temperature=0.2, symmetric=True)

    def both(x, y):
        return (info_nce(x, y, 0.2) + info_nce(y, x, 0.2)) / 2

    assert_is_its_formula(loss, both, NARROW, NARROW2)
    assert_autocast_has_no_influence(loss, NARROW, NARROW2)
    assert_takes_halves(loss, NARROW, NARROW2)
    assert losses.info_nce(NARROW, NARROW2, temperature=1e-4).isfinite()


def uniformity_of_cosines(x, eps):
    s = unit(x, eps) @ unit(x, eps).mT
    counted = (4 * s - 4)[:, ~torch.eye(s.shape[-1], dtype=torch.bool)]
    return counted.exp().mean(-1).log().mean()


@pytest.mark.parametrize(
    ("loss", "formula", "inputs"),
    [
        (losses.koleo, koleo, [NARROW]),
        (losses.uniformity, uniformity_of_cosines, [NARROW]),
        (losses.gram_anchoring, gram_loss, [NARROW, NARROW2]),
        (losses.gram_anchoring, gram_loss, [LONG, LONG2]),
        (losses.vf_loss, vf, [NARROW, NARROW2]),
        (losses.info_nce, info_nce, [NARROW, NARROW2]),
    ],
)
def test_eps(loss, formula, inputs):
    """Some vectors are shorter than eps."""
    assert all(x.norm(dim=-1).min() < 1.5 < x.norm(dim=-1).max() for x in inputs)
    assert_is_its_formula(lambda *x: loss(*x, eps=1.5), lambda *x: formula(*x, eps=1.5), *inputs)


TWO_SETS = [losses.gram_anchoring, losses.linear_cka, losses.vf_loss, losses.info_nce]
ONE_SET = [losses.koleo, losses.uniformity]


@pytest.mark.parametrize("loss", TWO_SETS + ONE_SET)
@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_collapsed_features_are_finite(loss, width, value):
    x = torch.full((B, N, width), value)
    assert_finite(loss, *([x, WIDE[..., :width]] if loss in TWO_SETS else [x]))


def test_what_collapsed_features_give():
    equal, zero = torch.ones(B, N, 4), torch.zeros(B, N, 4)
    assert losses.uniformity(equal).item() == pytest.approx(0, abs=1e-5)
    assert losses.uniformity(zero).item() == pytest.approx(-4, abs=1e-5)
    assert losses.info_nce(equal, equal).item() == pytest.approx(math.log(N), abs=1e-5)
    assert losses.linear_cka(equal, NARROW).item() == 0
    assert losses.gram_anchoring(equal, zero).item() == pytest.approx(1, abs=1e-6)


def test_a_similarity_of_zero_has_no_gradient_where_negatives_are_removed():
    x = NARROW.double().clone()
    x[0, 1] = 0
    value, (grad, _) = value_and_gradients(
        lambda x, y: losses.gram_anchoring(x, y, negatives="remove"), [x, NARROW2.double()]
    )
    torch.testing.assert_close(value, gram_loss(x, NARROW2.double(), negatives="remove"))
    assert not grad[0, 1].any()
    assert grad[0, 0].any()


def test_one_patch():
    x, y = NARROW[:, :1], NARROW2[:, :1]
    for loss in TWO_SETS:
        assert_finite(loss, x, y)
    assert losses.info_nce(x, y).item() == pytest.approx(0, abs=1e-5)
    assert losses.linear_cka(x, y).item() == 0
    for loss in ONE_SET:
        with pytest.raises(ValueError, match=r"x must hold N >= 2 .* \[2, 1, 4\]"):
            loss(x)


@pytest.mark.parametrize("loss", TWO_SETS + ONE_SET)
def test_reductions(loss):
    x = [NARROW, NARROW2] if loss in TWO_SETS else [NARROW]
    assert_reductions(loss, *x)
    second = loss(*(t[1] for t in x))  # no leading axis
    torch.testing.assert_close(second, loss(*x, reduction="none")[1])


def test_two_backward_passes_through_one_graph():
    """An adaptive weight differentiates the loss twice."""
    x, y = (t.clone().requires_grad_() for t in (NARROW, NARROW2))
    loss = losses.vf_loss(x, y)
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, x)[0])


def test_logsumexp_and_nearest_of_two_sets():
    x, y = NARROW.double(), NARROW2.double()[:, :4]
    s = unit(x) @ unit(y).mT
    assert_is_its_formula(
        lambda x, y: losses.dense.pairwise_logsumexp(x, y, scale=3.0).sum(-1),
        lambda x, y: (3 * unit(x) @ unit(y).mT).exp().sum(-1).log().sum(-1),
        x,
        y,
    )
    assert torch.equal(losses.dense.pairwise_nearest(x, y), s.argmax(-1))


def test_nearest_takes_the_first_of_equals_but_not_itself():
    assert losses.dense.pairwise_nearest(torch.ones(4, 2)).tolist() == [1, 0, 0, 0]


WITH_KERNELS = [
    lambda **options: losses.koleo(NARROW, **options),
    lambda **options: losses.uniformity(NARROW, **options),
    lambda **options: losses.vf_loss(NARROW, NARROW2, **options),
    lambda **options: losses.gram_anchoring(WIDE, WIDE2, **options),
]


@pytest.mark.parametrize("call", WITH_KERNELS)
def test_the_backend_is_passed_on(call):
    need("native")
    torch.testing.assert_close(call(backend="native"), call(backend="reference"))
    with vd.use_backend("native"):
        assert torch.equal(call(), call(backend="native"))
    with pytest.raises(RuntimeError, match=r"cannot run (two_gram|pairwise_rows)"):
        call(backend="triton")


BAD = [
    (
        lambda: losses.gram_anchoring(NARROW, NARROW2[:, 1:]),
        ValueError,
        ["teacher", "[2, 6, D2]", "[2, 5, 4]"],
    ),
    (lambda: losses.gram_anchoring(NARROW, NARROW2, level="patch"), ValueError, ["level", "'patch'"]),
    (lambda: losses.gram_anchoring(NARROW, NARROW2, negatives=True), ValueError, ["negatives", "True"]),
    (lambda: losses.gram_anchoring(NARROW, 1), TypeError, ["teacher", "int"]),
    (lambda: losses.koleo(NARROW, eps=0.0), ValueError, ["eps", "positive"]),
    (lambda: losses.koleo(None), TypeError, ["x", "NoneType"]),
    (lambda: losses.uniformity(NARROW, t=-1), ValueError, ["t must be positive", "-1"]),
    (lambda: losses.uniformity(NARROW, reduction="row"), ValueError, ["reduction", "'row'"]),
    (lambda: losses.linear_cka(NARROW, NARROW2[0]), ValueError, ["y", "[2, 6, D2]", "[6, 4]"]),
    (lambda: losses.vf_loss(NARROW, WIDE), ValueError, ["f", "[2, 6, 4]", "[2, 6, 8]"]),
    (lambda: losses.vf_loss(NARROW, NARROW2, distance_margin=-0.1), ValueError, ["distance_margin", "-0.1"]),
    (lambda: losses.info_nce(NARROW, NARROW2.double()), TypeError, ["y", "float32", "float64"]),
    (lambda: losses.info_nce(NARROW, NARROW2, temperature=0), ValueError, ["temperature", "0"]),
    (lambda: losses.info_nce(NARROW, NARROW2, temperature="t"), TypeError, ["temperature", "str"]),
    (
        lambda: losses.dense.two_gram(NARROW, NARROW2, penalty="l1"),
        ValueError,
        ["penalty", "'hinge'", "'l1'"],
    ),
]


test_bad_input_gets_a_sentence = bad_input(BAD)


def test_a_short_vector_is_divided_by_eps():
    x = NARROW.double().clone()
    x[0, 1] = 1e-10
    got, grads = value_and_gradients(losses.info_nce, [x, NARROW2.double()])
    expected, expected_grads = value_and_gradients(info_nce, [x, NARROW2.double()])
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(grads[0], expected_grads[0])
