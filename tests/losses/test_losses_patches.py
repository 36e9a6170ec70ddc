"""Losses on patch embeddings against their formulas, written out with N x N matrices in float64."""

import pytest
import torch
from loss_checks import (
    assert_autocast_has_no_influence,
    assert_finite,
    assert_is_its_formula,
    assert_reductions,
    assert_takes_halves,
    bad_input,
    value_and_gradients,
)
from torch.nn.functional import avg_pool2d, normalize

from vitdiv_kernels import losses

B, N, D = 2, 9, 5
# patches of one image have much in common
FIRST, LAST = torch.randn(2, B, N, D, generator=torch.Generator().manual_seed(3)) + 0.3
WIDE = torch.randn(B, 4, 7, generator=torch.Generator().manual_seed(4)) + 0.3
START = torch.randn(2, N, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def off_diagonal(matrix):
    n = matrix.shape[-1]
    return matrix[..., ~torch.eye(n, dtype=torch.bool)].unflatten(-1, (n, n - 1))


def contrast(first, last, normalise=True, eps=1e-8):
    if normalise:
        first, last = normalize(first, dim=-1, eps=eps), normalize(last, dim=-1, eps=eps)
    s = first @ last.mT
    own, others = s.diagonal(dim1=-2, dim2=-1), off_diagonal(s).mean(-1)
    return -(own.exp() / (own.exp() + others.exp())).log().mean()


@pytest.mark.parametrize("normalise", [True, False])
def test_contrast(normalise):
    def loss(x, y):
        return losses.patch_contrast(x, y, normalise=normalise)

    assert_is_its_formula(loss, lambda x, y: contrast(x, y, normalise), FIRST, LAST)
    assert_autocast_has_no_influence(loss, FIRST, LAST)
    assert_takes_halves(loss, FIRST, LAST)


def test_contrast_with_a_target():
    _, (dfirst, dlast) = value_and_gradients(
        lambda x, y: losses.patch_contrast(x, y, detach_first=True), [FIRST, LAST]
    )
    _, (_, expected) = value_and_gradients(losses.patch_contrast, [FIRST, LAST])
    assert not dfirst.any()
    assert torch.equal(dlast, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_contrast_of_zero_and_short_patches(dtype, tolerance):
    first, last = FIRST.to(dtype, copy=True), LAST.to(dtype, copy=True)
    first[0, 1], last[0, 2], last[1, 0] = 0, 0, 1e-9 * last[1, 0]
    got, grads = value_and_gradients(losses.patch_contrast, [first, last])
    expected, expected_grads = value_and_gradients(contrast, [first.double(), last.double()])
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=0)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_contrast_of_views_and_leading_axes():
    first, last = torch.randn(2, 2, 3, N, D, dtype=torch.float64)
    views = [t.transpose(0, 1).movedim(-1, 0).contiguous().movedim(0, -1) for t in (first, last)]
    values = losses.patch_contrast(*views, reduction="none")
    assert values.shape == (3, 2)
    torch.testing.assert_close(values[1, 0], contrast(first[0, 1], last[0, 1]))
    torch.testing.assert_close(losses.patch_contrast(first, last), values.mean())
    torch.testing.assert_close(losses.patch_contrast(first, last, reduction="sum"), values.sum())
    assert torch.autograd.gradcheck(losses.patch_contrast, [v.requires_grad_() for v in views])


def test_contrast_refuses_a_second_derivative():
    x = FIRST.double().requires_grad_()
    (g,) = torch.autograd.grad(losses.patch_contrast(x, LAST.double()), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        g.sum().backward()


def neighbourhood(patches, context, rows, columns, window, inside, eps=1e-8):
    """Patch by patch, neighbour by neighbour."""
    result = []
    for p, c in zip(patches, context.detach(), strict=True):
        for i in range(len(p)):
            near = [
                j
                for j in range(len(p))
                if j != i
                and abs(j // columns - i // columns) <= window // 2
                and abs(j % columns - i % columns) <= window // 2
            ]
            far = [j for j in range(len(p)) if j != i]
            count = len(near) if inside else window**2 - 1
            logits = torch.stack([c[i] @ p[i], c[i] @ p[far].mean(0), c[i] @ p[near].sum(0) / count])
            result.append(-(logits.softmax(0)[0] + eps).log())
    return torch.stack(result).mean()


@pytest.mark.parametrize("border", ["zeros", "inside"])
@pytest.mark.parametrize(("grid", "window"), [(None, 3), (None, 7), ((2, 4), 3)])
def test_neighbourhood_contrast(grid, window, border):
    rows, columns = grid or (3, 3)
    patches, context = FIRST[:, : rows * columns], LAST[:, : rows * columns]

    def loss(x):
        return losses.neighbourhood_contrast(x, context.to(x), grid=grid, window=window, border=border)

    def formula(x):
        return neighbourhood(x, context.to(x), rows, columns, window, border == "inside")

    assert_is_its_formula(loss, formula, patches)
    assert_autocast_has_no_influence(loss, patches)
    got = losses.neighbourhood_contrast(patches, context, grid=grid, window=window, border=border, eps=0.1)
    torch.testing.assert_close(
        got, neighbourhood(patches, context, rows, columns, window, border == "inside", eps=0.1)
    )


def test_neighbourhood_contrast_is_the_released_code():
    """Its pooling: the window's zeros beyond the border count."""
    patches, context = torch.randn(2, B, 64, D, dtype=torch.float64)
    image = patches.mT.reshape(B, D, 8, 8)
    near = (avg_pool2d(image, 7, 1, 3) - image / 49) * (49 / 48)
    far = (image.mean((2, 3), keepdim=True) - image / 64) * (64 / 63)
    logits = torch.stack([(context * t.flatten(2).mT).sum(-1) for t in (image, far, near)], -1)
    expected = -(logits.softmax(-1)[..., 0] + 1e-8).log().mean()
    torch.testing.assert_close(losses.neighbourhood_contrast(patches, context), expected)


def test_the_context_is_a_target():
    _, (_, dcontext) = value_and_gradients(losses.neighbourhood_contrast, [FIRST, LAST])
    assert not dcontext.any()


def cosines(x, eps=1e-8):
    x = normalize(x, dim=-1, eps=eps)
    return x @ x.mT


def mhs(x, eps=1e-8):
    return -(2 - 2 * off_diagonal(cosines(x, eps))).flatten(1).amin(-1).mean()


def test_mhs():
    assert_is_its_formula(losses.patch_mhs, mhs, FIRST)
    assert_is_its_formula(lambda x: losses.patch_mhs(x, variant="released"), mhs, FIRST)
    assert_autocast_has_no_influence(losses.patch_mhs, FIRST)


def released_mhs(x):
    """Image by image; exact zeros are left out, and equals are summed."""
    total = 0
    for s in cosines(x):
        distance = (2 - 2 * s)[torch.ones_like(s).tril(-1).bool()]
        distance = distance[distance != 0]
        if len(distance):
            total = total - distance[distance == distance.min()].sum()
    return total / len(x)


def test_mhs_as_released():
    square = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]], dtype=torch.float64)
    x = torch.stack([square, square[[0, 0, 1, 1]], square[[0, 0, 0, 0]]])
    values = losses.patch_mhs(x, variant="released", reduction="none")
    # four pairs at the same distance; four once the pairs of equals are left out; nothing left
    torch.testing.assert_close(values, torch.tensor([-8.0, -8.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(values.mean(), released_mhs(x))
    paper = losses.patch_mhs(x, reduction="none")
    torch.testing.assert_close(paper, torch.tensor([-2.0, 0.0, 0.0], dtype=torch.float64))
    near = torch.tensor([[1.0, 0], [1, 1e-3], [-1, 0]], dtype=torch.float64)  # near is not equal
    assert losses.patch_mhs(near, variant="released").item() == pytest.approx(-1e-6, rel=1e-3)


def mgd(x, ridge=1e-6, eps=1e-8):
    s = cosines(x, eps)
    return -torch.logdet(torch.exp(-(2 - 2 * s)) + ridge * torch.eye(s.shape[-1], dtype=s.dtype)).mean()


def test_mgd():
    assert_is_its_formula(losses.patch_mgd, mgd, WIDE)
    assert_autocast_has_no_influence(losses.patch_mgd, FIRST)
    assert_takes_halves(losses.patch_mgd, WIDE)


@pytest.mark.parametrize("spread", [0.0, 1e-4, 1e-3])
def test_mgd_of_nearly_equal_patches(spread):
    """Their float32 cosines are 1 up to rounding, which is larger than the ridge."""
    x = torch.randn(1, 1, 64) + spread * torch.randn(B, 49, 64)
    value, (grad,) = value_and_gradients(losses.patch_mgd, [x])
    expected, (expected_grad,) = value_and_gradients(mgd, [x.double()])
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=1e-5)


def soft_orthogonality(x, eps=1e-8):
    s = cosines(x, eps)
    return (s - torch.eye(s.shape[-1])).square().sum((-2, -1)).mean()


@pytest.mark.parametrize("x", [FIRST, WIDE], ids=["D<N", "N<D"])
def test_soft_orthogonality(x):
    assert_is_its_formula(losses.patch_soft_orthogonality, soft_orthogonality, x)
    assert_autocast_has_no_influence(losses.patch_soft_orthogonality, x)
    short = x.double().clone()
    short[0, 1] = 0
    torch.testing.assert_close(losses.patch_soft_orthogonality(short), soft_orthogonality(short))


def condition(gram, start):
    """As published: G and G - largest I as matrices, one step each."""

    def quotient(matrix, v):
        v = matrix @ v
        return (v @ (matrix @ v)) / (v @ v + 1e-6)

    largest = quotient(gram, start[0])
    smallest = quotient(gram - largest * torch.eye(len(gram), dtype=gram.dtype), start[1]) + largest
    return (largest - smallest) ** 2


def condition_orthogonality(x, eps=1e-8):
    return torch.stack([condition(s, START) for s in cosines(x, eps)]).mean()


def test_condition_orthogonality():
    def loss(x):
        return losses.patch_condition_orthogonality(x, start=START)

    assert_is_its_formula(loss, condition_orthogonality, FIRST)
    assert_autocast_has_no_influence(loss, FIRST)
    per_image = START.expand(B, 2, N) * torch.tensor([1.0, 2.0]).view(B, 1, 1)
    both = losses.patch_condition_orthogonality(FIRST.double(), start=per_image, reduction="none")
    second = losses.patch_condition_orthogonality(FIRST[1:].double(), start=2 * START)
    torch.testing.assert_close(both[1], second)


def test_condition_orthogonality_repeats():
    def draw(seed):
        return losses.patch_condition_orthogonality(FIRST, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    start = torch.randn(B, 2, N, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draw(1), losses.patch_condition_orthogonality(FIRST, start=start))


def contrast_with_next(x, **options):
    return losses.patch_contrast(x, x + 1, **options)


@pytest.mark.parametrize(
    ("loss", "formula", "options"),
    [
        (contrast_with_next, lambda x, eps: contrast(x, x + 1, eps=eps), {}),
        (losses.patch_mhs, mhs, {}),
        (losses.patch_mhs, mhs, {"variant": "released"}),
        (losses.patch_mgd, lambda x, eps: mgd(x, 0.1, eps), {"ridge": 0.1}),
        (losses.patch_soft_orthogonality, soft_orthogonality, {}),
        (losses.patch_condition_orthogonality, condition_orthogonality, {"start": START}),
    ],
)
def test_eps_and_reductions(loss, formula, options):
    """Some patches are shorter than eps."""
    x = FIRST[:, :, :4]
    norms = x.norm(dim=-1)
    assert norms.min() < 2 < norms.max()
    assert_is_its_formula(lambda x: loss(x, eps=2.0, **options), lambda x: formula(x, eps=2.0), x)
    assert_reductions(lambda x, **given: loss(x, **options, **given), FIRST)


ONE_SET = [
    losses.patch_mhs,
    losses.patch_mgd,
    losses.patch_soft_orthogonality,
    losses.patch_condition_orthogonality,
    lambda x: losses.patch_contrast(x, x + 1),
    lambda x: losses.neighbourhood_contrast(x, x + 1),
]


@pytest.mark.parametrize("loss", ONE_SET)
@pytest.mark.parametrize("x", [torch.zeros(B, N, D), torch.ones(B, N, D)], ids=["zero", "equal"])
def test_collapsed_patches_are_finite(loss, x):
    assert_finite(loss, x)


@pytest.mark.parametrize("loss", ONE_SET)
def test_one_image_without_a_batch(loss):
    x = torch.randn(9, D)
    torch.manual_seed(1)
    value, (grad,) = value_and_gradients(loss, [x])
    torch.manual_seed(1)
    expected, (expected_grad,) = value_and_gradients(loss, [x[None]])
    assert value.shape == ()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, expected_grad[0])


def test_what_collapsed_patches_give():
    equal = torch.ones(B, N, D, dtype=torch.float64)
    log2 = torch.tensor(2.0, dtype=torch.float64).log()
    torch.testing.assert_close(losses.patch_contrast(equal, equal), log2)
    torch.testing.assert_close(losses.patch_soft_orthogonality(equal).item(), float(N * (N - 1)))
    torch.testing.assert_close(losses.patch_mhs(equal).item(), 0.0, atol=1e-12, rtol=0)
    # N - 1 eigenvalues are the ridge, one is N + ridge
    expected = -(N - 1) * torch.tensor(1e-6).double().log() - torch.tensor(N + 1e-6).double().log()
    torch.testing.assert_close(losses.patch_mgd(equal), expected, rtol=1e-6, atol=0)


def test_one_patch():
    one = torch.randn(B, 1, D)
    assert losses.patch_soft_orthogonality(one).item() == pytest.approx(0, abs=1e-6)
    assert losses.patch_mgd(one).item() == pytest.approx(0, abs=1e-5)
    assert losses.patch_condition_orthogonality(one).item() == pytest.approx(0, abs=1e-6)
    for loss in (losses.patch_mhs, lambda x: losses.patch_contrast(x, x)):
        with pytest.raises(ValueError, match=r"N >= 2 .* got shape \[2, 1, 5\]"):
            loss(one)


BAD = [
    (lambda: losses.patch_contrast(FIRST, LAST[:, 1:]), ValueError, ["last", "[2, 9, 5]", "[2, 8, 5]"]),
    (lambda: losses.patch_contrast(FIRST, LAST.double()), TypeError, ["last", "float32", "float64"]),
    (lambda: losses.patch_contrast(FIRST, None), TypeError, ["last must be a torch.Tensor", "NoneType"]),
    (lambda: losses.patch_contrast(FIRST, LAST, reduction="max"), ValueError, ["reduction", "'max'"]),
    (lambda: losses.neighbourhood_contrast(FIRST, LAST, window=4), ValueError, ["window", "odd", "4"]),
    (lambda: losses.neighbourhood_contrast(FIRST, LAST, border="same"), ValueError, ["border", "'same'"]),
    (
        lambda: losses.neighbourhood_contrast(FIRST, LAST, grid=(2, 4)),
        ValueError,
        ["grid", "N = 9", "(2, 4)"],
    ),
    (lambda: losses.neighbourhood_contrast(FIRST, LAST, grid=3), ValueError, ["grid", "N = 9", "got 3"]),
    (lambda: losses.neighbourhood_contrast(FIRST, LAST, grid=(-3, -3)), ValueError, ["grid", "(-3, -3)"]),
    (lambda: losses.neighbourhood_contrast(FIRST, LAST, grid=(9,)), ValueError, ["grid", "(9,)"]),
    (
        lambda: losses.neighbourhood_contrast(FIRST[:, 1:], LAST[:, 1:]),
        ValueError,
        ["grid", "N = 8", "a square"],
    ),
    (lambda: losses.patch_mhs([1.0]), TypeError, ["x must be a torch.Tensor", "list"]),
    (lambda: losses.patch_mhs(FIRST, variant="code"), ValueError, ["variant", "'released'", "'code'"]),
    (lambda: losses.patch_mgd(FIRST, ridge=0.0), ValueError, ["ridge", "positive", "0.0"]),
    (lambda: losses.patch_mgd(FIRST.long()), TypeError, ["x", "int64"]),
    (lambda: losses.patch_soft_orthogonality(FIRST[0, 0]), ValueError, ["x", "[..., N, D]", "[5]"]),
    (
        lambda: losses.patch_condition_orthogonality(FIRST, start=START[:, 1:]),
        ValueError,
        ["start", "[2, 2, 9] or [2, 9]", "[2, 8]"],
    ),
    (
        lambda: losses.patch_condition_orthogonality(FIRST, start=START, generator=torch.Generator()),
        ValueError,
        ["start and generator"],
    ),
]


test_bad_input_gets_a_sentence = bad_input(BAD)
