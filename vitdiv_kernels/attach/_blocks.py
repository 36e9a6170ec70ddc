"""What is known of ViTs made of timm-like blocks: where their tokens, queries, keys and weights are.

A model has `blocks`; a block takes tokens [B, N, D] to tokens, and has `attn` with `num_heads` and a packed
projection `qkv`, a Linear or what takes its place (adapters, quantisation); `scale`, `q_norm` and `k_norm`
count where they are there. That is timm's Attention, `nn.ReAttention`, the published ReAttention, and the
blocks of `vit.model`.
"""

import inspect

import torch
from torch import nn

from .. import _checks, _vectors
from ..nn.effective import effective_mix, norm_kind, read_norm
from ..ops.maps.attention_gram import attention_gram
from . import _sharded


def plain_model(model):
    """The model itself, out of torch.compile and DistributedDataParallel, in any order."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def blocks_of(model):
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or len(blocks) == 0:
        raise TypeError(
            "model must have its blocks in model.blocks, a ModuleList or Sequential, as timm's "
            f"VisionTransformer has; {type(model).__name__} has not"
        )
    if any(isinstance(block, nn.ModuleList) for block in blocks):
        raise TypeError("model.blocks must hold blocks, got chunks of them: make the model without chunks")
    return blocks


def projection_of(block, index):
    """The packed projection of a block's attention, whose output is q, k and v."""
    attn = getattr(block, "attn", None)
    if not isinstance(getattr(attn, "qkv", None), nn.Module) or not hasattr(attn, "num_heads"):
        raise TypeError(
            f"blocks[{index}].attn must have qkv, a Linear, and num_heads, as timm's Attention has"
        )
    return attn.qkv


def check_weight(block, index):
    """Raises TypeError where the weight of the projection is not all that it multiplies with."""
    qkv = projection_of(block, index)
    adapted = any("lora_" in name for name, _ in qkv.named_parameters())
    if adapted or not isinstance(getattr(qkv, "weight", None), torch.Tensor):
        raise TypeError(
            f"blocks[{index}].attn.qkv, {type(qkv).__name__}, is adapted or quantised, so its weight is not "
            "what it multiplies with: losses on weights can't be taken there; merge adapters first"
        )


def reads_weights(block, kind):
    """Whether losses of a kind, as in `terms.LOSSES`, read weights outside of the forward pass."""
    attn = getattr(block, "attn", None)
    norms = [getattr(attn, name, None) for name in ("q_norm", "k_norm")]
    own = any(True for norm in norms if norm is not None for _ in norm.parameters())
    return (
        kind in ("weights", "logits", "regions", "embeddings")
        or (kind in ("heads", "maps") and own)
        or (kind == "maps" and hasattr(attn, "reatten_matrix"))
    )


def check_maps(block, index):
    """Raises TypeError where the softmax maps are not those of q and k as they leave the projection.

    A parameter of the attention's own, not of a layer in it, tells that: XCiT's temperature, the lambdas of
    differential attention, a table of relative positions.
    """
    projection_of(block, index)
    attn = block.attn
    takes = inspect.signature(attn.forward).parameters
    if (
        hasattr(attn, "proj_l")
        or any("rope" in name or "rel_pos" in name for name in takes)
        or any(True for _ in attn.parameters(recurse=False))
    ):
        raise TypeError(
            f"blocks[{index}].attn, {type(attn).__name__}, mixes, rotates or biases between its projection "
            "and its softmax: losses and measures of attention maps can't be taken there"
        )


def query_key(attn, projected):
    """q and k [B, H, N, d] of the output [B, N, 3 H d] of attn.qkv, such that the maps are
    softmax(d^-1/2 q k^T)."""
    if projected.shape[-1] % (3 * attn.num_heads):
        raise TypeError(
            f"attn.qkv must give q, k and v of {attn.num_heads} heads, a multiple of {3 * attn.num_heads} "
            f"features, got {projected.shape[-1]}"
        )
    q, k, _ = projected.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    if hasattr(attn, "q_norm"):
        q, k = _sharded.call(attn.q_norm, q), _sharded.call(attn.k_norm, k)
    default = q.shape[-1] ** -0.5
    scale = getattr(attn, "scale", default)
    return (q if scale == default else q * (scale / default)), k


def qkv_weight(attn):
    """[3, H d, D]: the matrices of q, k and v."""
    return _sharded.gathered(attn.qkv.weight).unflatten(0, (3, -1))


def mixed_layer(attn, q, k):
    """A layer as `losses.layer_similarity` takes it: (q, k), or of re-attention (q, k, mix, bias) with the
    batch norm folded into both.

    In training the statistics are those of these images, of this process alone: from the Gram matrix of the
    maps, as the operation itself has them.
    """
    if not hasattr(attn, "reatten_matrix"):
        return q, k
    mix, bias = (_whole(tensor) for tensor in effective_mix(attn))
    bias = mix.new_zeros(len(mix)) if bias is None else bias
    module = getattr(attn, "var_norm", None)
    kind = "none" if module is None else norm_kind(module)
    if kind == "none":
        return q, k, mix, bias
    if kind not in ("batch", "frozen"):
        raise TypeError(
            f"the maps of ReAttention with norm 'layer' are no fixed mix ({type(module).__name__}): cos_reg "
            "can't take them, nor CollapseMonitor unless mixed is False"
        )
    norm = read_norm(attn)
    mean, variance = norm.running_mean, norm.running_var
    if norm.from_batch:
        gram = attention_gram(q, k, centered=True)
        with _checks.autocast_off(q):
            mean = mix.sum(1) / k.shape[2] + bias
            count = q.shape[0] * q.shape[2] * k.shape[2]
            variance = (
                torch.einsum("gh,hk,gk->g", mix.to(gram.dtype), gram.sum(0), mix.to(gram.dtype)) / count
            )
    gain = (variance + norm.eps).rsqrt()
    weight, shift = _whole(norm.weight), _whole(norm.bias)
    gain = gain if weight is None else weight * gain
    bias = gain * (bias - mean)
    return q, k, gain.unsqueeze(1) * mix, bias if shift is None else bias + shift


def _whole(tensor):
    return None if tensor is None else _vectors.full_precision(_sharded.gathered(tensor))[0]
