"""ViTs with timm's names: DeiT, CaiT, XCiT, DINOv2, DINOv3, NaFlexViT, the papers' released code, `vit`."""

from torch import nn

from ..parts import ModelParts


def parts(model: nn.Module) -> ModelParts | None:
    """The parts of a model of this family; None for another."""
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or len(blocks) == 0:
        return None
    if any(isinstance(block, nn.ModuleList) for block in blocks):
        raise TypeError("model.blocks must hold blocks, got chunks of them: make the model without chunks")

    def module(name):
        part = getattr(model, name, None)
        return part if isinstance(part, nn.Module) else None

    norms = (module("norm"), module("fc_norm")) if module("norm") is not None else ()
    return ModelParts(
        blocks=list(blocks),
        patch_embed=module("patch_embed"),
        norms=[norm for norm in norms if norm is not None],
        head=module("head"),
    )
