"""The CUDA kernels of pairwise_cosine, emulated, against the plain formula in float64."""

import formulas
import pytest
import torch
from comparing import assert_within_budget
from operation_checks import draw_away_from_0 as draw

from vitdiv_kernels.ops.pairs.pairwise_cosine.gpu_saved import new_saved

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
PENALTIES = ["signed", "abs", "square", "relu"]


def check(emulator, x, y, penalty, include_self=False, eps=1e-8, needs=None):
    """Sums and gradients; the sums without a backward have the same bits."""
    options = dict(penalty=penalty, include_self=include_self, eps=eps)
    needs = needs or (True, y is not None)
    dsums = torch.linspace(0.5, 1.5, x.shape[0], dtype=torch.float64)
    pairs = x.shape[1] * (y.shape[1] if y is not None else x.shape[1] - (not include_self))

    def plain(dtype):
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (x, y)]
        sums = formulas.pairwise_cosine(*leaves, **options, reduction="none") * pairs
        inputs = [t for t in leaves if t is not None]
        return sums.detach(), *torch.autograd.grad(sums, inputs, dsums.to(dtype))

    sums, saved = emulator.pairwise_cosine_fwd(x, y, **options)
    alone, _ = emulator.pairwise_cosine_fwd(x, y, **options, for_backward=False)
    assert torch.equal(sums, alone)
    got = emulator.pairwise_cosine_bwd(dsums.to(sums.dtype), x, y, saved, *options.values(), *needs)
    rough, truth = plain(x.dtype), plain(torch.float64)
    sizes_of_terms = formulas.pairwise_cosine(
        x.double(), None if y is None else y.double(), **options | {"penalty": "abs"}, reduction="none"
    )
    scale = sizes_of_terms.max().item() * pairs
    assert_within_budget(sums, rough[0], truth[0], x.dtype, "sums", scale)
    for name, gradient, need, *expected in zip(("dx", "dy"), got, needs, rough[1:], truth[1:], strict=False):
        if need:
            assert_within_budget(gradient, *expected, x.dtype, name)
        else:
            assert gradient.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("L", "N", "M", "D", "penalties"),
    [
        (2, 2, None, 3, PENALTIES),
        (2, 3, None, 16, PENALTIES),
        (1, 33, None, 35, PENALTIES),
        (2, 130, None, 24, ["abs", "square"]),
        (1, 197, None, 64, ["relu"]),
        (1, 70, None, 150, ["abs", "square"]),
        (1, 5, None, 1537, ["signed", "relu"]),
        (2, 1, 1, 33, PENALTIES),
        (1, 40, 17, 72, PENALTIES),
        (1, 17, 140, 24, ["abs", "square"]),
        (1, 140, 17, 8, ["relu", "signed"]),
    ],
)
def test_values_and_gradients(emulator, L, N, M, D, penalties, dtype):
    y = None if M is None else draw((L, M, D), dtype)
    x = draw((L, N, D), dtype, other=y)
    for penalty in penalties:
        check(emulator, x, y, penalty)


@pytest.mark.parametrize("N", [32, 64, 96, 161, 193, 224, 225])
def test_short_sets_are_the_work_of_one_block(emulator, N):
    x = draw((2, N, 40), torch.bfloat16)
    with emulator.counting() as counts:
        emulator.pairwise_cosine_fwd(x, None, "abs")
    assert (counts["launches"] == 1) == (N <= 224)
    check(emulator, x, None, "abs")


@pytest.mark.parametrize("penalty", PENALTIES)
def test_self_pairs(emulator, penalty):
    check(emulator, draw((2, 40, 24), torch.float64), None, penalty, include_self=True)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_vectors_that_are_zero_or_shorter_than_eps(emulator, dtype, penalty):
    x = draw((1, 35, 12), dtype)
    x[:, 2] *= 1e-2
    check(emulator, x, None, penalty, eps=0.1)
    x[0, 3] = 0
    x[0, 33] = 0
    dsums = torch.ones(1)
    for include_self in (False, True):
        sums, saved = emulator.pairwise_cosine_fwd(x, None, penalty, include_self)
        (dx, _) = emulator.pairwise_cosine_bwd(dsums, x, None, saved, penalty, include_self)
        leaf = x.double().requires_grad_()
        expected = formulas.pairwise_cosine(leaf, penalty=penalty, include_self=include_self, reduction="sum")
        expected.backward()
        torch.testing.assert_close(sums.double()[0], expected.detach(), rtol=1e-3, atol=1e-2)
        # dx of a zero vector is dx_hat / eps, 1e8 times the others, and not within float16
        zero = (x == 0).all(-1)
        for rows in (zero, ~zero) if dtype == torch.float32 else (~zero,):
            size = leaf.grad[rows].abs().max().item()
            assert (dx.double() - leaf.grad)[rows].abs().max() <= 4e-3 * size


