"""The CUDA kernels of two_gram, emulated, against the plain formula in float64."""

import formulas
import pytest
import torch
from comparing import assert_within_budget
from operation_checks import draw_two_grams as draw

from vitdiv_kernels.ops.pairs.two_gram.reference import PENALTIES

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
MARGIN = 0.25


def check(emulator, x, y, penalty, normalise=True, eps=1e-8, needs=None):
    options = dict(penalty=penalty, margin=MARGIN, normalise=normalise, eps=eps)
    dsums = torch.linspace(0.5, 1.5, x.shape[0], dtype=torch.float64)
    pairs = x.shape[1] ** 2
    needs = needs or (True, y is not None)

    def plain(dtype):
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (x, y)]
        sums = formulas.two_gram(*leaves, **options, reduction="none") * pairs
        inputs = [t for t in leaves if t is not None]
        return sums.detach(), *torch.autograd.grad(sums, inputs, dsums.to(sums.dtype))

    sums, saved = emulator.two_gram_fwd(x, y, *options.values(), *needs)
    got = emulator.two_gram_bwd(dsums.to(sums.dtype), x, y, saved, *options.values(), *needs)
    rough, truth = plain(x.dtype), plain(torch.float64)
    size = pairs if normalise else truth[0].abs().max().item()
    assert_within_budget(sums, rough[0], truth[0], x.dtype, "sums", size)
    for name, gradient, need, *expected in zip(("dx", "dy"), got, needs, rough[1:], truth[1:], strict=False):
        if need:
            # a vector's cosine with itself has no gradient: only rounding is left
            rounding = x.shape[1] == 1 or (y is None and penalty == "product")
            assert_within_budget(gradient, *expected, x.dtype, name, 1.0 if rounding else None)
        else:
            assert gradient.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("L", "N", "D", "D2", "penalties"),
    [
        (2, 3, 16, 24, list(PENALTIES)),
        (1, 33, 35, 3, list(PENALTIES)),
        (2, 40, 24, None, list(PENALTIES)),
        (1, 130, 72, 40, ["square", "relu_teacher_square"]),
        (1, 17, 150, 140, ["hinge", "clamped_teacher_square"]),
        (2, 1, 8, 3, ["relu_square", "product"]),
    ],
)
def test_values_and_gradients(emulator, L, N, D, D2, penalties, dtype):
    x, y = draw((L,), N, D, D2, dtype)
    for penalty in penalties:
        check(emulator, x, y, penalty)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D2", "penalty"), [(5, "product"), (5, "square"), (None, "square"), (5, "hinge")])
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_inner_products(emulator, size, D2, penalty, dtype):
    """Of vectors as they are, whose products and slopes may be beyond the range of float16."""
    x, y = draw((2,), 37, 16, D2, dtype, normalise=False, size=size)
    options = dict(penalty=penalty, margin=MARGIN, normalise=False)
    if dtype != torch.float16:
        check(emulator, x, y, penalty, normalise=False)
        return
    leaves = [None if t is None else t.double().requires_grad_() for t in (x, y)]
    truth = formulas.two_gram(*leaves, **options, reduction="none") * 37**2
    truth.sum().backward()
    torch.testing.assert_close(
        emulator.two_gram_fwd(x, y, **options)[0].double(), truth.detach(), rtol=1e-5, atol=0
    )
    for i, leaf in enumerate(leaves):
        if leaf is not None:
            factor = 1 / leaf.grad.abs().max()  # so that the gradient is within it
            dsums = factor.float().expand(2)
            gradient = emulator.two_gram_bwd(dsums, x, y, **options, needs_dy=y is not None)[i]
            assert (gradient - factor * leaf.grad).abs().max() <= 2e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_vectors_that_are_zero_or_shorter_than_eps(emulator, penalty, dtype):
    x, y = draw((1,), 35, 12, 7, dtype)
    x[:, 2] *= 1e-2
    y[:, 4] *= 1e-2
    check(emulator, x, y, penalty, eps=0.1)
    x[0, 3] = 0
    y[0, 5] = 0
    check(emulator, x, y, penalty, eps=0.1)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("margin", [0.0, MARGIN])
