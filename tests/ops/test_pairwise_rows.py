"""pairwise_logsumexp and pairwise_nearest: values, gradients, layouts and extremes, on every backend."""

from functools import partial

import formulas
import operation_checks as checks
import pytest
import torch
from comparing import FLOOR
from far_vectors import EVERY_RANGE, assert_length_does_not_matter, lengths_of
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import draw_layout
from test_determinism import assert_same_bits
from test_pairwise_cosine import LAYOUTS

from vitdiv_kernels.ops.pairs.pairwise_rows import pairwise_logsumexp, pairwise_nearest

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# leading axes, N, M (None: pairs within x), D
SHAPES = [
    ((2,), 2, None, 1),
    ((3,), 17, None, 33),
    ((2,), 65, None, 3),
    ((1,), 197, None, 130),
    ((2, 2), 17, None, 35),
    ((), 65, None, 32),
    ((2,), 1, 1, 33),
    ((2,), 1, 17, 3),
    ((3,), 17, 2, 130),
    ((1,), 65, 197, 33),
    ((2,), 197, 65, 1),
    ((2, 3), 17, 65, 16),
]


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def draw_sets(shape, dtype=torch.float64):
    leading, n, m, width = shape
    y = None if m is None else draw(*leading, m, width, dtype=dtype)
    return draw(*leading, n, width, dtype=dtype), y


def cosines(x, y=None):
    """In float64, -1 less than the least for a vector with itself."""
    x_hat, y_hat = (torch.nn.functional.normalize(t.double(), dim=-1) for t in (x, x if y is None else y))
    s = x_hat @ y_hat.mT
    return s - 3 * torch.eye(x.shape[-2]) if y is None else s


def shortest(x):
    return torch.linalg.vector_norm(x.detach().double(), dim=-1).min().item()


def check(backend, x, y, dtype=torch.float64, terms=0.01, **options):
    """Value and every gradient against the plain formula in float64.

    Of parallel vectors and those of one number rounding is left in a gradient, of what the normalisation
    takes out: `terms` is how large that may be taken to be, of scale / |x|.
    """
    inputs = checks.of_pair(x, y)

    def scale_of(name, truth):
        least = 1.0 if name == "value" else terms * options.get("scale", 1.0) / shortest(inputs[name])
        return max(least, truth.abs().max().item())

    operation = partial(pairwise_logsumexp, backend=backend, **options)
    formula = partial(formulas.pairwise_logsumexp, **options)
    checks.assert_pairs(operation, formula, inputs, dtype, scale_of, cotangent_from=-0.5)


# For test_plain_formulas.py: formulas, and their inputs.
FORMULAS = {"logsumexp": (lambda x: formulas.pairwise_logsumexp(x, scale=10.0), formulas.vectors)}


def check_instructions(dtype):
    """For test_capabilities.py: the kernels on odd sizes, so that vectors, register blocks and tiles have
    remainders, and on a width that is no multiple of eight."""
    for m in (None, 19):
        x, y = draw_sets(((2,), 33, m, 20), dtype)
        for scale in (4.0, 50.0):
            check("native", x, y, dtype, scale=scale)
        assert torch.equal(pairwise_nearest(x, y, backend="native"), cosines(x, y).argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend, interpreted, shape, dtype):
    if interpreted and dtype == torch.float64 and shape[1] > 17:
        pytest.skip("slow: float32 and smaller shapes stand for it")
    check(backend, *draw_sets(shape, dtype), dtype, scale=4.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", [None, 65])
def test_low_precision(backend, m, dtype):
    check(backend, *draw_sets(((2,), 40, m, 48), dtype), dtype, scale=4.0)


@pytest.mark.parametrize("m", [None, 33])
@pytest.mark.parametrize("scale", [1, 39.0, 41.0, 300.0, 1e4])
def test_scales(backend, scale, m):
    """Below and above that from which a running maximum is needed."""
    check(backend, *draw_sets(((2,), 33, m, 3)), scale=scale)
    x, y = draw_sets(((2,), 33, m, 3), torch.float32)
    expected = formulas.pairwise_logsumexp(x.double(), None if y is None else y.double(), scale=scale)
    got = pairwise_logsumexp(x.requires_grad_(), y, scale=scale, backend=backend)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 * scale)
    got.sum().backward()
    assert x.grad.isfinite().all()


