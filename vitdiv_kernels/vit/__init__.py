"""A reference ViT; `python -m vitdiv_kernels.train --help` trains it."""

from .configs import CONFIGS, ViTConfig
from .model import ViT

__all__ = ["CONFIGS", "ViT", "ViTConfig"]
