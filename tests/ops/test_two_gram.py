"""two_gram: values, gradients, layouts and extremes, on every backend."""

from functools import partial

import formulas
import operation_checks as checks
import pytest
import torch
from far_vectors import EVERY_RANGE, assert_length_does_not_matter
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import draw_layout
from operation_checks import draw_two_grams as draw
from test_determinism import assert_same_bits
from test_pairwise_cosine import LAYOUTS

from vitdiv_kernels.ops.pairs.two_gram import two_gram

PENALTIES = list(formulas.GRAM_PENALTIES)
MARGIN = 0.25
# leading axes, N, D, D2 (None: no y)
SHAPES = [
    ((2,), 1, 3, 5),
    ((2,), 2, 1, 1),
    ((3,), 17, 33, None),
    ((2,), 65, 3, 130),
    ((1,), 197, 130, 33),
    ((2, 2), 17, 35, 35),
    ((), 65, 33, 1),
    ((1,), 197, 24, None),
    ((2,), 1, 3, None),
]
NORMALISE = pytest.mark.parametrize("normalise", [True, False])


def sizes_of_terms(name, inputs, *, normalise=True, reduction="mean", **_):
    """Of the value, and of the largest gradient of a vector, had all terms one sign."""
    x, y = (None if t is None else t.detach().double() for t in inputs.values())
    n, sums = x.shape[-2], checks.gram(x, normalise).abs().sum(-1)
    sums = sums + (1 if y is None else checks.gram(y, normalise).abs().sum(-1))
    weight = {"sum": 1.0, "none": n**-2, "mean": n**-2 * n / sums.numel()}[reduction]
    if name == "value":
        return weight * sums.sum(-1).max().item()
    lengths = torch.linalg.vector_norm(inputs[name].detach().double(), dim=-1)
    factor = lengths.reciprocal() if normalise else lengths.amax()
    return 4 * weight * (sums * factor).max().item()


def check(backend, x, y, dtype=torch.float64, **options):
    """Value and every gradient against the plain formula in float64."""
    inputs = checks.of_pair(x, y)

    def scale_of(name, truth):
        # where terms cancel, in S - T or in what the normalisation takes out, rounding is left
        return max(0.1 * sizes_of_terms(name, inputs, **options), truth.abs().max().item())

    operation, formula = partial(two_gram, backend=backend, **options), partial(formulas.two_gram, **options)
    checks.assert_pairs(operation, formula, inputs, dtype, scale_of)


# For test_plain_formulas.py: formulas, and their inputs.
FORMULAS = {"two sets": (formulas.two_gram, lambda: formulas.vectors(2))}


def check_instructions(dtype):
    """For test_capabilities.py: the kernels on odd sizes, so that vectors, register blocks and tiles have
    remainders, and on a width that is no multiple of eight."""
    for penalty in PENALTIES:
        x, y = draw((2,), 33, 20, 37, dtype)
        check("native", x, y, dtype, penalty=penalty, margin=MARGIN)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend, interpreted, shape, dtype, penalty):
    if interpreted and dtype == torch.float64 and shape[1] > 17:
        pytest.skip("slow: float32 and smaller shapes stand for it")
    check(backend, *draw(*shape, dtype), dtype, penalty=penalty, margin=MARGIN)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("width2", [24, None])
@NORMALISE
def test_options(backend, normalise, width2, reduction, penalty):
    x, y = draw((2, 3), 17, 9, width2, normalise=normalise)
    check(backend, x, y, penalty=penalty, margin=MARGIN, normalise=normalise, reduction=reduction)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width2", [33, None])
def test_low_precision(backend, width2, dtype, penalty):
    check(backend, *draw((2,), 40, 48, width2, dtype), dtype, penalty=penalty, margin=MARGIN)


