"""The operations, a package each: `api` is public, `reference` the specification, `function` the kernels."""

from .attn_diversity import attention_cosine, attention_diversity, attention_gram
from .pairwise_cosine import pairwise_cosine
from .reattention import reattention

__all__ = ["attention_cosine", "attention_diversity", "attention_gram", "pairwise_cosine", "reattention"]