# a cosine that is off by 1e-7 makes a weight of float32 off by scale 1e-7
@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (40.0, torch.float64),
        (40.0, torch.float32),
        (100.0, torch.float64),
        (1e4, torch.float64),
        (1e4, torch.float32),
    ],
    ids=str,
)
def test_opposite_vectors(backend, scale, dtype):
    """All cosines are -1: exp(-2e4) is 0, in float64 too."""
    x = draw(1, 1, 8, dtype=dtype).expand(2, 5, 8)
    # The gradient is 0 but for the rounding of five operations: two blocks of a product on tensor cores, two
    # norms and their product. 0.04 of float32's 1e-5 is seven halves of a unit in the last place of 1.
    check(backend, x, -2 * x[:, :3], dtype, terms=0.04, scale=scale)


def test_small_cotangents_of_float16(backend):
    """The weights of the vectors, 1e-7 and less, are no normal numbers of float16; the gradients are."""
    x = (0.01 * draw(2, 40, 48)).half().requires_grad_()
    (got,) = torch.autograd.grad(1e-6 * pairwise_logsumexp(x, scale=10.0, backend=backend).sum(), x)
    truth = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(1e-6 * formulas.pairwise_logsumexp(truth, scale=10.0).sum(), truth)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=3e-3 * expected.abs().max().item())


def test_equal_vectors(backend):
    x = draw(2, 1, 16).expand(2, 33, 16).clone().requires_grad_()
    got = pairwise_logsumexp(x, scale=5.0, backend=backend)
    expected = 5 + torch.tensor(32.0, dtype=torch.float64).log()
    torch.testing.assert_close(got, expected.expand(2, 33))
    got.sum().backward()
    assert x.grad.abs().max() < 1e-12  # all cosines are at their maximum


@pytest.mark.parametrize(("n", "m", "width"), [(4, None, 3), (5, None, 7), (2, 3, 4), (3, 1, 2)])
@pytest.mark.parametrize("scale", [3.0, 50.0])
def test_gradcheck(backend, interpreted, scale, n, m, width):
    x, y = (None if t is None else t.requires_grad_() for t in draw_sets(((2,), n, m, width)))
    torch.autograd.gradcheck(
        lambda x, y: pairwise_logsumexp(x, y, scale=scale, backend=backend), (x, y), fast_mode=interpreted
    )


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("m", [None, 33])
def test_any_incoming_gradient(backend, m, equal):
    """Equal for all rows, as losses that take means have it, or not, of either sign and 0; expanded."""
    x, y = (None if t is None else t.requires_grad_() for t in draw_sets(((2,), 40, m, 24)))
    inputs = [t for t in (x, y) if t is not None]
    cotangent = torch.tensor(-0.7).double().expand(2, 40) if equal else torch.randn(2, 40).double().round()
    got = torch.autograd.grad(pairwise_logsumexp(x, y, scale=3.0, backend=backend), inputs, cotangent)
    expected = torch.autograd.grad(formulas.pairwise_logsumexp(x, y, scale=3.0), inputs, cotangent)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("m", [None, 7])
def test_zero_vectors(backend, m):
    x, y = draw_sets(((2,), 9, m, 12))
    x[0, 3] = 0
    x[1] = 0
    if y is not None:
        y[0, 2] = 0
    checks.assert_zero_vectors(
        partial(pairwise_logsumexp, backend=backend), formulas.pairwise_logsumexp, x, y
    )


def test_vectors_shorter_than_eps(backend):
    x = draw(3, 7, 6)
    x[:, 2] *= 1e-3
    check(backend, x, None, eps=0.1)
    check(backend, x, x[:, 1:4] * 0.5, eps=0.1)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("m", [None, 6])
def test_nan_and_inf_propagate(backend, m, scale, poison):
    x, y = draw_sets(((2,), 9, m, 12), torch.float32)
    x[0, 3, 5] = poison
    leaf = x.requires_grad_()
    got = pairwise_logsumexp(x, y, scale=scale, backend=backend)
    poisoned = torch.zeros(2, 9, dtype=torch.bool)
    poisoned[0, slice(None) if m is None else 3] = True
    assert torch.equal(got.isnan(), poisoned)
    got.sum().backward()
    assert leaf.grad[0, 3].isnan().any()
    assert leaf.grad[1].isfinite().all()
    if y is not None:
        assert pairwise_logsumexp(y, x.detach(), scale=scale, backend=backend)[0].isnan().all()


@pytest.mark.parametrize("m", [None, 4])
@pytest.mark.parametrize("leading", [(0,), (0, 3), (2, 0)])
def test_empty_batch(backend, leading, m):
    x = torch.randn(*leading, 5, 8, requires_grad=True)
    y = None if m is None else torch.randn(*leading, m, 8)
    rows = pairwise_logsumexp(x, y, backend=backend)
    assert rows.shape == (*leading, 5)
    rows.sum().backward()
    assert x.grad.shape == x.shape
    assert pairwise_nearest(x, y, backend=backend).shape == (*leading, 5)


