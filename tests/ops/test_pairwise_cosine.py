"""pairwise_cosine: values, gradients, layouts and extremes, on every backend."""

from functools import partial

import formulas
import operation_checks as checks
import pytest
import torch
from comparing import largest_error
from far_vectors import EVERY_RANGE, assert_length_does_not_matter
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import draw_layout
from operation_checks import draw_away_from_0 as draw

from vitdiv_kernels import pairwise_cosine
from vitdiv_kernels.ops.pairs._tiles import GRADIENT
from vitdiv_kernels.ops.pairs.pairwise_cosine import triton_configs

PENALTIES = ["signed", "abs", "square", "relu"]
# leading axes, N, M (None: pairs within x), D
SHAPES = [
    ((2,), 2, None, 16),
    ((1,), 3, None, 128),
    ((3,), 17, None, 33),
    ((2,), 65, None, 80),
    ((1,), 197, None, 64),
    ((2, 2), 17, None, 35),
    ((), 65, None, 32),
    ((2,), 197, None, 16),
    ((2,), 1, 1, 33),
    ((2,), 1, 17, 64),
    ((3,), 3, 2, 128),
    ((1,), 65, 197, 35),
    ((2,), 197, 65, 80),
    ((2, 3), 17, 65, 16),
]


def check(backend, x, y, dtype=torch.float64, **options):
    """Value and every gradient against the plain formula in float64."""
    inputs = checks.of_pair(x, y)
    terms = formulas.pairwise_cosine(*inputs.values(), **options | {"penalty": "abs"}).max().item()
    checks.assert_pairs(
        partial(pairwise_cosine, backend=backend, **options),
        partial(formulas.pairwise_cosine, **options),
        inputs,
        dtype,
        lambda name, _: terms if name == "value" else None,
    )


# For test_plain_formulas.py: formulas, and their inputs.
FORMULAS = {"two sets": (formulas.pairwise_cosine, lambda: formulas.vectors(2))}


def check_instructions(dtype):
    """For test_capabilities.py: the kernels on odd sizes, so that vectors, register blocks and tiles have
    remainders, and on a width that is no multiple of eight."""
    for penalty in ("abs", "square"):
        for width in (20, 37):  # below and above N
            check("native", draw((2, 33, width), dtype), None, dtype, penalty=penalty)
    y = draw((2, 19, 37), dtype)
    check("native", draw((2, 33, 37), dtype, y), y, dtype, penalty="relu")


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend, interpreted, shape, dtype, penalty):
    leading, n, m, width = shape
    if interpreted and dtype == torch.float64 and n > 17:
        pytest.skip("slow: float32 and smaller shapes stand for it")
    y = None if m is None else draw((*leading, m, width), dtype)
    x = draw((*leading, n, width), dtype, y)
    check(backend, x, y, dtype, penalty=penalty)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_reductions_and_self_pairs(backend, penalty, include_self, reduction):
    x = draw((2, 3, 17, 24))
    check(backend, x, None, penalty=penalty, include_self=include_self, reduction=reduction)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_one_vector_with_itself(backend, penalty):
    x = draw((2, 1, 8)).requires_grad_()
    got = pairwise_cosine(x, penalty=penalty, include_self=True, backend=backend)
    torch.testing.assert_close(got, torch.ones((), dtype=torch.float64))
    got.backward()
    assert x.grad.abs().max() < 1e-14


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", [None, 65])
def test_low_precision(backend, m, dtype, penalty):
    y = None if m is None else draw((2, m, 48), dtype)
    check(backend, draw((2, 40, 48), dtype, y), y, dtype, penalty=penalty)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize(("n", "m", "width"), [(4, None, 3), (5, None, 7), (2, 3, 4), (3, None, 2)])
