"""Vectors so long or so short that their squares leave the range of their dtype."""

import pytest
import torch

# dtype, lengths of about (None: from 1e-15 to 1e15; a tuple: those of the first, the others 1), eps.
FAR = {
    "long": (torch.float32, 1e19, 1e-8),
    "longer": (torch.float32, 1e33, 1e-8),
    "short": (torch.float32, 1e-21, 1e-30),
    "both": (torch.float32, None, 1e-30),
    "two of many": (torch.float32, (1e-25, 1e25), 1e-30),
    "bfloat16": (torch.bfloat16, 1e30, 1e-8),
    "float64-long": (torch.float64, 1e160, 1e-8),
    "float64-short": (torch.float64, 1e-160, 1e-200),
}
EVERY_RANGE = pytest.mark.parametrize("far", FAR.values(), ids=FAR)


def lengths_of(far, count):
    """[count, 1], float64."""
    _, length, _ = far
    if length is None:
        return 10.0 ** torch.linspace(-15, 15, count, dtype=torch.float64).unsqueeze(-1)
    lengths = torch.ones(count, 1, dtype=torch.float64)
    if isinstance(length, tuple):
        lengths[: len(length), 0] = torch.tensor(length, dtype=torch.float64)
        return lengths
    return lengths * length


def assert_length_does_not_matter(loss, formula, far, *vectors):
    """Value and gradients of loss(*vectors, eps=) at such lengths are those that the formula has in float64
    near 1; gradients times the lengths, that is."""
    dtype, _, eps = far
    lengths = [lengths_of(far, x.shape[-2]) for x in vectors]
    given = [(x.double() * s).to(dtype).requires_grad_() for x, s in zip(vectors, lengths, strict=True)]
    near = [(x.detach().double() / s).requires_grad_() for x, s in zip(given, lengths, strict=True)]
    value, truth = loss(*given, eps=eps), formula(*near)
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    assert abs(value.double() - truth) <= tolerance * max(abs(truth), 0.01)
    got, expected = (torch.autograd.grad(v, x, allow_unused=True) for v, x in ((value, given), (truth, near)))
    for a, b, s in zip(got, expected, lengths, strict=True):
        if b is not None and b.abs().max() > 1e-12:
            assert (a.double() * s - b).abs().max() <= tolerance * b.abs().max()