@pytest.mark.parametrize("two_sets", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout, two_sets):
    x = LAYOUTS[layout](draw(3, 21, 20))
    y = LAYOUTS[layout](draw(3, 19, 20)) if two_sets else None
    check(backend, x, y)
    assert torch.equal(pairwise_nearest(x, y, backend=backend), cosines(x, y).argmax(-1))


def test_items_more_than_2_to_31_elements_apart(backend, far_apart):
    near = {name: draw(2, n, 8, dtype=torch.float16) for name, n in (("x", 5), ("y", 3))}
    pairs = checks.assert_far_apart(partial(pairwise_logsumexp, backend=backend), near, far_apart)
    assert torch.equal(*(pairwise_nearest(**pair, backend=backend) for pair in pairs))


@pytest.mark.parametrize("wanted", ["x", "y"])
@pytest.mark.parametrize("equal", [True, False])
def test_only_the_gradients_asked_for(backend, wanted, equal):
    cotangent = torch.ones(2, 5).double() if equal else torch.randn(2, 5).double()
    inputs = {"x": draw(2, 5, 8), "y": draw(2, 6, 8)}

    def loss(x, y):
        return (pairwise_logsumexp(x, y, backend=backend) * cotangent).sum()

    checks.assert_only_one_gradient(loss, inputs, wanted)


def test_the_same_set_twice_is_two_sets(backend):
    x = draw(2, 5, 8).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    pairwise_logsumexp(x, x, backend=backend).sum().backward()
    formulas.pairwise_logsumexp(twin, twin).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    assert torch.equal(pairwise_nearest(x, x, backend=backend), torch.arange(5).expand(2, 5))


@pytest.mark.parametrize("m", [None, 9])
def test_backward_twice_and_inputs_untouched(backend, m):
    x, y = draw_sets(((2,), 17, m, 8), torch.float32)
    inputs = [t for t in (x.requires_grad_(), y) if t is not None]
    checks.assert_backward_twice(lambda *t: pairwise_logsumexp(*t, backend=backend).mean(), *inputs)


