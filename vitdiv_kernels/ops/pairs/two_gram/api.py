"""The public function `two_gram`."""

from typing import Literal

from torch import Tensor

from .... import _checks, _dispatch
from ...._types import Backend, Reduction
from . import function, reference


def two_gram(
    x: Tensor,
    y: Tensor | None = None,
    *,
    penalty: Literal[
        "square", "relu_square", "relu_teacher_square", "clamped_teacher_square", "hinge", "product"
    ] = "square",
    margin: float = 0.0,
    normalise: bool = True,
    reduction: Reduction = "mean",
    eps: float = 1e-8,
    backend: Backend = "auto",
) -> Tensor:
    """Penalty on the entries of two Gram matrices of the same patches, over all pairs of patches.

    `S = x_hat x_hat^T`, `T = y_hat y_hat^T`, `x_hat = x / max(|x|, eps)`, reduces `penalty(S, T)`.
    No N x N matrix reaches main memory, except with the reference backend.

    Args:
        x: vectors, [..., N, D] (the student's); any strides. float16, bfloat16, float32 or float64.
        y: vectors of the same patches, [..., N, D2] (the teacher's), with the leading axes, dtype and device
            of x; None makes T the identity.
        penalty: "square" (S - T)^2; "relu_square" of max(S, 0) and max(T, 0); "relu_teacher_square" of S, 0
            where both are negative, and max(T, 0); "clamped_teacher_square" of S and max(T, 0); "hinge"
            max(|S - T| - margin, 0); "product" S T.
        margin: of "hinge", at least 0.
        normalise: False takes x and y as they are.
        reduction: "mean" over pairs and leading axes, "sum", or "none" for one value per leading index, the
            mean over its N^2 pairs.
        eps: vectors shorter than this are divided by eps instead of by their norm.
        backend: "auto", "reference", "native" or "triton". An explicit choice never falls back.

    Returns:
        float32 (float64 for float64 input): a scalar, or [...] (the leading axes) with reduction "none".
        Differentiable once in x and y.

    Autocast has no influence.

    Raises:
        TypeError: x or y is not a floating tensor, or their dtypes differ.
        ValueError: shapes or devices do not match, a margin below 0, an unknown penalty, reduction or
            backend.
        RuntimeError: an explicit backend that is not here.

    Example:
        >>> student, teacher = torch.randn(2, 8, 196, 384)
        >>> loss = two_gram(student, teacher, penalty="hinge", margin=0.25)
    """
    _checks.vectors("x", x)
    if y is not None:
        _checks.second_vectors("y", y, "x", x, same_number=True, any_width=True)
    _checks.one_of("penalty", penalty, tuple(reference.PENALTIES))
    margin = _checks.number("margin", margin, at_least=0)
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    eps = _checks.number("eps", eps, at_least=0)
    backend = _dispatch.resolve("two_gram", x.device, backend)

    options = dict(penalty=penalty, margin=margin, normalise=bool(normalise), eps=eps)
    with _checks.autocast_off(x):
        if backend == "reference":
            sums = reference.two_gram_sums(x, y, **options)
        else:
            sums = function.two_gram_sums(x, y, **options, backend=backend)
    return _checks.reduce_pairs(sums, x.shape[-2] ** 2, reduction)
