"""The matrix products of the workspace in Triton: any strides, any sizes, and what stands past the keys."""

import importlib.util

import pytest
import torch
from comparing import assert_within_budget

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import interpreter_arithmetic
import interpreter_checks
import interpreter_speed

from vitdiv_kernels.ops import _launch as _triton
from vitdiv_kernels.ops.maps._triton import products

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
if _triton.INTERPRETED:
    interpreter_checks.install()
    interpreter_arithmetic.install()
    interpreter_speed.install()
pytestmark = pytest.mark.skipif(
    not (ON_GPU or _triton.INTERPRETED), reason="needs a GPU, or TRITON_INTERPRET=1 before Triton is imported"
)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def laid_out(shape, layout, dtype):
    """Random [B, H, N, d] in one of the layouts that callers have."""
    images, heads, rows, width = shape
    if layout == "packed":
        x = torch.randn(images, rows, 3, heads, width)[:, :, 1].transpose(1, 2)
    elif layout == "heads beside":
        x = torch.randn(images, rows, heads, width).transpose(1, 2)
    elif layout == "width not last":
        x = torch.randn(images, heads, width, rows).mT
    elif layout == "one row expanded":
        x = torch.randn(images, heads, 1, width).expand(shape)
    else:
        x = torch.randn(shape)
    return x.to(DEVICE, dtype)


LAYOUTS = ["contiguous", "packed", "heads beside", "width not last", "one row expanded"]
SIZES = [(1, 1, 1), (65, 131, 35), (3, 17, 130)]
# each layout, dtype and size, and each dtype in tiles that are not whole
CASES = [
    *((layout, torch.float32, SIZES[1]) for layout in LAYOUTS),
    *((layout, dtype, SIZES[1]) for layout, dtype in zip(LAYOUTS, DTYPES, strict=False)),
    *(("packed", torch.bfloat16, size) for size in (SIZES[0], SIZES[2])),
]
cases = pytest.mark.parametrize(("layout", "dtype", "sizes"), CASES, ids=str)


@cases
def test_products_of_rows(layout, dtype, sizes):
    rows, keys, width = sizes
    a, b = laid_out((2, 3, rows, width), layout, dtype), laid_out((2, 3, keys, width), layout, dtype)
    padded = -(-keys // 16) * 16
    maps = torch.full((2, 4, rows, padded), 7.0, dtype=dtype, device=DEVICE)
    products.rows_by_rows(maps[:, 1:], a, b, alpha=0.3, padding=float("-inf"))
    truth = 0.3 * a.double() @ b.double().mT
    assert_within_budget(maps[:, 1:, :, :keys], truth, truth, dtype, "maps", scale=10 * width**0.5)
    assert maps[:, 1:, :, keys:].eq(float("-inf")).all()
    assert maps[:, 0].eq(7).all()


@pytest.mark.parametrize("transposed", [False, True])
@cases
def test_products_with_maps(layout, dtype, sizes, transposed):
    rows, keys, width = sizes
    padded = -(-keys // 16) * 16
    maps = torch.randn(2, 4, rows, padded).to(DEVICE, dtype)[:, 1:]
    inner, outer = (rows, keys) if transposed else (keys, rows)
    b = laid_out((2, 3, inner, width), layout, dtype)
    result = laid_out((2, 3, outer, width), "packed" if layout == "one row expanded" else layout, dtype)
    truth = 0.3 * (maps[..., :keys].mT if transposed else maps[..., :keys]).double() @ b.double()
    products.maps_by_rows(result, maps, b, alpha=0.3, transposed=transposed)
    assert_within_budget(result, truth, truth, dtype, "result", scale=10 * inner**0.5)
    twice = 2 * result.double()
    products.maps_by_rows(result, maps, b, alpha=0.3, transposed=transposed, add=True)
    assert_within_budget(result, twice, twice, dtype, "sum", scale=20 * inner**0.5)


def test_the_width_outermost_in_a_large_tensor(far_apart):
    """A stride that has 32 bits, and products with it that have more."""

    def lay_out(*shape):
        x = torch.randn(*shape, dtype=torch.float64).to(DEVICE)
        return far_apart(x.movedim(-1, 0).half(), distance=2**30 + 2**12).movedim(0, -1)

    a, b, result = lay_out(1, 2, 5, 3), lay_out(1, 2, 7, 3), lay_out(1, 2, 5, 3)
    maps = torch.empty(1, 2, 5, 16, dtype=torch.float16, device=DEVICE)
    products.rows_by_rows(maps, a, b)
    truth = a.double() @ b.double().mT
    assert_within_budget(maps[..., :7], truth, truth, torch.float16, "maps", scale=10)
    products.maps_by_rows(result, maps, b)
    truth = maps[..., :7].double() @ b.double()
    assert_within_budget(result, truth, truth, torch.float16, "result", scale=50)
