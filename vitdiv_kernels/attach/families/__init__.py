"""The families of models that are known: each a file with `parts(model)`, the `ModelParts` or None.

A family reads the structure of a model, not its class, so that a copy of its code is known, too. What it does
not know for sure it refuses with a sentence.
"""

from torch import nn

from ..parts import ModelParts
from . import swin, timm, vit_pytorch

FAMILIES = (timm, swin, vit_pytorch)


def parts_of(model: nn.Module) -> ModelParts:
    """The parts of a model of a known family. Raises TypeError for another."""
    for family in FAMILIES:
        parts = family.parts(model)
        if parts is not None:
            return parts
    raise TypeError(
        "model must have its blocks in model.blocks, a ModuleList or Sequential, as timm's VisionTransformer "
        f"has, or be a Swin or a ViT of vit-pytorch; {type(model).__name__} is none: give parts, "
        "a vitdiv_kernels.ModelParts that names its blocks"
    )
