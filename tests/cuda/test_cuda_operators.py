"""The operators over the CUDA kernels, emulated: what their host code refuses, and `head_dots`, which has no
file of its own. Values and gradients of the others: the backend "emulated-cuda" of test_<op>.py."""

import emulated_operators
import emulation_build
import pytest
import torch

from vitdiv_kernels import _dispatch, _native

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

pytestmark = pytest.mark.skipif(emulation_build.compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def operators():
    return emulated_operators.emulator().operators


def test_the_module_registers_for_cuda_what_is_emulated(operators, library):
    def registered(namespace, key):
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        return {name for name in operators if has(f"{namespace}::{name}", key)}

    emulated = registered(emulated_operators.NAMESPACE, "CPU")
    assert emulated == registered("vitdiv", "CPU") == set(operators)
    assert registered("vitdiv", "CUDA") == (emulated if library.with_cuda else set())
    assert set(_native.OPERATIONS) == set(_dispatch.OPERATIONS)
    listed = {name: operation for operation, names in library.kernels.items() for name in names}
    assert listed == {name: emulated_operators.operation_of(name) for name in operators}


def test_what_kernels_refuse_is_a_value_error(operators):
    q = torch.ones(1, 65, 2, 8, dtype=torch.float16)
    with pytest.raises(
        ValueError, match="the CUDA kernels take at most 64 heads, of both layers together, got 65"
    ):
        operators["attention_gram_fwd"](q, q, 1.0, None, None, 1.0)
    q = torch.ones(1, 2, 2, 8)  # and after that others run
    assert operators["attention_gram_fwd"](q, q, 1.0, None, None, 1.0).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            lambda q: (q, q[:, :, :, :4]),
            ValueError,
            "k must have shape \\[2, 3, 5, 8\\], got \\[2, 3, 5, 4\\]",
        ),
        (lambda q: (q, q.double()), TypeError, "k must have dtype Float, got Double"),
        (lambda q: (q.int(), q.int()), TypeError, "q must be float16, bfloat16, float32 or float64, got Int"),
        (lambda q: (q[:, :, :0], q), ValueError, "at least one query and key"),
    ],
)
def test_direct_calls_are_checked(operators, arguments, error, words):
    with pytest.raises(error, match=words):
        operators["attention_gram_fwd"](*arguments(torch.randn(2, 3, 5, 8)), 1.0, None, None, 1.0)


def test_no_heads(operators):
    """The public functions refuse them."""
    q, mix = torch.ones(2, 0, 3, 4), torch.ones(0, 0)
    arguments = q, q, q, 1.0, None, None, mix, None, False, None, None, 1e-5
    out, gram = operators["reattention_fwd"](*arguments, True, True)
    assert out.shape == q.shape
    assert gram.shape == (2, 0, 0)
    gradients = operators["reattention_bwd"](q, None, *arguments, [True, True, True, False, True, False])
    assert all(x.numel() == 0 for x in gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 17, 35), (1, 2, 600, 64), (3, 5, 256, 8)], ids=str)
def test_head_dots(operators, shape, dtype):
    x, y = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2))
    y = y.transpose(1, 2).contiguous().transpose(1, 2)
    terms = x.double() * y.double()
    error = operators["head_dots"](x, y) - terms.sum((0, 2, 3))
    # partial sums are in float32, of at most some hundred terms each
    assert (error.abs() <= 1e-6 * terms.abs().sum((0, 2, 3))).all()
    if dtype == torch.float64:
        assert error.abs().max() < 1e-11


def test_head_dots_of_nothing_and_of_nan(operators):
    head_dots = operators["head_dots"]
    assert torch.equal(head_dots(torch.ones(0, 2, 3, 4), torch.ones(0, 2, 3, 4)), torch.zeros(2))
    assert torch.equal(head_dots(torch.ones(2, 2, 0, 4), torch.ones(2, 2, 0, 4)), torch.zeros(2))
    x = torch.ones(2, 3, 4, 5)
    x[1, 1, 2, 3] = float("nan")
    assert torch.equal(head_dots(x, torch.ones_like(x)).isnan(), torch.tensor([False, True, False]))