@pytest.mark.parametrize("normalise", [False, True])
def test_at_the_kinks(emulator, normalise, margin, penalty):
    """Orthogonal and equal vectors: S and T are 0, 1, -1 or MARGIN, exactly."""
    x = torch.tensor([[0.0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0], [-1, 0, 0, 0], [1, 0, 0, 0]]).double()
    y = torch.tensor([[1.0, 0, 0, 0], [1, 0, 0, 0], [0, -1, 0, 0], [0, 1, 0, 0], [0.25, 0, 0, 0]]).double()
    for first, second in ((x, y), (y, x), (x, x), (x, None)):
        first, second = (None if t is None else t[None].clone() for t in (first, second))
        options = dict(penalty=penalty, margin=margin, normalise=normalise, eps=0.5)
        dsums, needs_dy = torch.ones(1, dtype=torch.float64), second is not None
        got = emulator.two_gram_bwd(dsums, first, second, **options, needs_dy=needs_dy)
        leaves = [None if t is None else t.requires_grad_() for t in (first, second)]
        formulas.two_gram(*leaves, **options, reduction="sum").backward()
        for gradient, leaf in zip(got, leaves, strict=True):
            if leaf is not None:
                torch.testing.assert_close(gradient, leaf.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: torch.cat([torch.full_like(x[:, :1], float("nan")), x], 1)[:, 1:],  # items with a gap
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.cat([x, torch.full_like(x[..., :3], float("nan"))], 2)[..., : x.shape[2]],
    ],
)
def test_layouts(emulator, layout, dtype):
    x, y = draw((2,), 21, 16, 8, dtype)
    check(emulator, layout(x), layout(y), "square")


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_gradients_that_are_needed(emulator, needs):
    check(emulator, *draw((2,), 6, 8, 5, torch.float32), "relu_square", needs=needs)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("set_", [0, 1])
def test_not_a_number_stays_one(emulator, set_, penalty, poison):
    inputs = draw((2,), 40, 16, 8, torch.float16)
    inputs[set_][0, 3, 5] = poison
    options = dict(penalty=penalty, margin=MARGIN, needs_dy=True)
    sums, saved = emulator.two_gram_fwd(*inputs, **options)
    gradient = emulator.two_gram_bwd(torch.ones(2), *inputs, saved, **options)[set_]
    assert sums[0].isnan()
    assert gradient[0, 3].isnan().any()
    assert sums[1].isfinite()
    assert gradient[1].isfinite().all()


def test_an_empty_batch_launches_nothing(emulator):
    x = torch.ones(0, 3, 8)
    with emulator.counting() as counts:
        sums, saved = emulator.two_gram_fwd(x, None, "square")
        assert emulator.two_gram_bwd(sums, x, None, saved, "square")[0].shape == x.shape
    assert counts["launches"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("order", ["reverse", 0])
def test_any_schedule_gives_the_same_bits(emulator, order, dtype):
    x, y = draw((2,), 70, 24, 8, dtype)
    options = dict(penalty="hinge", margin=MARGIN, needs_dy=True)

    def run():
        sums, saved = emulator.two_gram_fwd(x, y, **options)
        return sums, *emulator.two_gram_bwd(torch.ones_like(sums), x, y, saved, **options)

    expected = run()
    emulator.configure(*((order,) if order == "reverse" else ("random", order)))
    assert all(map(torch.equal, run(), expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpus_with_less_shared_memory(emulator, dtype):
    emulator.configure(architecture=89)
    check(emulator, *draw((1,), 40, 200, 24, dtype), "square")


def test_shared_memory_is_read_without_bank_conflicts(emulator):
    x, y = draw((1,), 160, 192, 64, torch.bfloat16)
    with emulator.counting() as counts:
        sums, saved = emulator.two_gram_fwd(x, y, "square")
        emulator.two_gram_bwd(sums, x, y, saved, "square", needs_dy=True)
    assert counts["ldmatrix_rounds"] == 4 * counts["ldmatrix"]  # four matrices each
