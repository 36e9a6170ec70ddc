"""The diversity losses as modules.

A module has the options of its function, given once; what the function does, its formula and its source are
told there. Modules on tokens drop the class and register tokens from the front, num_prefix_tokens of them.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import _checks, losses
from .._types import Backend, Penalty, Reduction
from ..ops.maps.attention_gram import attention_diversity
from ..ops.pairs.pairwise_cosine import pairwise_cosine


class PatchCosineLoss(nn.Module):
    """Penalty on the cosine similarity of the patches of each image: `pairwise_cosine` without the prefix
    tokens.

    forward(x [B, N, D]) takes the pairs within x, forward(x, y [B, M, D]) those between x and y, for instance
    the tokens of two layers. The defaults are the loss of Gong et al. 2021 (arXiv 2104.12753). Arguments as
    `pairwise_cosine`, and num_prefix_tokens: the class and register tokens that are dropped from the front of
    x and y.
    """

    def __init__(
        self,
        penalty: Penalty = "abs",
        *,
        include_self: bool = False,
        reduction: Reduction = "mean",
        num_prefix_tokens: int = 1,
        eps: float = 1e-8,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.num_prefix_tokens = _checks.count("num_prefix_tokens", num_prefix_tokens)
        self.options: dict[str, Any] = dict(
            penalty=penalty, include_self=include_self, reduction=reduction, eps=eps, backend=backend
        )

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        first = self.num_prefix_tokens
        return pairwise_cosine(x[..., first:, :], None if y is None else y[..., first:, :], **self.options)

    def extra_repr(self) -> str:
        return f"num_prefix_tokens={self.num_prefix_tokens}, " + _repr_of(self.options)


class AttentionDiversityLoss(nn.Module):
    """Penalty on the cosine similarity of the attention maps of the heads: `attention_diversity`.

    forward(q [B, H, N, d], k [B, H, M, d]). The defaults are the loss of Chen et al. 2022 (arXiv 2203.06345).
    """

    def __init__(
        self,
        penalty: Penalty = "signed",
        *,
        include_self: bool = True,
        reduction: Reduction = "mean",
        scale: float | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = dict(
            penalty=penalty, include_self=include_self, reduction=reduction, scale=scale, backend=backend
        )

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return attention_diversity(q, k, **self.options)

    def extra_repr(self) -> str:
        return _repr_of(self.options)


class _Loss(nn.Module):
    """A function with its options bound. Options that the function does not have raise TypeError."""

    function: Callable[..., Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        parameters = inspect.signature(self.function).parameters.values()
        known = [option.name for option in parameters if option.kind is option.KEYWORD_ONLY]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no option {unknown[0]!r}; its options are {', '.join(known)}"
            )
        self.options = options

    def forward(self, *inputs: Any) -> Tensor:
        return self.function(*inputs, **self.options)

    def extra_repr(self) -> str:
        return _repr_of(self.options)


class _TokenLoss(_Loss):
    """Drops the prefix tokens of every input."""

    def __init__(self, *, num_prefix_tokens: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.num_prefix_tokens = _checks.count("num_prefix_tokens", num_prefix_tokens)

    def forward(self, *tokens: Tensor) -> Tensor:
        return super().forward(*(x[..., self.num_prefix_tokens :, :] for x in tokens))

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (f"num_prefix_tokens={self.num_prefix_tokens}", super().extra_repr())))


class PatchContrastLoss(_TokenLoss):
    """`losses.patch_contrast`: forward(first, last), tokens of two layers."""

    function = staticmethod(losses.patch_contrast)


class NeighbourhoodContrastLoss(_TokenLoss):
    """`losses.neighbourhood_contrast`: forward(tokens, context). Both with their prefix tokens, or
    num_prefix_tokens=0 and both without."""

    function = staticmethod(losses.neighbourhood_contrast)


class PatchMHSLoss(_TokenLoss):
    """`losses.patch_mhs`: forward(tokens)."""

    function = staticmethod(losses.patch_mhs)


class PatchMGDLoss(_TokenLoss):
    """`losses.patch_mgd`: forward(tokens)."""

    function = staticmethod(losses.patch_mgd)


class PatchSoftOrthogonalityLoss(_TokenLoss):
    """`losses.patch_soft_orthogonality`: forward(tokens)."""

    function = staticmethod(losses.patch_soft_orthogonality)


class PatchConditionOrthogonalityLoss(_TokenLoss):
    """`losses.patch_condition_orthogonality`: forward(tokens)."""

    function = staticmethod(losses.patch_condition_orthogonality)


class PatchMixingLoss(_TokenLoss):
    """`losses.patch_mixing`: forward(logits of all tokens, labels, others, shares of the patches)."""

    function = staticmethod(losses.patch_mixing)

    def forward(  # type: ignore[override]
        self, logits: Tensor, labels: Tensor, others: Tensor, shares: Tensor
    ) -> Tensor:
        return self.function(logits[..., self.num_prefix_tokens :, :], labels, others, shares, **self.options)


class HeadCrossCosineLoss(_Loss):
    """`losses.head_cross_cosine`: forward(q, k, q2, k2)."""

    function = staticmethod(losses.head_cross_cosine)


class HeadContrastLoss(_Loss):
    """`losses.head_contrast`: forward(q, k, q2, k2)."""

    function = staticmethod(losses.head_contrast)


class HeadMHSLoss(_Loss):
    """`losses.head_mhs`: forward(q, k)."""

    function = staticmethod(losses.head_mhs)


class HeadMGDLoss(_Loss):
    """`losses.head_mgd`: forward(q, k)."""

    function = staticmethod(losses.head_mgd)


class HeadSoftOrthogonalityLoss(_Loss):
    """`losses.head_soft_orthogonality`: forward(q, k)."""

    function = staticmethod(losses.head_soft_orthogonality)


class HeadConditionOrthogonalityLoss(_Loss):
    """`losses.head_condition_orthogonality`: forward(q, k)."""

    function = staticmethod(losses.head_condition_orthogonality)


class WeightMHSLoss(_Loss):
    """`losses.weight_mhs`: forward(weights)."""

    function = staticmethod(losses.weight_mhs)


class WeightMGDLoss(_Loss):
    """`losses.weight_mgd`: forward(weights)."""

    function = staticmethod(losses.weight_mgd)


class WeightSoftOrthogonalityLoss(_Loss):
    """`losses.weight_soft_orthogonality`: forward(weights)."""

    function = staticmethod(losses.weight_soft_orthogonality)


class WeightConditionOrthogonalityLoss(_Loss):
    """`losses.weight_condition_orthogonality`: forward(weights)."""

    function = staticmethod(losses.weight_condition_orthogonality)


class CosRegLoss(_Loss):
    """`losses.cos_reg`: forward(layers)."""

    function = staticmethod(losses.cos_reg)


class GramAnchoringLoss(_TokenLoss):
    """`losses.gram_anchoring`: forward(student tokens, teacher tokens)."""

    function = staticmethod(losses.gram_anchoring)


class KoLeoLoss(_TokenLoss):
    """`losses.koleo`: forward(tokens). For one vector an image, [B, D], give num_prefix_tokens=0."""

    function = staticmethod(losses.koleo)


class UniformityLoss(_TokenLoss):
    """`losses.uniformity`: forward(tokens). For one vector an image, [B, D], give num_prefix_tokens=0."""

    function = staticmethod(losses.uniformity)


class LinearCKALoss(_TokenLoss):
    """One minus `losses.linear_cka`: forward(tokens, teacher tokens)."""

    function = staticmethod(losses.linear_cka)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return 1 - super().forward(x, y)


class VFLoss(_TokenLoss):
    """`losses.vf_loss`: forward(latents, features)."""

    function = staticmethod(losses.vf_loss)


class InfoNCELoss(_TokenLoss):
    """`losses.info_nce`: forward(x, y), tokens."""

    function = staticmethod(losses.info_nce)


class GradientDiversityLoss(_TokenLoss):
    """`losses.gradient_diversity`: forward(gradients of the tokens)."""

    function = staticmethod(losses.gradient_diversity)


def _repr_of(options):
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
