"""What is known of attentions: where their queries, keys, mixes and weights are.

`KNOWN` is the table: a row for each kind, by the names of its parts. A new kind is a new row.
"""

import inspect
import re
from types import SimpleNamespace

import torch
from torch import nn

from .. import _checks, _vectors
from ..nn.effective import effective_mix, norm_kind, read_norm
from ..ops.maps.attention_gram import attention_gram
from . import _sharded, families
from .parts import AttentionNames, ModelParts

# The row that fits with most names is taken.
KNOWN = (
    AttentionNames(),  # timm, DINOv2, DINOv3, the released plain attentions, `vit`
    AttentionNames(post="reatten_matrix", norm="var_norm"),  # DeepViT's, `nn.ReAttention`
    AttentionNames(pre="proj_l", post="proj_w"),  # CaiT's, `nn.TalkingHeadsAttention`
    AttentionNames(pre="proj_pre", post="proj_post"),  # Gong et al.'s
    AttentionNames(projections=("q", "k", "v")),
    AttentionNames(projections=("q_proj", "k_proj", "v_proj")),
    # vit-pytorch's ViT and SimpleViT, DeepViT, CaiT; its attentions with norms of q and k have no scale
    AttentionNames(projections=("to_qkv",), heads="heads", needs_scale=True),
    AttentionNames(
        projections=("to_qkv",),
        heads="heads",
        post="reattn_weights",
        norm="reattn_norm",
        transposed=True,
        needs_scale=True,
    ),
    AttentionNames(
        projections=("to_q", "to_kv"),
        heads="heads",
        pre="mix_heads_pre_attn",
        post="mix_heads_post_attn",
        transposed=True,
        needs_scale=True,
    ),
)


# Arguments of an attention that touch no map, or masks, which are seen where blocks get them.
ARGUMENTS = {"attn_mask", "is_causal", "attn_bias", "atten", "context", "return_gram"}