def test_gradcheck(backend, interpreted, penalty, n, m, width):
    y = None if m is None else draw((2, m, width)).requires_grad_()
    x = draw((2, n, width), other=y).requires_grad_()
    for reduction in ("mean", "none"):
        torch.autograd.gradcheck(
            lambda x, y, reduction=reduction: pairwise_cosine(
                x, y, penalty=penalty, reduction=reduction, backend=backend
            ),
            (x, y),
            fast_mode=interpreted,
        )


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("include_self", [False, True])
def test_zero_vectors(backend, penalty, include_self):
    x = draw((2, 9, 12))
    x[0, 3] = 0
    x[1] = 0
    options = dict(penalty=penalty, include_self=include_self)
    checks.assert_zero_vectors(
        lambda x, _: pairwise_cosine(x, backend=backend, **options),
        lambda x, _: formulas.pairwise_cosine(x, **options),
        x,
    )


def test_width_one(backend):
    """The cosine is a sign, and its gradient 0 up to rounding."""
    x = draw((2, 7, 1)).requires_grad_()
    got = pairwise_cosine(x, penalty="signed", backend=backend)
    torch.testing.assert_close(got, formulas.pairwise_cosine(x, penalty="signed"))
    got.backward()
    assert (x.grad * x).abs().max() < 1e-14


def test_vectors_shorter_than_eps(backend):
    x = draw((3, 7, 6))
    x[:, 2] *= 1e-3
    check(backend, x, None, penalty="abs", eps=0.1)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_equal_patches(backend, penalty):
    x = draw((2, 1, 16)).expand(2, 33, 16)
    got = pairwise_cosine(x, penalty=penalty, backend=backend)
    torch.testing.assert_close(got, torch.ones((), dtype=torch.float64))
    leaf = x.clone().requires_grad_()
    pairwise_cosine(leaf, penalty=penalty, backend=backend).backward()
    assert leaf.grad.abs().max() < 1e-14  # all cosines are at their maximum


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_the_length_does_not_matter(backend, size):
    x = draw((2, 21, 10), torch.float32)
    expected = formulas.pairwise_cosine(x.double())
    got = pairwise_cosine(x * size, eps=1e-30, backend=backend)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_nan_and_inf_propagate(backend, penalty, poison):
    x = draw((2, 9, 12), torch.float32)
    x[0, 3, 5] = poison
    got = pairwise_cosine(x, penalty=penalty, reduction="none", backend=backend)
    assert got[0].isnan()
    assert got[1].isfinite()
    leaf = x.clone().requires_grad_()
    pairwise_cosine(leaf, penalty=penalty, backend=backend).backward()
    assert leaf.grad[0, 3].isnan().any()
    assert leaf.grad[1].isfinite().all()


@pytest.mark.parametrize("m", [None, 4])
@pytest.mark.parametrize("leading", [(0,), (0, 3), (2, 0)])
def test_empty_batch(backend, leading, m):
    x = torch.randn(*leading, 5, 8, requires_grad=True)
    y = None if m is None else torch.randn(*leading, m, 8)
    assert pairwise_cosine(x, y, reduction="mean", backend=backend).isnan()
    assert pairwise_cosine(x, y, reduction="none", backend=backend).shape == leading
    total = pairwise_cosine(x, y, reduction="sum", backend=backend)
    assert total.item() == 0
    total.backward()
    assert x.grad.shape == x.shape


LAYOUTS = {
    "sliced": lambda x: torch.cat([torch.full_like(x[:, :1], 1e9), x, x], 1)[:, 1 : x.shape[1] + 1],
    "every second vector": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "transposed leading axis": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "last stride 2": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "transposed": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:1].expand_as(x),
    "part of the width": lambda x: torch.cat([x, torch.full_like(x, float("nan"))], 2)[:, :, : x.shape[2]],
}


@pytest.mark.parametrize("two_sets", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout, two_sets):
    y = LAYOUTS[layout](draw((3, 19, 20))) if two_sets else None
    x = LAYOUTS[layout](draw((3, 21, 20), other=y))
    for penalty in PENALTIES:
        check(backend, x, y, penalty=penalty)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_items_more_than_2_to_31_elements_apart(backend, far_apart, penalty):
    near = {"x": draw((2, 5, 8), torch.float16), "y": draw((2, 3, 8), torch.float16)}
    checks.assert_far_apart(partial(pairwise_cosine, penalty=penalty, backend=backend), near, far_apart)


