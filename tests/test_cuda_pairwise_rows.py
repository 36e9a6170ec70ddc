"""The CUDA kernels of pairwise_rows, emulated, against the plain formula in float64."""

import emulated_cuda
import formulas
import pytest
import torch
from comparing import assert_within_budget

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# items, N, M (None: pairs within x), D; a tile is 128 x 128 (double: 64 x 64)
SHAPES = [(2, 3, None, 16), (1, 130, None, 40), (1, 40, 17, 150), (1, 17, 140, 24), (2, 1, 1, 3)]

pytestmark = pytest.mark.skipif(emulated_cuda.compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def emulator():
    return emulated_cuda.Emulator()


@pytest.fixture(autouse=True)
def usual_schedule(emulator):
    emulator.configure()


def draw(L, N, M, D, dtype):
    x, y = (None if n is None else torch.randn(L, n, D, dtype=torch.float64).to(dtype) for n in (N, M))
    return x, y


def check(emulator, x, y, scale=5.0, eps=1e-8, needs=(True, True)):
    """Log-sum-exp of rows and its gradients, and the nearest, which are those of some row's largest cosine."""
    drows = torch.linspace(-0.5, 1.5, x.shape[0] * x.shape[1], dtype=torch.float64).reshape(x.shape[:2])

    def plain(dtype):
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (x, y)]
        rows = formulas.pairwise_logsumexp(*leaves, scale=scale, eps=eps)
        inputs = [t for t in leaves if t is not None]
        return rows.detach(), *torch.autograd.grad(rows, inputs, drows.to(rows.dtype))

    rows = emulator.pairwise_logsumexp_fwd(x, y, scale, eps)
    got = emulator.pairwise_logsumexp_bwd(drows.to(rows.dtype), rows, x, y, scale, eps, needs)
    rough, truth = plain(x.dtype), plain(torch.float64)
    assert_within_budget(rows, rough[0], truth[0], x.dtype, "rows", max(1.0, truth[0].abs().max().item()))
    for name, gradient, need, *expected in zip(("dx", "dy"), got, needs, rough[1:], truth[1:], strict=False):
        if need:
            # where all cosines of a row are equal, only rounding is left
            size = scale if x.shape[1] == 1 else None
            assert_within_budget(gradient, *expected, x.dtype, name, size)
        else:
            assert gradient is None


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
