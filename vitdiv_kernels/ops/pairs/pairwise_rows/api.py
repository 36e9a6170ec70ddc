"""The public functions `pairwise_logsumexp` and `pairwise_nearest`."""

from torch import Tensor

from .... import _checks, _dispatch
from ...._types import Backend
from . import function, reference


def pairwise_logsumexp(
    x: Tensor, y: Tensor | None = None, *, scale: float = 1.0, eps: float = 1e-8, backend: Backend = "auto"
) -> Tensor:
    """Log-sum-exp of the cosines of each vector with all others: `log sum_j exp(scale S_ij)`.

    `S = x_hat y_hat^T` with `x_hat = x / max(|x|, eps)`. No N x M matrix reaches main memory, except with the
    reference backend.

    Args:
        x: vectors, [..., N, D]; any strides. float16, bfloat16, float32 or float64.
        y: a second set, [..., M, D], with the leading axes, dtype and device of x; None takes the pairs
            within x, without those of a vector with itself.
        scale: the factor of the cosines, positive: one over the temperature.
        eps: vectors shorter than this are divided by eps instead of by their norm.
        backend: "auto", "reference", "native" or "triton". An explicit choice never falls back.

    Returns:
        [..., N], float32 (float64 for float64 input). Differentiable once in x and y.

    Autocast has no influence.

    Raises:
        TypeError: x or y is not a floating tensor, or their dtypes differ.
        ValueError: shapes or devices do not match, N < 2 without y, scale is not positive, unknown backend.
        RuntimeError: an explicit backend that is not here.

    Example:
        >>> x, y = torch.randn(2, 8, 196, 384)
        >>> pairwise_logsumexp(x, y, scale=10.0).shape
        torch.Size([8, 196])
    """
    _checks.vectors("x", x, at_least=2 if y is None else 1)
    if y is not None:
        _checks.second_vectors("y", y, "x", x)
    scale = _checks.positive("scale", scale)
    eps = _checks.number("eps", eps, at_least=0)
    backend = _dispatch.resolve("pairwise_rows", x.device, backend)
    with _checks.autocast_off(x):
        if backend == "reference":
            return reference.logsumexp(x, y, scale=scale, eps=eps)
        return function.logsumexp(x, y, scale=scale, eps=eps, backend=backend)


def pairwise_nearest(
    x: Tensor, y: Tensor | None = None, *, eps: float = 1e-8, backend: Backend = "auto"
) -> Tensor:
    """The index of the most similar vector: `argmax_j S_ij`, the first one of equals.

    Args, errors: as `pairwise_logsumexp`.

    Returns:
        [..., N], int64: indices into y, or into x, without the vector itself, when y is None. No gradient.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
        >>> pairwise_nearest(x)
        tensor([2, 2, 1])
    """
    _checks.vectors("x", x, at_least=2 if y is None else 1)
    if y is not None:
        _checks.second_vectors("y", y, "x", x)
    eps = _checks.number("eps", eps, at_least=0)
    backend = _dispatch.resolve("pairwise_rows", x.device, backend)
    with _checks.autocast_off(x):
        if backend == "reference":
            return reference.nearest(x, y, eps=eps)
        return function.nearest(x, y, eps=eps, backend=backend)
