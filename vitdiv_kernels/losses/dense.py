"""Losses on dense features: of a student and a teacher, or of vectors that should spread.

Each takes sets of N vectors, [..., N, D], and one set for each leading index.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from .. import _checks, _dispatch, _vectors
from .._autograd import by_formula, once_differentiable
from .._types import Backend, Reduction
from .._vectors import matrices_near_one
from ..ops.pairs.pairwise_rows import pairwise_logsumexp, pairwise_nearest
from ..ops.pairs.two_gram import two_gram
from . import _common

NEGATIVES: dict[str, Any] = {
    "keep": "square",
    "remove": "relu_square",
    "remove_teacher": "relu_teacher_square",
    "remove_teacher_released": "clamped_teacher_square",
}


def gram_anchoring(
    student: Tensor,
    teacher: Tensor,
    *,
    level: Literal["image", "batch"] = "image",
    negatives: Literal["keep", "remove", "remove_teacher", "remove_teacher_released"] = "keep",
    normalise: bool = True,
    reduction: Reduction = "mean",
    eps: float = 1e-12,
    backend: Backend = "auto",
) -> Tensor:
    """Gram anchoring: the mean squared difference of the student's and the teacher's patch similarities.

    `mean_ij (S_ij - T_ij)^2` with `S = x_hat x_hat^T` of the student, T of the teacher.

    Args:
        student, teacher: patches, [..., N, D] and [..., N, D2].
        level: "image" compares the patches of one image (each leading index), "batch" all of the batch.
        negatives: "keep"; "remove" takes max(S, 0) and max(T, 0); "remove_teacher" takes max(T, 0), and 0 for
            S where both are negative; "remove_teacher_released" is what the released code does, which
            clamps T before it looks for its sign, so that S keeps all its negatives.
        normalise: False takes inner products instead of cosines.
        reduction: "mean" or "sum" over leading axes, or "none", of the mean over pairs.
        eps: patches shorter than this are divided by eps instead of by their norm.
        backend: of `two_gram`.

    Returns:
        float32 (float64 for float64 input): a scalar, or [...] with reduction "none" and level "image".
        Detach the teacher yourself. Where negatives are removed a similarity of exactly 0 (a patch of zeros)
        has no gradient; the released code passes it on, divided by eps.

    Cost: tiles, N^2 (D + D2) / 2 multiply-adds. "keep" with D = D2 <= N / 6 is a closed form of D x D
    matrices, O(N D^2), without cancellation where student and teacher are close.

    Source: Siméoni et al. 2025 (DINOv3, arXiv 2508.10104), `GramLoss`: "remove" is its remove_neg,
    "remove_teacher" what its remove_only_teacher_neg says.

    Example:
        >>> student, teacher = torch.randn(2, 4, 49, 64).requires_grad_().unbind()
        >>> losses.gram_anchoring(student, teacher.detach()).backward()
    """
    _checks.vectors("student", student)
    _checks.second_vectors("teacher", teacher, "student", student, same_number=True, any_width=True)
    _checks.one_of("level", level, ("image", "batch"))
    _checks.one_of("negatives", negatives, tuple(NEGATIVES))
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    eps = _checks.number("eps", eps, at_least=0)
    if level == "batch":
        student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
    n, width = student.shape[-2:]
    if negatives == "keep" and width == teacher.shape[-1] and 6 * width <= n:
        with _checks.autocast_off(student):
            x, y = (
                _vectors.unit(t, eps) if normalise else _vectors.full_precision(t)[0]
                for t in (student, teacher)
            )
            values = _square_of_gram_difference(x, y) / n**2
    else:
        values = two_gram(
            student, teacher, penalty=NEGATIVES[negatives], normalise=normalise, reduction="none", eps=eps,
            backend=backend,
        )  # fmt: skip
    return _common.reduced(values, reduction)


def _square_of_gram_difference(x, y):
    """|X X^T - Y Y^T|_F^2, [...].

    With P = X - Y and Q = X + Y the difference is (P Q^T + Q P^T) / 2. The square of that has terms of the
    size of the result; |X^T X|^2 - 2 |X^T Y|^2 + |Y^T Y|^2 has not.
    """
    p, q = x - y, x + y
    mixed = q.mT @ p
    return ((p.mT @ p) * (q.mT @ q) + mixed * mixed.mT).sum((-2, -1)) / 2


def koleo(
    x: Tensor, *, reduction: Reduction = "mean", eps: float = 1e-8, backend: Backend = "auto"
) -> Tensor:
    """Kozachenko-Leonenko loss: `-mean_i log(|x_hat_i - x_hat_nearest(i)| + eps)`.

    Args:
        x: vectors, [..., N, D], N > 1.
        reduction: "mean" or "sum" over leading axes, or "none", of the mean over vectors.
        eps: keeps the logarithm finite, and stands for the norm of shorter vectors.
        backend: of `pairwise_nearest`.

    Returns:
        float32 (float64 for float64 input): a scalar, or [...] with reduction "none". A duplicate adds
        -log(eps) and has no gradient. Differentiable once.

    Cost: tiles, N^2 D / 2 multiply-adds for the index of each nearest vector, then O(N D).

    Source: Sablayrolles et al. 2019 (arXiv 1806.03198), as in DINOv2 (arXiv 2304.07193), `KoLeoLoss`.

    Example:
        >>> x = torch.randn(4, 49, 64, requires_grad=True)
        >>> losses.koleo(x).backward()
    """
    _checks.vectors("x", x, at_least=2)
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    eps = _checks.positive("eps", eps)
    nearest = pairwise_nearest(x, eps=eps, backend=backend)
    with _checks.autocast_off(x):
        if _plain(x, backend):
            x_hat = _vectors.unit(x, eps)
            chosen = x_hat.gather(-2, nearest.unsqueeze(-1).expand_as(x_hat))
            distance = torch.linalg.vector_norm(x_hat - chosen, dim=-1)
        else:
            distance = _DistanceToOne.apply(*_vectors.scaled(_vectors.full_precision(x)[0], eps), nearest)
        return _common.reduced(-(distance + eps).log().mean(-1), reduction)


def _plain(x, backend):
    """Whether autograd differentiates what stands beside the tiles: torch.compile fuses that, and the
    reference may be differentiated twice."""
    return (
        torch.compiler.is_compiling()
        or by_formula(x)
        or _dispatch.resolve("pairwise_rows", x.device, backend) == "reference"
    )


class _DistanceToOne(torch.autograd.Function):
    """x [..., N, D] with its `_vectors.scaled` and indices [..., N] to |x_hat_i - x_hat_index(i)|, [..., N].

    On CPUs some items at a time, so that the passes over them find them in cache; only numbers per vector are
    kept. Autograd would make twice the passes, over memory, which take longer than the search of the indices.
    """

    CHUNK = 2**19  # elements

    @staticmethod
    def forward(ctx, x, scale, radial, index):
        distance = x.new_empty(x.shape[:-1])
        for at, chosen in _chunks(index, x.shape[-1]):
            unit = x.reshape(-1, x.shape[-1])[at] * scale.view(-1, 1)[at]
            apart = unit - unit.index_select(0, chosen)
            distance.view(-1)[at] = torch.linalg.vector_norm(apart, dim=-1)
        ctx.save_for_backward(x, scale, radial, index, distance)
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx, ddistance):
        x, scales, radial, index, distance = ctx.saved_tensors
        width = x.shape[-1]
        slope = torch.where(distance == 0, 0, ddistance / distance).reshape(-1, 1)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        with _checks.autocast_off(x):
            for at, chosen in _chunks(index, width):
                scale = scales.view(-1, 1)[at]
                unit = x.reshape(-1, width)[at] * scale
                apart = (unit - unit.index_select(0, chosen)).mul_(slope[at])
                apart = apart.index_add(0, chosen, apart, alpha=-1)
                along = torch.linalg.vecdot(unit, apart).unsqueeze(-1) * radial.view(-1, 1)[at]
                torch.mul(apart, scale, out=dx.view(-1, width)[at]).addcmul_(unit, along, value=-1)
        return dx, None, None, None


def _chunks(index, width):
    """The vectors of some items at a time, as a slice of all vectors, and their indices within it."""
    n = index.shape[-1]
    index = index.reshape(-1, n)
    step = _DistanceToOne.CHUNK // (n * width) if index.device.type == "cpu" else len(index)
    for i in range(0, len(index), max(1, step)):
        part = index[i : i + max(1, step)]
        first = n * torch.arange(len(part), device=index.device).unsqueeze(-1)
        yield slice(i * n, (i + len(part)) * n), (part + first).flatten()


def uniformity(
    x: Tensor, *, t: float = 2.0, reduction: Reduction = "mean", eps: float = 1e-8, backend: Backend = "auto"
) -> Tensor:
    """Uniformity on the hypersphere: `log mean_{i < j} exp(-t |x_hat_i - x_hat_j|^2)`.

    It is taken from the cosines, exp(2 t (cos_ij - 1)): a vector of zeros counts as orthogonal to all.

    Args:
        x: vectors, [..., N, D], N > 1.
        t: sharpness, positive.
        reduction: "mean" or "sum" over leading axes, or "none".
        eps: vectors shorter than this are divided by eps instead of by their norm.
        backend: of `pairwise_logsumexp`.

    Returns:
        float32 (float64 for float64 input): a scalar, or [...] with reduction "none".

    Cost: tiles, N^2 D / 2 multiply-adds.

    Source: Wang and Isola 2020 (arXiv 2005.10242), `lunif`.

    Example:
        >>> x = torch.randn(4, 49, 64, requires_grad=True)
        >>> losses.uniformity(x).backward()
    """
    _checks.vectors("x", x, at_least=2)
    t = _checks.positive("t", t)
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    n = x.shape[-2]
    rows = pairwise_logsumexp(x, scale=2 * t, eps=eps, backend=backend)
    return _common.reduced(rows.logsumexp(-1) - 2 * t - math.log(n * (n - 1)), reduction)


def linear_cka(x: Tensor, y: Tensor, *, reduction: Reduction = "mean", backend: Backend = "auto") -> Tensor:
    """Linear centred kernel alignment of two feature maps, in [0, 1]; one minus it is a loss.

    `<K, L> / (|K|_F |L|_F)` with `K = X X^T` and `L = Y Y^T` of the centred features.

    Args:
        x, y: features of the same N patches, [..., N, D] and [..., N, D2].
        reduction: "mean" or "sum" over leading axes, or "none".
        backend: of `two_gram`.

    Returns:
        float32 (float64 for float64 input): a scalar, or [...] with reduction "none". 0 where all patches of
        x or y are zero, or there is one.

    Cost: a closed form of D x D matrices, O(N D^2), where D and D2 are at most 3/4 N; else tiles, 3/2 N^2
    (D + D2) multiply-adds.

    Source: Kornblith et al. 2019 (arXiv 1905.00414).

    Example:
        >>> x, y = torch.randn(2, 4, 49, 64).requires_grad_().unbind()
        >>> (1 - losses.linear_cka(x, y)).backward()
    """
    _checks.vectors("x", x)
    _checks.second_vectors("y", y, "x", x, same_number=True, any_width=True)
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    with _checks.autocast_off(x):
        x, y = map(_centred, _vectors.full_precision(x, y))
        if 4 * max(x.shape[-1], y.shape[-1]) <= 3 * x.shape[-2]:
            xy, xx, yy = ((a.mT @ b).square().sum((-2, -1)) for a, b in ((x, y), (x, x), (y, y)))
        else:
            options: dict[str, Any] = dict(
                penalty="product", normalise=False, reduction="none", backend=backend
            )
            xy = two_gram(x, y, **options)
            # of S T both gradients are the same where S is T: one is made, and counted twice
            once = [two_gram(a, a.detach(), **options) for a in (x, y)]
            xx, yy = (2 * value - value.detach() for value in once)
        tiny = torch.finfo(xy.dtype).tiny
        return _common.reduced(xy * xx.clamp_min(tiny).rsqrt() * yy.clamp_min(tiny).rsqrt(), reduction)


def _centred(x):
    """x [..., N, D] less its mean, up to a factor of each matrix.

    Twice: the first mean is rounded, by as much as nearly equal patches differ, and the rest is exact.
    """
    for _ in range(2):
        x = matrices_near_one(x)
        x = x - x.mean(-2, keepdim=True)
    return x


def vf_loss(
    z: Tensor,
    f: Tensor,
    *,
    distance_margin: float = 0.25,
    cosine_margin: float = 0.5,
    distance_weight: float = 1.0,
    cosine_weight: float = 1.0,
    reduction: Reduction = "mean",
    eps: float = 1e-8,
    backend: Backend = "auto",
) -> Tensor:
    """Alignment of latents with the features of a vision foundation model: two hinges.

    `distance_weight mean_ij relu(|S_ij - T_ij| - distance_margin) + cosine_weight mean_i relu(1 -
    cosine_margin - cos(z_i, f_i))`, with S and T the cosines within z and within f.

    Args:
        z, f: latents, projected to the width of the features, and features, [..., N, D].
        distance_margin, cosine_margin, distance_weight, cosine_weight: see above. The code has margins 0 by
            default; these are those of the published models.
        reduction: "mean" or "sum" over leading axes, or "none".
        eps: vectors shorter than this are divided by eps instead of by their norm.
        backend: of `two_gram`.

    Returns:
        float32 (float64 for float64 input): a scalar, or [...] with reduction "none".

    Cost: tiles, N^2 D multiply-adds, for the first term; O(N D) for the second.

    Source: Yao et al. 2025 (VA-VAE, arXiv 2501.01423), `vf_loss`.

    Example:
        >>> z, f = torch.randn(2, 4, 49, 64).requires_grad_().unbind()
        >>> losses.vf_loss(z, f.detach()).backward()
    """
    _checks.vectors("z", z)
    _checks.second_vectors("f", f, "z", z, same_number=True)
    cosine_margin = _checks.number("cosine_margin", cosine_margin, at_least=0)
    distance_margin = _checks.number("distance_margin", distance_margin, at_least=0)
    distance_weight = _checks.number("distance_weight", distance_weight)
    cosine_weight = _checks.number("cosine_weight", cosine_weight)
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    eps = _checks.number("eps", eps, at_least=0)
    distances = two_gram(
        z, f, penalty="hinge", margin=distance_margin, reduction="none", eps=eps, backend=backend
    )
    with _checks.autocast_off(z):
        cosines = _own_cosines(z, f, eps, backend)
        hinges = (1 - cosine_margin - cosines).relu().mean(-1)
        return _common.reduced(distance_weight * distances + cosine_weight * hinges, reduction)


def info_nce(
    x: Tensor,
    y: Tensor,
    *,
    temperature: float = 0.1,
    symmetric: bool = False,
    reduction: Reduction = "mean",
    eps: float = 1e-8,
    backend: Backend = "auto",
) -> Tensor:
    """InfoNCE between two sets of patches: patch i of x must find patch i of y among all of y.

    `mean_i (log sum_j exp(S_ij / temperature) - S_ii / temperature)`, S the cosines.

    Args:
        x, y: vectors, [..., N, D].
        temperature: positive.
        symmetric: the mean of this and of the loss with x and y exchanged.
        reduction: "mean" or "sum" over leading axes, or "none".
        eps: vectors shorter than this are divided by eps instead of by their norm.
        backend: of `pairwise_logsumexp`.

    Returns:
        float32 (float64 for float64 input): a scalar, or [...] with reduction "none".

    Cost: tiles, N^2 D multiply-adds, twice that when symmetric.

    Source: van den Oord et al. 2018 (arXiv 1807.03748); symmetric: Radford et al. 2021 (arXiv 2103.00020).

    Example:
        >>> x, y = torch.randn(2, 4, 49, 64).requires_grad_().unbind()
        >>> losses.info_nce(x, y).backward()
    """
    _checks.vectors("x", x)
    _checks.second_vectors("y", y, "x", x, same_number=True)
    temperature = _checks.positive("temperature", temperature)
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    eps = _checks.number("eps", eps, at_least=0)
    options: dict[str, Any] = dict(scale=1 / temperature, eps=eps, backend=backend)
    rows = pairwise_logsumexp(x, y, **options)
    if symmetric:
        rows = (rows + pairwise_logsumexp(y, x, **options)) / 2
    with _checks.autocast_off(x):
        own = _own_cosines(x, y, eps, backend) / temperature
        return _common.reduced((rows - own).mean(-1), reduction)


def _own_cosines(x, y, eps, backend):
    """S_ii, [..., N]."""
    if _plain(x, backend):
        return torch.linalg.vecdot(_vectors.unit(x, eps), _vectors.unit(y, eps))
    x, y = _vectors.full_precision(x, y)
    return _OwnCosines.apply(*_vectors.scaled(x, eps), *_vectors.scaled(y, eps))


class _OwnCosines(torch.autograd.Function):
    """The gradient of a cosine is a combination of its two vectors: a fourth of autograd's passes."""

    @staticmethod
    def forward(ctx, x, scale_x, radial_x, y, scale_y, radial_y):
        own = torch.linalg.vecdot(x, y).unsqueeze(-1) * scale_x * scale_y
        ctx.save_for_backward(x, scale_x, radial_x, y, scale_y, radial_y, own)
        return own.squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, down):
        x, scale_x, radial_x, y, scale_y, radial_y, own = ctx.saved_tensors
        both, along = down.unsqueeze(-1) * scale_x * scale_y, down.unsqueeze(-1) * own
        dx = dy = None
        if ctx.needs_input_grad[0]:
            dx = (y * both).addcmul_(x, along * scale_x * radial_x, value=-1)
        if ctx.needs_input_grad[3]:
            dy = (x * both).addcmul_(y, along * scale_y * radial_y, value=-1)
        return dx, None, None, dy, None, None
