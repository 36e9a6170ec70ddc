"""The diversity losses as modules."""

from torch import nn

from ..ops.attn_diversity import attention_diversity
from ..ops.pairwise_cosine import pairwise_cosine


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
        penalty="abs",
        *,
        include_self=False,
        reduction="mean",
        num_prefix_tokens=1,
        eps=1e-8,
        backend="auto",
    ):
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.options = dict(
            penalty=penalty, include_self=include_self, reduction=reduction, eps=eps, backend=backend
        )

    def forward(self, x, y=None):
        first = self.num_prefix_tokens
        return pairwise_cosine(x[..., first:, :], None if y is None else y[..., first:, :], **self.options)

    def extra_repr(self):
        return f"num_prefix_tokens={self.num_prefix_tokens}, " + _repr_of(self.options)


class AttentionDiversityLoss(nn.Module):
    """Penalty on the cosine similarity of the attention maps of the heads: `attention_diversity`.

    forward(q [B, H, N, d], k [B, H, M, d]). The defaults are the loss of Chen et al. 2022 (arXiv 2203.06345).
    """

    def __init__(self, penalty="signed", *, include_self=True, reduction="mean", scale=None, backend="auto"):
        super().__init__()
        self.options = dict(
            penalty=penalty, include_self=include_self, reduction=reduction, scale=scale, backend=backend
        )

    def forward(self, q, k):
        return attention_diversity(q, k, **self.options)

    def extra_repr(self):
        return _repr_of(self.options)


def _repr_of(options):
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
