"""The CUDA kernels of pairwise_rows, emulated, against the plain formula in float64."""

import formulas
import pytest
import torch
from comparing import assert_within_budget

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# items, N, M (None: pairs within x), D; a tile is 128 x 128 (double: 64 x 64)
SHAPES = [(2, 3, None, 16), (1, 130, None, 40), (1, 40, 17, 150), (1, 17, 140, 24), (2, 1, 1, 3)]


def draw(L, N, M, D, dtype):
    x, y = (None if n is None else torch.randn(L, n, D, dtype=torch.float64).to(dtype) for n in (N, M))
    return x, y


def check(emulator, x, y, scale=5.0, eps=1e-8, needs=None):
    """Log-sum-exp of rows and its gradients."""
    needs = needs or (True, y is not None)
    drows = torch.linspace(-0.5, 1.5, x.shape[0] * x.shape[1], dtype=torch.float64).reshape(x.shape[:2])

    def plain(dtype):
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (x, y)]
        rows = formulas.pairwise_logsumexp(*leaves, scale=scale, eps=eps)
        inputs = [t for t in leaves if t is not None]
        return rows.detach(), *torch.autograd.grad(rows, inputs, drows.to(rows.dtype))

    rows, saved = emulator.pairwise_logsumexp_fwd(x, y, scale, eps)
    got = emulator.pairwise_logsumexp_bwd(drows.to(rows.dtype), rows, x, y, saved, scale, eps, *needs)
    rough, truth = plain(x.dtype), plain(torch.float64)
    assert_within_budget(rows, rough[0], truth[0], x.dtype, "rows", max(1.0, truth[0].abs().max().item()))
    for name, gradient, need, *expected in zip(("dx", "dy"), got, needs, rough[1:], truth[1:], strict=False):
        if need:
            # where all cosines of a row are equal, only rounding is left
            size = scale if x.shape[1] == 1 else None
            assert_within_budget(gradient, *expected, x.dtype, name, size)
        else:
            assert gradient.shape == (0,)


