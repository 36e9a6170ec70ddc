"""How alike attention maps are: between heads, and between layers."""

from .api import attention_cosine, attention_diversity, attention_gram

__all__ = ["attention_cosine", "attention_diversity", "attention_gram"]