def test_once_differentiable(backend):
    if backend == "reference":
        pytest.skip("the reference is plain autograd")
    x = draw(1, 5, 4).requires_grad_()
    (dx,) = torch.autograd.grad(pairwise_logsumexp(x, backend=backend).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dx.sum().backward()


def test_autocast_does_not_change_it(backend):
    x = draw(2, 33, 24, dtype=torch.float32)
    expected, nearest = pairwise_logsumexp(x, backend=backend), pairwise_nearest(x, backend=backend)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        assert torch.equal(pairwise_logsumexp(x, backend=backend), expected)
        assert torch.equal(pairwise_nearest(x, backend=backend), nearest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nearest(backend, interpreted, shape, dtype):
    if interpreted and dtype == torch.float64 and shape[1] > 17:
        pytest.skip("slow: float32 and smaller shapes stand for it")
    x, y = draw_sets(shape, dtype)
    got, s = pairwise_nearest(x, y, backend=backend), cosines(x, y)
    assert got.dtype == torch.int64
    assert got.shape == x.shape[:-1]
    chosen = s.gather(-1, got.unsqueeze(-1)).squeeze(-1)
    assert (s.amax(-1) - chosen).max() <= FLOOR[dtype]
    if dtype == torch.float64 and shape[-1] > 1:
        assert torch.equal(got, s.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "distinct"), [(17, 4), (197, 5), (300, 140)])
def test_the_first_of_equal_vectors_is_nearest(backend, interpreted, n, distinct, dtype):
    if interpreted and n > 200:
        pytest.skip("slow")
    base = draw(2, distinct, 24, dtype=dtype)
    if interpreted and backend == "triton":
        # numpy's products of equal vectors differ in their last bits, unless they are exact
        base = (4 * base).round()
    i = torch.arange(n)
    x = base[:, i % distinct]
    expected = torch.where(i < distinct, i + distinct, i % distinct)
    within, between = pairwise_nearest(x, backend=backend), pairwise_nearest(base, x, backend=backend)
    if backend == "reference":  # torch's products of equal vectors differ in their last bits
        within, between, expected = within % distinct, between % distinct, expected % distinct
    assert torch.equal(within, expected.expand(2, n))
    assert torch.equal(between, i[:distinct].expand(2, distinct))


def test_nearest_of_zero_vectors(backend):
    x = torch.zeros(2, 70, 8)
    expected = torch.zeros(2, 70, dtype=torch.int64)
    assert torch.equal(pairwise_nearest(x, x[:, :66], backend=backend), expected)
    expected[:, 0] = 1
    assert torch.equal(pairwise_nearest(x, backend=backend), expected)


@pytest.mark.parametrize("at", [3, 150])
def test_nearest_takes_nan_as_argmax_does(backend, at):
    x = draw(2, 200, 12, dtype=torch.float32)
    x[0, at] = float("nan")
    x[0, 199] = float("nan")
    expected = torch.full((200,), at)
    expected[at] = expected[199] = 0
    got = pairwise_nearest(x, backend=backend)
    assert torch.equal(got[0], expected)
    assert torch.equal(got[1], cosines(x[1]).argmax(-1))
    assert (pairwise_nearest(x[:, :at], x, backend=backend)[0] == at).all()


def test_nearest_has_no_gradient(backend):
    assert not pairwise_nearest(draw(1, 5, 4).requires_grad_(), backend=backend).requires_grad


@pytest.mark.parametrize(("leading", "n", "m"), [((1,), 400, None), ((3,), 65, None), ((1,), 300, 200)])
@pytest.mark.parametrize("scale", [2.0, 200.0])
def test_the_same_bits(backend, interpreted, threads, leading, n, m, scale):
    if interpreted:
        n, m = 65, m and 33
    inputs = [t for t in draw_sets((leading, n, m, 48), torch.float32) if t is not None]
    times = 1 if interpreted else 4
    assert_same_bits(lambda *t: pairwise_logsumexp(*t, scale=scale, backend=backend), inputs, times)
    first = pairwise_nearest(*inputs, backend=backend)
    assert all(torch.equal(first, pairwise_nearest(*inputs, backend=backend)) for _ in range(times))


@pytest.mark.parametrize("m", [None, 200])
@pytest.mark.parametrize("items", [1, 3])
def test_compiled_kernels_give_the_same_bits_on_any_number_of_threads(backend, interpreted, m, items):
    if backend == "reference":
        pytest.skip("torch's products depend on the threads")
    if interpreted:
        pytest.skip("the interpreter has one thread")
    x, y = draw_sets(((items,), 300, m, 48), torch.float32)
    inputs = [t for t in (x, y) if t is not None]
    operation = partial(pairwise_logsumexp, scale=3.0, backend=backend)
    checks.assert_same_on_any_number_of_threads(operation, *inputs)


def test_any_shape_layout_and_options(backend, interpreted):
    @settings(max_examples=12 if interpreted else 40, deadline=None, derandomize=True, database=None)
    @given(data=st.data())
    def holds(data):
        leading = data.draw(st.lists(st.integers(1, 3), max_size=2).map(tuple), "leading")
        n = data.draw(st.integers(2, 40), "N")
        m = data.draw(st.none() | st.integers(1, 40), "M")
        width = data.draw(st.integers(2, 70), "D")
        scale = data.draw(st.sampled_from([0.5, 10.0, 70.0]), "scale")
        laid_out = draw_layout(data, len(leading) + 2)
        torch.manual_seed(data.draw(st.integers(0, 10**6), "seed"))
        x, y = (None if t is None else laid_out(t) for t in draw_sets((leading, n, m, width)))
        check(backend, x, y, scale=scale)
        assert torch.equal(pairwise_nearest(x, y, backend=backend), cosines(x, y).argmax(-1))

    holds()


@EVERY_RANGE
@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("scale", [2.0, 60.0])
def test_vectors_of_any_length(backend, far, sets, scale):
    vectors = (torch.randn(1, 9, 12), torch.randn(1, 11, 12))[:sets]
    weights = torch.rand(9, dtype=torch.float64)

    def loss(*vectors, eps):
        return (pairwise_logsumexp(*vectors, scale=scale, eps=eps, backend=backend) * weights).sum()

    def formula(*vectors):
        return (formulas.pairwise_logsumexp(*vectors, scale=scale) * weights).sum()

    assert_length_does_not_matter(loss, formula, far, *vectors)


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("lengths", [(1e-25,), (1.0,) * 66 + (1e25,)], ids=["first", "second"])
def test_a_far_vector_in_one_of_two_tiles(backend, sets, lengths):
    far = torch.float32, lengths, 0.0

    def loss(*vectors, eps):
        return pairwise_logsumexp(*vectors, scale=2.0, eps=eps, backend=backend).sum()

    vectors = torch.randn(2, 1, 70, 24)[:sets]
    assert_length_does_not_matter(
        loss, lambda *v: formulas.pairwise_logsumexp(*v, scale=2.0).sum(), far, *vectors
    )


@EVERY_RANGE
def test_the_nearest_of_vectors_of_any_length(backend, far):
    dtype, _, eps = far
    x = torch.randn(2, 9, 12).to(dtype).double()
    lengths = lengths_of(far, 9)
    given = (x * lengths).to(dtype)
    truth = cosines(given.double() / lengths).argmax(-1)
    assert torch.equal(pairwise_nearest(given, eps=eps, backend=backend), truth)
