"""The public function `pairwise_cosine`."""

from torch import Tensor

from .... import _checks, _dispatch
from ...._types import Backend, Penalty, Reduction
from ...._vectors import PENALTIES
from . import function, reference


def pairwise_cosine(
    x: Tensor,
    y: Tensor | None = None,
    *,
    penalty: Penalty = "abs",
    include_self: bool = False,
    reduction: Reduction = "mean",
    eps: float = 1e-8,
    backend: Backend = "auto",
) -> Tensor:
    """Penalty on the cosine similarity of all pairs of vectors: the patch diversity loss.

    With `x_hat = x / max(|x|, eps)` and `S = x_hat y_hat^T` (y = x when absent), reduces `penalty(S)` over
    all pairs. No N x M matrix of similarities reaches main memory, except with the reference backend; for the
    gradient, abs keeps two bits a pair and relu one.

    Args:
        x: vectors, [..., N, D]; any strides. float16, bfloat16, float32 or float64.
        y: a second set, [..., M, D], with the leading axes, dtype and device of x; None takes the pairs
            within x.
        penalty: "signed" S, "abs" |S| (its gradient is 0 at S = 0), "square" S^2 or "relu" max(S, 0).
        include_self: count the pairs of each vector with itself; only without y.
        reduction: "mean" over pairs and leading axes, "sum", or "none" for one value per leading index, the
            mean over its pairs.
        eps: vectors shorter than this are divided by eps instead of by their norm.
        backend: "auto", "reference", "native" or "triton". An explicit choice never falls back.

    Returns:
        float32 (float64 for float64 input): a scalar, or [...] (the leading axes) with reduction "none". With
        a leading axis of size 0 "mean" is nan and "sum" is 0, as torch gives. Differentiable once in x and y.

    Autocast has no influence: the dtype of x is used, and accumulation is in float32 at least.

    Raises:
        TypeError: x or y is not a floating tensor, or their dtypes differ.
        ValueError: shapes or devices do not match, N < 2 without include_self, include_self together with y,
            an unknown penalty, reduction or backend.
        RuntimeError: an explicit backend that is not here.

    Sources: Gong et al. 2021 (arXiv 2104.12753), patch-wise cosine loss: `penalty="abs"`. Chen et al. 2022
    (arXiv 2203.06345), `Loss_cosine`: `penalty="signed", include_self=True`; between layers:
    `pairwise_cosine(h1, h2)`.

    Example:
        >>> patches = torch.randn(8, 196, 384, requires_grad=True)
        >>> loss = pairwise_cosine(patches)
        >>> loss.backward()
    """
    if y is None:
        alone = "" if include_self else " when include_self is False"
        _checks.vectors("x", x, 1 if include_self else 2, alone)
    else:
        _checks.vectors("x", x)
        _checks.second_vectors("y", y, "x", x)
        if include_self:
            raise ValueError(
                "include_self must be False when y is given: pairs of two sets have no self-pairs"
            )
    _checks.one_of("penalty", penalty, tuple(PENALTIES))
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    eps = _checks.number("eps", eps, at_least=0)
    backend = _dispatch.resolve("pairwise_cosine", x.device, backend)

    options = dict(penalty=penalty, include_self=include_self, eps=eps)
    with _checks.autocast_off(x):
        if backend == "reference":
            sums = reference.pairwise_cosine_sums(x, y, **options)
        else:
            sums = function.pairwise_cosine_sums(x, y, **options, backend=backend)
    n = x.shape[-2]
    pairs = n * y.shape[-2] if y is not None else n * (n if include_self else n - 1)
    return _checks.reduce_pairs(sums, pairs, reduction)