def test_inner_products_that_float16_does_not_hold(backend):
    """S_ii is 43000, its slope 86000; the gradients of the mean are finite."""
    x, y = (t.half() for t in draw((2,), 40, 48, 33))
    x = (30 * x).requires_grad_()
    (got,) = torch.autograd.grad(two_gram(x, y, normalise=False, backend=backend), x)
    truth = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(formulas.two_gram(truth, y.double(), normalise=False), truth)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=3e-3 * expected.abs().max().item())


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize(("n", "width", "width2"), [(4, 3, 3), (5, 7, 2), (3, 4, None), (1, 3, 2)])
@NORMALISE
def test_gradcheck(backend, interpreted, normalise, penalty, n, width, width2):
    x, y = (
        None if t is None else t.requires_grad_() for t in draw((2,), n, width, width2, normalise=normalise)
    )
    for reduction in ("mean", "none"):
        torch.autograd.gradcheck(
            lambda x, y, reduction=reduction: two_gram(
                x, y, penalty=penalty, margin=MARGIN, normalise=normalise, reduction=reduction,
                backend=backend,
            ),
            (x, y),
            fast_mode=interpreted,
        )  # fmt: skip


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("margin", [0.0, MARGIN])
@NORMALISE
def test_at_the_kinks(backend, normalise, margin, penalty):
    """Orthogonal and equal vectors of small integers: S and T are 0, 1, equal or MARGIN apart, exactly; the
    gradients are those that autograd of the plain formula gives there."""
    x = torch.tensor([[0.0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0], [-1, 0, 0, 0], [1, 0, 0, 0]]).double()
    y = torch.tensor([[1.0, 0, 0, 0], [1, 0, 0, 0], [0, -1, 0, 0], [0, 1, 0, 0], [0.25, 0, 0, 0]]).double()
    for first, second in ((x, y), (y, x), (x, x), (x, None), (0 * x, y), (y, 0 * x)):
        options = dict(penalty=penalty, margin=margin, normalise=normalise, eps=0.5)
        got = checks.value_and_leaves(partial(two_gram, backend=backend, **options), first, second)
        expected = checks.value_and_leaves(partial(formulas.two_gram, **options), first, second)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_zero_vectors(backend, penalty):
    x, y = draw((2,), 9, 12, 5)
    x[0, 3] = 0
    x[1] = 0
    y[0, 5] = 0
    options = dict(penalty=penalty, margin=MARGIN)
    operation, formula = partial(two_gram, backend=backend, **options), partial(formulas.two_gram, **options)
    checks.assert_zero_vectors(operation, formula, x, y)


def test_vectors_shorter_than_eps(backend):
    x, y = draw((3,), 7, 6, 4)
    x[:, 2] *= 1e-3
    y[:, 4] *= 1e-3
    check(backend, x, y, eps=0.1)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_equal_sets(backend, penalty):
    """S = T: no penalty, and no gradient, except of product."""
    x = torch.randn(2, 150, 16, dtype=torch.float32)
    operation = partial(two_gram, penalty=penalty, margin=MARGIN, backend=backend)
    value, dx, dy = checks.value_and_leaves(operation, x, x)
    expected = formulas.two_gram(x.double(), x.double(), penalty=penalty, margin=MARGIN).item()
    assert value.item() == pytest.approx(expected, rel=1e-5)
    if penalty in ("square", "relu_square"):
        assert value == 0
        assert not dx.any()
        assert not dy.any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("set_", ["x", "y"])
def test_nan_and_inf_propagate(backend, set_, penalty, poison):
    inputs = dict(zip("xy", draw((2,), 9, 12, 5, torch.float32), strict=True))
    inputs[set_][0, 3, 2] = poison
    leaf = inputs[set_].requires_grad_()
    got = two_gram(**inputs, penalty=penalty, margin=MARGIN, reduction="none", backend=backend)
    assert got[0].isnan()
    assert got[1].isfinite()
    got.sum().backward()
    assert leaf.grad[0, 3].isnan().any()
    assert leaf.grad[1].isfinite().all()


@pytest.mark.parametrize("width2", [None, 4])
@pytest.mark.parametrize("leading", [(0,), (0, 3), (2, 0)])
def test_empty_batch(backend, leading, width2):
    x = torch.randn(*leading, 5, 8, requires_grad=True)
    y = None if width2 is None else torch.randn(*leading, 5, width2, requires_grad=True)
    assert two_gram(x, y, reduction="mean", backend=backend).isnan()
    assert two_gram(x, y, reduction="none", backend=backend).shape == leading
    total = two_gram(x, y, reduction="sum", backend=backend)
    assert total.item() == 0
    total.backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("without_y", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout, without_y):
    x, y = draw((3,), 21, 20, None if without_y else 13)
    x, y = (None if t is None else LAYOUTS[layout](t) for t in (x, y))
    check(backend, x, y)
    check(backend, x, y, penalty="product", normalise=False)


