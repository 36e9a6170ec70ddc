"""A reference ViT, its trainer (`python -m vitdiv_kernels.train --help`), the report on a run (`.report`)
and the demo (`.demo`)."""

from .model import CONFIGS, ViT, ViTConfig

__all__ = ["CONFIGS", "ViT", "ViTConfig"]
