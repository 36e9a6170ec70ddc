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


class _Loss(nn.Module):
    """A function, `of`, with its options bound. Options that it does not have raise TypeError."""

    function: Callable[..., Tensor]
    options: dict[str, Any]

    def __init_subclass__(cls, of: Callable[..., Tensor] | None = None) -> None:
        if of is not None:
            cls.function, cls.__doc__ = staticmethod(of), f"`{of.__name__}`: {cls.__doc__}"

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
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class _TokenLoss(_Loss):
    """Drops the prefix tokens of every input."""

    def __init__(self, *, num_prefix_tokens: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.num_prefix_tokens = _checks.count("num_prefix_tokens", num_prefix_tokens)

    def forward(self, *tokens: Tensor) -> Tensor:
        return super().forward(*(x[..., self.num_prefix_tokens :, :] for x in tokens))

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (f"num_prefix_tokens={self.num_prefix_tokens}", super().extra_repr())))


class PatchCosineLoss(_TokenLoss, of=losses.pairwise_cosine):
    """penalty on the cosine similarity of the patches of each image.

    forward(x [B, N, D]) takes the pairs within x, forward(x, y [B, M, D]) those between x and y, for instance
    the tokens of two layers. The defaults are the loss of Gong et al. 2021 (arXiv 2104.12753). Arguments as
    `pairwise_cosine`, and num_prefix_tokens: the class and register tokens that are dropped from the front of
    x and y.

    Example:
        >>> tokens = torch.randn(2, 17, 48, requires_grad=True)  # a class token and 16 patches
        >>> PatchCosineLoss()(tokens).backward()
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
        super().__init__(
            num_prefix_tokens=num_prefix_tokens, penalty=penalty, include_self=include_self,
            reduction=reduction, eps=eps, backend=backend,
        )  # fmt: skip

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x) if y is None else super().forward(x, y)


class AttentionDiversityLoss(_Loss, of=losses.attention_diversity):
    """penalty on the cosine similarity of the attention maps of the heads.

    forward(q [B, H, N, d], k [B, H, M, d]). The defaults are the loss of Chen et al. 2022 (arXiv 2203.06345).

    Example:
        >>> q, k = torch.randn(2, 4, 6, 17, 8).requires_grad_().unbind()
        >>> AttentionDiversityLoss()(q, k).backward()
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
        super().__init__(
            penalty=penalty, include_self=include_self, reduction=reduction, scale=scale, backend=backend
        )


class PatchContrastLoss(_TokenLoss, of=losses.patch_contrast):
    """forward(first, last), tokens of two layers."""


class NeighbourhoodContrastLoss(_TokenLoss, of=losses.neighbourhood_contrast):
    """forward(tokens, context). Both with their prefix tokens, or num_prefix_tokens=0 and both without."""


class PatchMHSLoss(_TokenLoss, of=losses.patch_mhs):
    """forward(tokens)."""


class PatchMGDLoss(_TokenLoss, of=losses.patch_mgd):
    """forward(tokens)."""


class PatchSoftOrthogonalityLoss(_TokenLoss, of=losses.patch_soft_orthogonality):
    """forward(tokens)."""


class PatchConditionOrthogonalityLoss(_TokenLoss, of=losses.patch_condition_orthogonality):
    """forward(tokens)."""


class PatchMixingLoss(_TokenLoss, of=losses.patch_mixing):
    """forward(logits of all tokens, labels, others, shares of the patches)."""

    def forward(  # type: ignore[override]
        self, logits: Tensor, labels: Tensor, others: Tensor, shares: Tensor
    ) -> Tensor:
        return self.function(logits[..., self.num_prefix_tokens :, :], labels, others, shares, **self.options)


class RegionContrastLoss(_TokenLoss, of=losses.region_contrast):
    """forward(tokens)."""


class RegionMixingLoss(_Loss, of=losses.region_mixing):
    """forward(logits of the regions, targets, masks)."""


class HeadCrossCosineLoss(_Loss, of=losses.head_cross_cosine):
    """forward(q, k, q2, k2)."""


class HeadContrastLoss(_Loss, of=losses.head_contrast):
    """forward(q, k, q2, k2)."""


class HeadMHSLoss(_Loss, of=losses.head_mhs):
    """forward(q, k)."""


class HeadMGDLoss(_Loss, of=losses.head_mgd):
    """forward(q, k)."""


class HeadSoftOrthogonalityLoss(_Loss, of=losses.head_soft_orthogonality):
    """forward(q, k)."""


class HeadConditionOrthogonalityLoss(_Loss, of=losses.head_condition_orthogonality):
    """forward(q, k)."""


class WeightMHSLoss(_Loss, of=losses.weight_mhs):
    """forward(weights)."""


class WeightMGDLoss(_Loss, of=losses.weight_mgd):
    """forward(weights)."""


class WeightSoftOrthogonalityLoss(_Loss, of=losses.weight_soft_orthogonality):
    """forward(weights)."""


class WeightConditionOrthogonalityLoss(_Loss, of=losses.weight_condition_orthogonality):
    """forward(weights)."""


class CosRegLoss(_Loss, of=losses.cos_reg):
    """forward(layers)."""


class GramAnchoringLoss(_TokenLoss, of=losses.gram_anchoring):
    """forward(student tokens, teacher tokens)."""


class KoLeoLoss(_TokenLoss, of=losses.koleo):
    """forward(tokens). For one vector an image, [B, D], give num_prefix_tokens=0."""


class UniformityLoss(_TokenLoss, of=losses.uniformity):
    """forward(tokens). For one vector an image, [B, D], give num_prefix_tokens=0."""


class LinearCKALoss(_TokenLoss, of=losses.linear_cka):
    """one minus it; forward(tokens, teacher tokens)."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return 1 - super().forward(x, y)


class VFLoss(_TokenLoss, of=losses.vf_loss):
    """forward(latents, features)."""


class InfoNCELoss(_TokenLoss, of=losses.info_nce):
    """forward(x, y), tokens."""


class GradientDiversityLoss(_TokenLoss, of=losses.gradient_diversity):
    """forward(gradients of the tokens)."""