def test_the_rows_of_the_triton_tables_fit_together():
    assert triton_configs.FORWARD.keys() == triton_configs.FROM_SIGNS.keys() == GRADIENT.keys()
    for key, backward in triton_configs.FROM_SIGNS.items():
        assert triton_configs.FORWARD[key].rows % backward.rows == 0
        assert backward.rows % backward.columns == 0
        assert backward.columns % 32 == 0


@pytest.mark.parametrize("penalty", PENALTIES)
def test_no_gradient_is_wanted(backend, penalty):
    """Then the forward keeps nothing for a backward; the value is the same."""
    x, y = draw((2, 40, 24)), draw((2, 33, 24))
    for inputs in ((x, None), (x, y)):
        expected = formulas.pairwise_cosine(*inputs, penalty=penalty)
        torch.testing.assert_close(pairwise_cosine(*inputs, penalty=penalty, backend=backend), expected)


@pytest.mark.parametrize("wanted", ["x", "y"])
def test_only_the_gradients_asked_for(backend, wanted):
    inputs = {"x": draw((2, 5, 8)), "y": draw((2, 6, 8))}
    checks.assert_only_one_gradient(partial(pairwise_cosine, backend=backend), inputs, wanted)


def test_the_same_set_twice_is_two_sets(backend):
    x = draw((2, 5, 8)).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    torch.testing.assert_close(
        pairwise_cosine(x, x, backend=backend), formulas.pairwise_cosine(twin, include_self=True)
    )
    pairwise_cosine(x, x, backend=backend).backward()
    formulas.pairwise_cosine(twin, include_self=True).backward()
    torch.testing.assert_close(x.grad, twin.grad)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_backward_twice_and_inputs_untouched(backend, penalty):
    x = draw((2, 17, 8), torch.float32).requires_grad_()
    checks.assert_backward_twice(partial(pairwise_cosine, penalty=penalty, backend=backend), x)


def test_autocast_does_not_change_it(backend):
    x = draw((2, 33, 24), torch.float32)
    expected = pairwise_cosine(x, backend=backend)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        assert torch.equal(pairwise_cosine(x, backend=backend), expected)


def test_float32_is_not_computed_in_less(backend):
    """Near-parallel vectors: 1 - S is 1e-4, which arithmetic in 16 bits or TF32 would lose."""
    x = torch.randn(1, 1, 64) + 1e-2 * torch.randn(1, 50, 64)
    got = pairwise_cosine(x, penalty="abs", backend=backend)
    assert largest_error(got, formulas.pairwise_cosine(x.double())) < 1e-6


def test_any_shape_layout_and_options(backend, interpreted):
    @settings(max_examples=12 if interpreted else 40, deadline=None, derandomize=True, database=None)
    @given(data=st.data())
    def holds(data):
        leading = data.draw(st.lists(st.integers(1, 3), max_size=2).map(tuple), "leading")
        n = data.draw(st.integers(2, 40), "N")
        m = data.draw(st.none() | st.integers(1, 40), "M")
        width = data.draw(st.integers(2, 70), "D")
        penalty = data.draw(st.sampled_from(PENALTIES), "penalty")
        include_self = data.draw(st.booleans(), "include_self") and m is None
        laid_out = draw_layout(data, len(leading) + 2)
        torch.manual_seed(data.draw(st.integers(0, 10**6), "seed"))
        y = None if m is None else laid_out(draw((*leading, m, width)))
        x = laid_out(draw((*leading, n, width), other=y))
        check(backend, x, y, penalty=penalty, include_self=include_self, reduction="none")

    holds()


@EVERY_RANGE
@pytest.mark.parametrize("penalty", formulas.PENALTIES)
@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("width", [5, 40])
def test_vectors_of_any_length(backend, request, far, penalty, sets, width):
    if far[0] == torch.bfloat16 and sets == 1 and "cuda" in request.node.callspec.params["backend"]:
        pytest.skip("CUDA kernels read the norms of a short set of bfloat16 with its products: README.md")

    def loss(*vectors, eps):
        return pairwise_cosine(*vectors, penalty=penalty, eps=eps, backend=backend)

    vectors = torch.randn(1, 9, width), torch.randn(1, 11, width)
    assert_length_does_not_matter(
        loss, lambda *v: formulas.pairwise_cosine(*v, penalty=penalty), far, *vectors[:sets]
    )