@pytest.mark.parametrize("two_sets", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: torch.cat([torch.full_like(x[:, :1], float("nan")), x], 1)[:, 1:],  # items with a gap
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.cat([x, torch.full_like(x[..., :3], float("nan"))], 2)[..., : x.shape[2]],
        lambda x: x[:1].expand_as(x),
    ],
)
def test_layouts(emulator, layout, dtype, two_sets):
    y = layout(draw((3, 19, 16), dtype)) if two_sets else None
    x = layout(draw((3, 21, 16), dtype, other=y))
    for penalty in PENALTIES:
        check(emulator, x, y, penalty)


def test_items_at_unequal_distances_are_copied(emulator):
    x = torch.randn(2, 3, 4, 8)
    sums, _ = emulator.pairwise_cosine_fwd(x[:, :2], None, "abs")
    assert torch.equal(sums, emulator.pairwise_cosine_fwd(x, None, "abs")[0][[0, 1, 3, 4]])


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_gradients_that_are_needed(emulator, needs):
    y = draw((2, 6, 8), torch.float32)
    x = draw((2, 5, 8), torch.float32, other=y)
    for penalty in PENALTIES:
        check(emulator, x, y, penalty, needs=needs)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_not_a_number_stays_one(emulator, penalty, poison):
    x = draw((2, 40, 16), torch.float16)
    x[0, 3, 5] = poison
    sums, saved = emulator.pairwise_cosine_fwd(x, None, penalty)
    dx, _ = emulator.pairwise_cosine_bwd(torch.ones(2), x, None, saved, penalty)
    assert sums[0].isnan()
    assert dx[0, 3].isnan().any()
    assert sums[1].isfinite()
    assert dx[1].isfinite().all()


def test_an_empty_batch_launches_nothing(emulator):
    x = torch.ones(0, 3, 8)
    with emulator.counting() as counts:
        sums, saved = emulator.pairwise_cosine_fwd(x, None, "abs")
        assert emulator.pairwise_cosine_bwd(sums, x, None, saved, "abs")[0].shape == x.shape
    assert sums.shape == (0,)
    assert counts["launches"] == 0


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_what_is_saved_has_the_size_that_the_fake_kernel_says(emulator, dtype, penalty):
    x, y = torch.randn(2, 37, 24).to(dtype), torch.randn(2, 70, 24).to(dtype)
    for other in (None, y):
        _, saved = emulator.pairwise_cosine_fwd(x, other, penalty)
        assert saved.shape == new_saved(x, other, penalty).shape


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("order", ["reverse", 0, 1])
def test_any_schedule_gives_the_same_bits(emulator, order, dtype, penalty):
    x, dsums = torch.randn(2, 70, 40).to(dtype), torch.ones(2, dtype=torch.float64)

    def run():
        sums, saved = emulator.pairwise_cosine_fwd(x, None, penalty)
        return sums, emulator.pairwise_cosine_bwd(dsums.to(sums.dtype), x, None, saved, penalty)[0]

    expected = run()
    emulator.configure(*((order,) if order == "reverse" else ("random", order)))
    assert all(map(torch.equal, run(), expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", [80, 89])
def test_gpus_with_less_shared_memory(emulator, architecture, dtype):
    emulator.configure(architecture=architecture)
    x = draw((1, 40, 200), dtype)
    for penalty in ("abs", "square"):
        check(emulator, x, None, penalty)


def test_shared_memory_is_read_without_bank_conflicts(emulator):
    x = torch.randn(1, 160, 192).to(torch.bfloat16)
    with emulator.counting() as counts:
        sums, saved = emulator.pairwise_cosine_fwd(x, None, "abs")
        emulator.pairwise_cosine_bwd(sums, x, None, saved, "abs")
    assert counts["ldmatrix_rounds"] == 4 * counts["ldmatrix"]  # four matrices each
