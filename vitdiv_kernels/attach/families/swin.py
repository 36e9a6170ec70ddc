"""Swin (v1 and v2) of timm, of its authors, and of mmseg: stages in `layers`, each with `blocks`.

A block gives the whole map of its stage, its windows put together and their shift undone: timm's
[B, rows, columns, D], the authors' [B, rows columns, D]. Blocks are numbered through all stages.
"""

from torch import nn

from ..parts import ModelParts


def parts(model: nn.Module) -> ModelParts | None:
    """The parts of a model of this family; None for another."""
    stages = getattr(model, "layers", None)
    if not isinstance(stages, (nn.ModuleList, nn.Sequential)) or len(stages) == 0:
        return None
    blocks = [block for stage in stages for block in getattr(stage, "blocks", None) or [None]]
    if not all(hasattr(block, "window_size") and hasattr(block, "shift_size") for block in blocks):
        return None
    head = getattr(model, "head", None)
    head = getattr(head, "fc", head)  # of timm's, which pools before it
    norm = getattr(model, "norm", None)
    return ModelParts(
        blocks=blocks,
        num_prefix_tokens=0,
        channels_last=getattr(model, "output_fmt", None) == "NHWC",
        patch_embed=getattr(model, "patch_embed", None),
        norms=() if norm is None else (norm,),
        head=head if isinstance(head, nn.Module) else None,
    )
