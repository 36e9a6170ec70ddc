"""ViT, SimpleViT, DeepViT and CaiT of vit-pytorch: `transformer.layers`, pairs of attention and MLP.

No module is called for a block, so that the tokens that leave one are those that enter the next attention.
"""

from typing import Any

import torch
from torch import nn

from ..parts import ModelParts, Point


def parts(model: Any) -> ModelParts | None:
    """The parts of a model of this family; None for another."""
    # CaiT's class token joins in blocks of its own, cls_transformer
    body: Any = getattr(model, "patch_transformer", getattr(model, "transformer", None))
    layers = getattr(body, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(model, "to_patch_embedding"):
        return None
    others = set(dict(body.named_children())) - {"layers", "norm"}
    if len(layers) == 0 or others or not all(map(_known, layers)):
        return None
    if getattr(body, "layer_dropout", 0) > 0:
        raise TypeError(
            f"layer_dropout must be 0, got {body.layer_dropout}: layers dropped, in evaluation, too, "
            "have no tokens"
        )
    norm = getattr(body, "norm", None)
    head = getattr(model, "mlp_head", getattr(model, "linear_head", None))
    norms = () if norm is None else (norm,)
    if isinstance(head, nn.Sequential):
        *own, head = head
        norms = (*norms, *own)
    class_tokens = getattr(model, "cls_token", None) if hasattr(model, "transformer") else None
    attentions: list[Any] = [layer[0] for layer in layers]  # type: ignore[index]
    last: Point = (body, "output") if norm is None else (norm, "input")
    return ModelParts(
        blocks=attentions,
        attentions=[getattr(attention, "fn", attention) for attention in attentions],
        num_prefix_tokens=0 if class_tokens is None else len(torch.atleast_2d(class_tokens).flatten(0, -2)),
        tokens=[*((attention, "input") for attention in attentions), last],
        patch_embed=model.to_patch_embedding,
        norms=norms,
        head=head,
    )


def _known(layer):
    """A pair of attention and MLP, plain or in CaiT's LayerScale, each of which is added to its input."""
    if not isinstance(layer, nn.ModuleList) or len(layer) != 2:
        return False
    attention, mlp = (getattr(module, "fn", module) for module in layer)
    return (hasattr(attention, "to_qkv") or hasattr(attention, "to_q")) and hasattr(mlp, "net")
