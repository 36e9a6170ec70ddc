"""What is known of ViTs made of timm-like blocks: where their tokens, queries, keys and weights are.

A model has `blocks`; a block takes tokens [B, N, D] to tokens, and has `attn` with `num_heads` and a packed
projection `qkv`; `scale`, `q_norm` and `k_norm` count where they are there. That is timm's Attention,
`nn.ReAttention`, and the blocks of `vit.model`.
"""

import inspect

import torch
from torch import nn

from .losses import _common
from .ops import _checks
from .ops.attn_diversity import attention_gram


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
    return blocks


def prefix_tokens_of(model, given):
    """Class and register tokens at the front: those given, else model.num_prefix_tokens, else 1."""
    number = getattr(model, "num_prefix_tokens", 1) if given is None else given
    return _checks.count("num_prefix_tokens", number)


def projection_of(block, index):
    """The packed projection of a block's attention, whose output is q, k and v."""
    attn = getattr(block, "attn", None)
    if not isinstance(getattr(attn, "qkv", None), nn.Linear) or not hasattr(attn, "num_heads"):
        raise TypeError(
            f"blocks[{index}].attn must have qkv, a Linear, and num_heads, as timm's Attention has"
        )
    return attn.qkv


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
    q, k, _ = projected.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    default = q.shape[-1] ** -0.5
    scale = getattr(attn, "scale", default)
    return (q if scale == default else q * (scale / default)), k


def qkv_weight(attn):
    """[3, H d, D]: the matrices of q, k and v."""
    return attn.qkv.weight.unflatten(0, (3, -1))


def mixed_layer(attn, q, k):
    """A layer as `losses.layer_similarity` takes it: (q, k), or of re-attention (q, k, mix, bias) with the
    batch norm folded into both.

    In training the statistics are those of these images, of this process alone: from the Gram matrix of the
    maps, as the operation itself has them.
    """
    if not hasattr(attn, "reatten_matrix"):
        return q, k
    mix, bias = _common.full_precision(attn.reatten_matrix.weight.flatten(1), attn.reatten_matrix.bias)
    if attn.map_norm == "none":
        return q, k, mix, bias
    if attn.map_norm != "batch":
        raise TypeError("the maps of ReAttention with norm 'layer' are no fixed mix: cos_reg can't take them")
    norm = attn.var_norm
    if norm.training or norm.running_mean is None:
        gram = attention_gram(q, k, centered=True)
        with _checks.autocast_off(q):
            mean = mix.sum(1) / k.shape[2] + bias
            count = q.shape[0] * q.shape[2] * k.shape[2]
            variance = (
                torch.einsum("gh,hk,gk->g", mix.to(gram.dtype), gram.sum(0), mix.to(gram.dtype)) / count
            )
    else:
        mean, variance = norm.running_mean, norm.running_var
    gain = norm.weight * (variance + norm.eps).rsqrt()
    return q, k, gain.unsqueeze(1) * mix, gain * (bias - mean) + norm.bias


class _Keep:
    """A hook that keeps the output of its module; of the embeddings, the input of block 0.

    In a copy of the model, or one that is pickled, it has a place of its own: what a copy makes, say a
    teacher, is not what the model made.
    """

    def __init__(self, kept, key, without_grad):
        self.kept, self.key, self.without_grad = kept, key, without_grad

    def __call__(self, module, args, out=None):
        if self.without_grad or torch.is_grad_enabled():
            self.kept[self.key] = args[0] if self.key == ("tokens", -1) else out

    def __reduce__(self):
        return _KeepNothing, ()


class _KeepNothing:
    def __call__(self, module, args, out=None):
        pass


class Recorder:
    """Keeps what chosen blocks make in the last forward pass; hooks, and nothing of the model, are changed.

    Args:
        model: made of timm-like blocks.
        tokens: blocks whose output [B, N, D] is kept; heads: blocks whose q, k and v [B, N, 3 H d] are.
        embeddings: whether the tokens that enter block 0 are kept.
        patch_embed: whether the output of model.patch_embed [B, N, D] is kept.
        without_grad: keep also what is made without gradients.
    """

    def __init__(self, model, tokens=(), heads=(), embeddings=False, patch_embed=False, without_grad=False):
        blocks = blocks_of(model)
        self.kept = kept = {}
        self.handles = []

        def keep(key):
            return _Keep(kept, key, without_grad)

        if embeddings:
            self.handles.append(blocks[0].register_forward_pre_hook(keep(("tokens", -1))))
        if patch_embed:
            self.handles.append(model.patch_embed.register_forward_hook(keep(("patch_embed", 0))))
        for i in tokens:
            self.handles.append(blocks[i].register_forward_hook(keep(("tokens", i))))
        for i in heads:
            self.handles.append(projection_of(blocks[i], i).register_forward_hook(keep(("heads", i))))

    def take(self):
        """What was kept, {("tokens" or "heads", block): tensor}, the embeddings as block -1, the output of
        patch_embed as ("patch_embed", 0); keeps it no longer."""
        taken = dict(self.kept)
        self.kept.clear()
        for (kind, i), value in taken.items():
            if not isinstance(value, torch.Tensor) or value.dim() != 3:
                where = "model.patch_embed" if kind == "patch_embed" else f"blocks[{i}]"
                what = "they" if kind == "patch_embed" else f"its {kind}"
                raise TypeError(f"{where} must give tokens [B, N, D], {what} are {_given(value)}")
        return taken

    def remove(self):
        for handle in self.handles:
            handle.remove()
        self.handles, self.kept = [], {}


def _given(value):
    return _checks.shape_of(value) if isinstance(value, torch.Tensor) else type(value).__name__