def test_items_more_than_2_to_31_elements_apart(backend, far_apart):
    near = dict(zip("xy", draw((2,), 5, 8, 3, torch.float16), strict=True))
    checks.assert_far_apart(partial(two_gram, backend=backend), near, far_apart)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_no_gradient_is_wanted(backend, penalty):
    x, y = draw((2,), 40, 24, 33)
    for inputs in ((x, None), (x, y)):
        expected = formulas.two_gram(*inputs, penalty=penalty)
        torch.testing.assert_close(two_gram(*inputs, penalty=penalty, backend=backend), expected)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("wanted", ["x", "y"])
def test_only_the_gradients_asked_for(backend, wanted, penalty):
    inputs = dict(zip("xy", draw((2,), 19, 8, 6), strict=True))
    checks.assert_only_one_gradient(partial(two_gram, penalty=penalty, backend=backend), inputs, wanted)


def test_one_tensor_as_both(backend):
    x, _ = draw((2,), 9, 8, None)
    expected = checks.value_and_leaves(lambda x, _: formulas.two_gram(x, x, penalty="product"), x, None)
    got = checks.value_and_leaves(lambda x, _: two_gram(x, x, penalty="product", backend=backend), x, None)
    torch.testing.assert_close(got, expected)


def test_backward_twice_and_inputs_untouched(backend):
    x, y = draw((2,), 17, 8, 5, torch.float32)
    checks.assert_backward_twice(partial(two_gram, backend=backend), x.requires_grad_(), y)


def test_once_differentiable(backend):
    if backend == "reference":
        pytest.skip("the reference is plain autograd")
    x, y = draw((1,), 5, 4, 3)
    (dx,) = torch.autograd.grad(two_gram(x.requires_grad_(), y, backend=backend), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dx.sum().backward()


def test_autocast_does_not_change_it(backend):
    x, y = draw((2,), 33, 24, 9, torch.float32)
    expected = two_gram(x, y, backend=backend)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        assert torch.equal(two_gram(x, y, backend=backend), expected)


@pytest.mark.parametrize(("leading", "n"), [((1,), 400), ((3,), 65)])
@pytest.mark.parametrize("width2", [33, None])
def test_the_same_bits(backend, interpreted, threads, leading, n, width2):
    x, y = draw(leading, 65 if interpreted else n, 48, width2, torch.float32)
    inputs = [t for t in (x, y) if t is not None]
    times = 1 if interpreted else 4
    assert_same_bits(lambda *t: two_gram(*t, penalty="hinge", margin=MARGIN, backend=backend), inputs, times)


@pytest.mark.parametrize("items", [1, 3])
def test_compiled_kernels_give_the_same_bits_on_any_number_of_threads(backend, interpreted, items):
    if backend == "reference":
        pytest.skip("torch's products depend on the threads")
    if interpreted:
        pytest.skip("the interpreter has one thread")
    x, y = torch.randn(items, 300, 48), torch.randn(items, 300, 20)
    operation = partial(two_gram, reduction="none", backend=backend)
    checks.assert_same_on_any_number_of_threads(operation, x, y)


def test_any_shape_layout_and_options(backend, interpreted):
    @settings(max_examples=12 if interpreted else 40, deadline=None, derandomize=True, database=None)
    @given(data=st.data())
    def holds(data):
        leading = data.draw(st.lists(st.integers(1, 3), max_size=2).map(tuple), "leading")
        n = data.draw(st.integers(2, 40), "N")
        width = data.draw(st.integers(2, 70), "D")
        width2 = data.draw(st.none() | st.integers(2, 70), "D2")
        penalty = data.draw(st.sampled_from(PENALTIES), "penalty")
        normalise = data.draw(st.booleans(), "normalise")
        laid_out = draw_layout(data, len(leading) + 2)
        torch.manual_seed(data.draw(st.integers(0, 10**6), "seed"))
        pair = draw(leading, n, width, width2, normalise=normalise)
        x, y = (None if t is None else laid_out(t) for t in pair)
        check(backend, x, y, penalty=penalty, margin=MARGIN, normalise=normalise, reduction="none")

    holds()


@EVERY_RANGE
@pytest.mark.parametrize("penalty", ["square", "relu_square", "hinge", "product"])
def test_vectors_of_any_length(backend, far, penalty):
    x, y = draw((1,), 9, 12, 7, far[0], normalise=True)
    options = dict(penalty=penalty, margin=MARGIN)
    assert_length_does_not_matter(
        lambda *v, eps: two_gram(*v, **options, eps=eps, backend=backend),
        lambda *v: formulas.two_gram(*v, **options),
        far, x, y,
    )  # fmt: skip
