"""What the tests of all losses share: value and gradients against a formula, in several precisions."""

import pytest
import torch

# float32 and half inputs against float64, relative to the largest gradient
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}


def value_and_gradients(loss, inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    value = loss(*inputs)
    grads = torch.autograd.grad(value.sum(), inputs, allow_unused=True)
    return value.detach(), [
        torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)
    ]


def assert_is_its_formula(loss, formula, *inputs):
    """Value and gradients are those of the formula in float64, of float64 and of float32 inputs, under
    autocast the same as without, and those of finite differences."""
    value, grads = value_and_gradients(formula, [x.double() for x in inputs])
    for dtype, tolerance in TOLERANCE.items():
        got, got_grads = value_and_gradients(loss, [x.to(dtype) for x in inputs])
        assert got.dtype == dtype
        close(got, value, tolerance)
        for a, b in zip(got_grads, grads, strict=True):
            assert a.dtype == dtype
            close(a, b, tolerance)
    small = [x.detach().double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(loss, small, check_grad_dtypes=True, fast_mode=True)


def assert_autocast_has_no_influence(loss, *inputs):
    inputs = [x.float() for x in inputs]

    def under_autocast(*inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(*inputs)

    value, grads = value_and_gradients(under_autocast, inputs)
    expected, expected_grads = value_and_gradients(loss, inputs)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


def assert_takes_halves(loss, *inputs, tolerance=3e-2):
    """bfloat16 inputs: float32 result, their own gradients in bfloat16, close to those of the same numbers
    in float64."""
    halves = [x.bfloat16() for x in inputs]
    value, grads = value_and_gradients(loss, halves)
    expected, expected_grads = value_and_gradients(loss, [x.double() for x in halves])
    assert value.dtype == torch.float32
    close(value, expected, 1e-3)
    for a, b in zip(grads, expected_grads, strict=True):
        assert a.dtype == torch.bfloat16
        close(a, b, tolerance)


def assert_reductions(loss, *inputs):
    """Without a reduction each image has its own value and gradient; "mean" and "sum" are those of the
    values."""
    each = loss(*inputs, reduction="none")
    weights = torch.arange(1.0, 1 + len(each), dtype=each.dtype)
    assert len(each) == len(inputs[0]) > 1
    torch.testing.assert_close(loss(*inputs), each.mean())
    value, plain = value_and_gradients(lambda *x: loss(*x, reduction="sum"), inputs)
    torch.testing.assert_close(value, each.sum())
    _, grads = value_and_gradients(lambda *x: loss(*x, reduction="none") * weights, inputs)
    for a, b in zip(grads, plain, strict=True):
        torch.testing.assert_close(a, b * weights.view(-1, *(b.dim() - 1) * [1]))
    torch.testing.assert_close(loss(*(x[1:] for x in inputs), reduction="none"), each[1:])


def assert_finite(loss, *inputs):
    value, grads = value_and_gradients(loss, inputs)
    assert bool(value.isfinite().all())
    assert all(bool(g.isfinite().all()) for g in grads)
    return value, grads


def close(got, expected, tolerance):
    scale = expected.abs().max().item()
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance * scale)


def bad_input(cases):
    """A test for each (call, error, words): the call raises the error, in a sentence with the words."""

    @pytest.mark.parametrize(("call", "error", "words"), cases)
    def test(call, error, words):
        with pytest.raises(error) as caught:
            call()
        for word in words:
            assert word in str(caught.value)

    return test
