"""The papers' vision transformers; `python -m vitdiv_kernels.train --help` trains them."""

from .checkpoints import load
from .configs import CONFIGS, ViTConfig
from .model import ViT

__all__ = ["CONFIGS", "ViT", "ViTConfig", "load"]
