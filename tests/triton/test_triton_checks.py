"""The interpreter refuses accesses outside the tensor that a pointer came from, and races of programs."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import interpreter_checks
import triton
import triton.language as tl

from vitdiv_kernels.ops import _launch as _triton

pytestmark = pytest.mark.skipif(
    not _triton.INTERPRETED, reason="needs TRITON_INTERPRET=1 before Triton is imported"
)
interpreter_checks.install()


@triton.jit
def _copy(X, Y, x_row, first, end, step, BN: tl.constexpr):
    """Y[n] = X[n, 0] from `first` to `end`, BN of them by each program, programs `step` apart."""
    n = first + tl.program_id(0) * step + tl.arange(0, BN)
    places = X + n.to(tl.int64)[:, None] * x_row + tl.arange(0, 1)[None, :]
    x = tl.load(places, mask=(n < end)[:, None], other=0.0)
    tl.store(Y + n, tl.reshape(x, (BN,)), mask=n < end)


def copy(x, y, first, end, programs=1, step=16):
    arguments = x, y, x.stride(0), first, end, step
    _triton.launch(_copy, (programs,), *arguments, BN=16, num_warps=1, num_stages=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "places", "first", "end", "words"),
    [
        (9, 9, 0, 9, None),
        (9, 9, 0, 0, None),
        (0, 0, 0, 0, None),
        (8, 9, 0, 9, "a load of"),
        (9, 8, 0, 9, "a store of"),
        (9, 9, -1, 8, "a load of bytes -"),
        (9, 0, 0, 9, "of a tensor of 0"),
    ],
)
def test_each_access_is_checked(rows, places, first, end, words, dtype):
    """Of rows and places inside larger memory, where nothing else would notice."""
    x, y = torch.randn(32, 3).to(dtype)[8 : 8 + rows, 1:], torch.zeros(32, dtype=dtype)[8 : 8 + places]
    if words is None:
        copy(x, y, first, end)
        assert torch.equal(y[:end], x[:end, 0])
    else:
        with pytest.raises(triton.runtime.errors.InterpreterError, match=words):
            copy(x, y, first, end)


def test_races():
    x, y = torch.randn(64, 1), torch.zeros(64)
    copy(x, y, 0, 40, programs=3)
    copy(x, x, 0, 40, programs=3)  # in place, each program its own rows
    with pytest.raises(RuntimeError, match="a race"):
        copy(x, y, 0, 40, programs=2, step=15)
    with pytest.raises(RuntimeError, match="a race"):
        copy(x[1:], x[:-1, 0], 0, 40, programs=2)  # reads what the next program writes
    copy(x, y, 0, 40, programs=1)
    copy(x[1:], x[:-1, 0], 0, 16, programs=1)


@triton.jit
def _extremes(X, Y, OUT):
    x, y = tl.load(X + tl.arange(0, 4)), tl.load(Y + tl.arange(0, 4))
    tl.store(OUT + tl.arange(0, 4), tl.maximum(x, y))
    tl.store(OUT + 4 + tl.arange(0, 4), tl.minimum(x, y))
    tl.store(OUT + 8, tl.max(x, 0))
    tl.store(OUT + 9, tl.min(x, 0))


def test_extremes_pass_over_nan_as_on_a_gpu():
    nan = float("nan")
    x, y = torch.tensor([nan, 2, nan, -1]), torch.tensor([3, nan, nan, 0.0])
    out = torch.zeros(10)
    _triton.launch(_extremes, (1,), x, y, out, num_warps=1, num_stages=1)
    assert torch.equal(out.nan_to_num(99), torch.tensor([3, 2, 99, 0, 3, 2, 99, -1, 2, -1.0]))