def cosines(x, y):
    unit, other = (torch.nn.functional.normalize(t.double(), dim=-1) for t in (x, x if y is None else y))
    s = unit @ other.mT
    return s - 4 * torch.eye(x.shape[1]) if y is None else s


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(emulator, shape, dtype):
    check(emulator, *draw(*shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nearest(emulator, shape, dtype):
    x, y = draw(*shape, dtype)
    nearest, s = emulator.pairwise_nearest(x, y), cosines(x, y)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert (s.amax(-1) - s.gather(-1, nearest[..., None])[..., 0] <= tolerance).all()


@pytest.mark.parametrize("two_sets", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_of_equal_vectors(emulator, dtype, two_sets):
    """Equal vectors, of whatever length, on both sides of the diagonal and in several tiles."""
    x = torch.randn(1, 3, 40, dtype=torch.float64).to(dtype).repeat(1, 50, 1)
    x[:, 75:] *= 2
    nearest = emulator.pairwise_nearest(x, x.clone() if two_sets else None)[0]
    i = torch.arange(150)
    own = i % 3
    first = own if two_sets else torch.where(i == own, own + 3, own)
    assert torch.equal(nearest, first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_of_equals_across_the_diagonal(emulator, dtype):
    """Of many vectors, whose cosines with those before and after them are sums of many rounded steps."""
    torch.manual_seed(0)
    twins = torch.randn(100, 1024)
    between = twins + 0.3 * torch.randn(100, 1024)
    x = torch.cat([twins, between, twins])[None].to(dtype)
    i = torch.arange(100)
    assert torch.equal(emulator.pairwise_nearest(x, None)[0], torch.cat([i + 200, i, i]))


@pytest.mark.parametrize("m", [None, 70])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [39.0, 1e3])
def test_large_scales(emulator, scale, dtype, m):
    """Above 40 (float64: 300) the largest of a row is looked for."""
    x, y = draw(1, 40, m, 3, dtype)
    check(emulator, x, y, scale)


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_slopes_beyond_the_range_of_float16(emulator, size):
    """Of vectors so long or short that their gradients are within it."""
    x, y = (size * torch.randn(1, 40, 16)).half(), None
    drows = size**2 * torch.linspace(0.5, 1.5, 40)[None]
    rows, saved = emulator.pairwise_logsumexp_fwd(x, y, 5.0)
    dx, _ = emulator.pairwise_logsumexp_bwd(drows, rows, x, y, saved, 5.0)
    leaf = x.double().requires_grad_()
    formulas.pairwise_logsumexp(leaf, scale=5.0).backward(drows.double())
    assert (dx - leaf.grad).abs().max() <= 2e-3 * leaf.grad.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_vectors_that_are_zero_or_shorter_than_eps(emulator, dtype):
    x, _ = draw(1, 35, None, 12, dtype)
    x[:, 2] *= 1e-2
    check(emulator, x, None, eps=0.1)
    x[0, 3] = 0
    check(emulator, x, None, eps=0.1)


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
    x, y = draw(2, 21, 19, 16, dtype)
    check(emulator, layout(x), layout(y))


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_gradients_that_are_needed(emulator, needs):
    check(emulator, *draw(2, 6, 5, 8, torch.float32), needs=needs)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("scale", [5.0, 1e3])
def test_not_a_number_stays_one(emulator, scale, poison):
    x, _ = draw(2, 40, None, 16, torch.float16)
    x[0, 3, 5] = poison
    rows, saved = emulator.pairwise_logsumexp_fwd(x, None, scale)
    dx, _ = emulator.pairwise_logsumexp_bwd(torch.ones(2, 40), rows, x, None, saved, scale)
    assert rows[0].isnan().all()
    assert dx[0].isnan().any(-1).all()
    assert rows[1].isfinite().all()
    assert dx[1].isfinite().all()
    nearest = emulator.pairwise_nearest(x, None)[0]
    others = torch.arange(40) != 3
    assert (nearest[others] == 3).all()  # the largest is a NaN
    assert nearest[3] == 0


def test_an_empty_batch_launches_nothing(emulator):
    x = torch.ones(0, 3, 8)
    with emulator.counting() as counts:
        rows, saved = emulator.pairwise_logsumexp_fwd(x, None, 1.0)
        assert emulator.pairwise_logsumexp_bwd(rows, rows, x, None, saved, 1.0)[0].shape == x.shape
        assert emulator.pairwise_nearest(x, None).shape == (0, 3)
    assert counts["launches"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("order", ["reverse", 0])
def test_any_schedule_gives_the_same_bits(emulator, order, dtype):
    x, _ = draw(2, 70, None, 24, dtype)

    def run():
        rows, saved = emulator.pairwise_logsumexp_fwd(x, None, 5.0)
        dx, _ = emulator.pairwise_logsumexp_bwd(torch.ones_like(rows), rows, x, None, saved, 5.0)
        return rows, dx, emulator.pairwise_nearest(x, None)

    expected = run()
    emulator.configure(*((order,) if order == "reverse" else ("random", order)))
    assert all(map(torch.equal, run(), expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpus_with_less_shared_memory(emulator, dtype):
    emulator.configure(architecture=89)
    x, _ = draw(1, 40, None, 200, dtype)
    check(emulator, x, None)
    emulator.pairwise_nearest(x, None)


def test_shared_memory_is_read_without_bank_conflicts(emulator):
    x, _ = draw(1, 160, None, 192, torch.bfloat16)
    with emulator.counting() as counts:
        rows, saved = emulator.pairwise_logsumexp_fwd(x, None, 5.0)
        emulator.pairwise_logsumexp_bwd(torch.ones_like(rows), rows, x, None, saved, 5.0)
    assert counts["ldmatrix_rounds"] == 4 * counts["ldmatrix"]  # four matrices each