def plain_model(model):
    """The model itself, out of torch.compile and DistributedDataParallel, in any order."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def parts_of(model, given):
    """The parts of a model: those given, or those of its family."""
    if given is None:
        return families.parts_of(model)
    if not isinstance(given, ModelParts):
        raise TypeError(f"parts must be a ModelParts, got {type(given).__name__}")
    given.check(model)
    return given


def place_of(model, module):
    """What a module of the model is called in sentences, such as blocks[2].attn."""
    name = next((name for name, each in model.named_modules() if each is module), type(module).__name__)
    return re.sub(r"\.(\d+)", r"[\1]", name)


def attention_of(model, parts, index):
    """The `Attention` of a block. Raises TypeError where it has none that can be read."""
    attn, block = parts.attentions[index], parts.blocks[index]
    place = f"{place_of(model, block)}.attn" if attn is None else place_of(model, attn)
    return Attention(parts, index, place)


def _named(attn, name):
    """The part of an attention of that name, "a.b" is b of a; None where there is none."""
    for each in name.split("."):
        attn = getattr(attn, each, None)
    return attn


class Attention:
    """The attention of a block, read by the names that fit it.

    Args:
        parts: of the model.
        index: the block.
        place: what the attention is called in sentences.

    Raises TypeError where no names fit.
    """

    def __init__(self, parts, index, place):
        self.module, self.place = parts.attentions[index], place
        names = parts.names
        if names is None:
            fitting = [names for names in KNOWN if self._fits(names)]
            names = max(fitting, key=lambda names: len(names.all()), default=None)
        elif not self._fits(names):
            raise TypeError(f"{place} must have what names of parts name, {names}")
        if names is None:
            raise TypeError(
                f"{place} must have qkv, a Linear, and num_heads, as timm's Attention has, or q, k and v, or "
                "to_qkv, heads and scale: give parts with names, a vitdiv_kernels.AttentionNames"
            )
        self.names = names
        self.heads = _named(self.module, names.heads)

    @property
    def projections(self):
        return [_named(self.module, name) for name in self.names.projections]

    def _fits(self, names):
        needed = [names.pre, names.post, names.scale if names.needs_scale else None]
        return (
            all(isinstance(_named(self.module, name), nn.Module) for name in names.projections)
            and isinstance(_named(self.module, names.heads), int)
            and all(_named(self.module, name) is not None for name in needed if name is not None)
        )

    def check_weight(self):
        """Raises TypeError where the weight of a projection is not all that it multiplies with."""
        for name, module in zip(self.names.projections, self.projections, strict=True):
            adapted = any("lora_" in name for name, _ in module.named_parameters())
            if adapted or not isinstance(getattr(module, "weight", None), torch.Tensor):
                raise TypeError(
                    f"{self.place}.{name}, {type(module).__name__}, is adapted or quantised, so its weight "
                    "is not what it multiplies with: losses on weights can't be taken there; merge adapters "
                    "first"
                )

    def check_maps(self):
        """Raises TypeError where the maps are not known to be those of q and k, and of the mixes.

        A parameter of the attention's own tells that, such as XCiT's temperature, the lambdas of differential
        attention, a table of relative positions; or a layer of which the table does not know what it does.
        """
        attn, known = self.module, {name.partition(".")[0] for name in self.names.all()}
        _, *rest = inspect.signature(attn.forward).parameters.values()
        takes = [each.name for each in rest if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
        takes = [name for name in takes if name not in ARGUMENTS.union(self.names.beside)]
        own = [name for name, _ in attn.named_parameters(recurse=False) if name not in known]
        layers = [
            name
            for name, child in attn.named_children()
            if name not in known.union(self.names.beside) and any(True for _ in child.parameters())
        ]
        unknown = takes + own + layers
        if unknown:
            raise TypeError(
                f"{self.place}, {type(attn).__name__}, mixes, rotates or biases between its projection and "
                f"its softmax, by {', '.join(unknown)}: losses and measures of attention maps can't be taken "
                "there; CollapseMonitor with maps=False measures the patches alone"
            )

    def reads_weights(self, kind):
        """Whether losses of a kind, as in `terms.LOSSES`, read weights outside of the forward pass."""
        names = self.names
        norms = [_named(self.module, name) for name in names.norms]
        own = any(True for norm in norms if norm is not None for _ in norm.parameters())
        return (
            kind == "weights"
            or (kind in ("heads", "maps") and (own or names.pre is not None))
            or (kind == "maps" and names.post is not None)
        )

    def query_key(self, projected):
        """q and k [B, H, N, d] of the output [B, N, 3 H d] of the projections, such that the maps are
        softmax(d^-1/2 q k^T).

        Where heads are mixed before the softmax, H times as wide: the logits sum_h P_gh q_h k_h of head g are
        the product of the P_gh q_h side by side with the k_h side by side.
        """
        names, heads = self.names, self.heads
        if projected.shape[-1] % (3 * heads):
            raise TypeError(
                f"{self.place}.{' and '.join(names.projections)} must give q, k and v of {heads} heads, a "
                f"multiple of {3 * heads} features, got {projected.shape[-1]}"
            )
        q, k, _ = projected.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q_norm, k_norm = (_named(self.module, name) for name in names.norms)
        q = q if q_norm is None else _sharded.call(q_norm, q)
        k = k if k_norm is None else _sharded.call(k_norm, k)
        scale = _named(self.module, names.scale)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if names.pre is not None:
            # a bias, the same for all keys, is none after the softmax
            pre, _ = self._mix(names.pre)
            with _checks.autocast_off(q):
                q = torch.einsum("gh,bhnd->bgnhd", pre, q.to(pre.dtype)).flatten(3).to(k.dtype)
            k = k.transpose(1, 2).flatten(2).unsqueeze(1).expand(-1, heads, -1, -1)
        default = q.shape[-1] ** -0.5
        return (q if scale == default else q * (scale / default)), k

    def weight(self):
        """[3, H d, D]: the matrices of q, k and v."""
        weights = [_sharded.gathered(projection.weight) for projection in self.projections]
        return (weights[0] if len(weights) == 1 else torch.cat(weights)).unflatten(0, (3, -1))

    def mixed_layer(self, q, k):
        """A layer as `losses.layer_similarity` takes it: (q, k), or where heads are mixed after the softmax
        (q, k, mix, bias), a batch norm folded into both.

        In training the statistics are those of these images, of SyncBatchNorm those of all processes, which
        must all call this: from the Gram matrix of the maps, as the operation itself has them.
        """
        names = self.names
        if names.post is None:
            return q, k
        mix, bias = self._mix(names.post)
        bias = mix.new_zeros(len(mix)) if bias is None else bias
        module = None if names.norm is None else _named(self.module, names.norm)
        kind = "none" if module is None else norm_kind(module)
        if kind == "none":
            return q, k, mix, bias
        if kind not in ("batch", "frozen"):
            raise TypeError(
                f"the maps of ReAttention with norm 'layer' are no fixed mix ({type(module).__name__}): "
                "cos_reg can't take them, nor CollapseMonitor unless mixed is False"
            )
        norm = read_norm(SimpleNamespace(var_norm=module))
        mean, variance = norm.running_mean, norm.running_var
        if norm.from_batch:
            gram = attention_gram(q, k, centered=True)
            with _checks.autocast_off(q):
                mean = mix.sum(1) / k.shape[2] + bias
                count = q.shape[0] * q.shape[2] * k.shape[2]
                gram, count = _sharded.summed(gram.sum(0), count, norm.process_group)
                variance = torch.einsum("gh,hk,gk->g", mix.to(gram.dtype), gram, mix.to(gram.dtype)) / count
        gain = (variance + norm.eps).rsqrt()
        weight, shift = _whole(norm.weight), _whole(norm.bias)
        gain = gain if weight is None else weight * gain
        bias = gain * (bias - mean)
        return q, k, gain.unsqueeze(1) * mix, bias if shift is None else bias + shift

    def _mix(self, name):
        """A mix [output head, input head] in float32 at least, and its bias or None."""
        mix = _named(self.module, name)
        if isinstance(mix, torch.Tensor):
            weight, bias = mix, None
        else:
            weight, bias = effective_mix(SimpleNamespace(**{name: mix}), name)
        weight = _whole(weight)
        return (weight.mT if self.names.transposed else weight), _whole(bias)


def _whole(tensor):
    return None if tensor is None else _vectors.full_precision(_sharded.gathered(tensor))[0]
