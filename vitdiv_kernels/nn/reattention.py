"""DeepViT's attention, with the constructor arguments (by keyword) and the forward of timm's Attention."""

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.attn_diversity import attention_gram
from ..ops.reattention import reattention
from . import _attention, _effective, _statistics
from ._initial import MapBatchNorm2d, MapLayerNorm, MixConv2d

NORM_GAIN = 0.05


class ReAttention(_attention.PackedAttention):
    """Self-attention whose maps are mixed across heads and normalised (Zhou et al. 2021, arXiv 2103.11886).

    DOC
    """

    def __init__(
        self, dim, num_heads=8, *, attn_head_dim=None, dim_out=None, qkv_bias=False, qk_norm=False,
        scale_norm=False, proj_bias=True, gated=False, attn_drop=0.0, proj_drop=0.0, norm_layer=None,
        norm="batch", apply_transform=True, transform_scale=False, mix_init="identity", norm_gain=None,
        eps=1e-5, momentum=0.1, count_recomputed=True, backend="auto", device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        self.apply_transform = apply_transform
        self.map_norm = norm
        self.count_recomputed = count_recomputed
        self.backend = backend
        self._add_input(dim, num_heads, attn_head_dim, qkv_bias, qk_norm, scale_norm, norm_layer, kind)
        self.out_scale = self.scale if transform_scale else 1.0
        self.attn_drop = nn.Dropout(attn_drop)
        if apply_transform:
            self.reatten_matrix = _mix_of_heads(mix_init, num_heads, kind)
            gain = (NORM_GAIN if mix_init == "identity" else 1.0) if norm_gain is None else norm_gain
            self.var_norm = _norm_over_heads(norm, num_heads, eps, momentum, gain, kind)
        self._add_output(dim_out, qkv_bias, scale_norm, proj_bias, gated, proj_drop, norm_layer, kind)

    def init_weights(self):
        """Gives the mix and the norm their initial values again. timm's models call it after they have given all
        Linear layers, and with "jax" all convolutions, their own."""
        if self.apply_transform:
            for module in (self.reatten_matrix, self.var_norm):
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()

    def forward(self, x, attn_mask=None, is_causal=False, return_gram=False):
        """x [B, N, dim] -> [B, N, dim_out]; with return_gram also the Gram matrix [B, H, H] of the softmax
        maps.

        Raises ValueError for a mask or is_causal: masked maps are not supported. Raises TypeError for a
        `reatten_matrix` or `var_norm` that can't be read.
        """
        return _attention.attend(self, x, attn_mask, is_causal, return_gram=return_gram)

    def _attend(self, x, return_gram):
        q, k, v = self._split(x)
        gram = None
        if self.apply_transform:
            if self._calls_modules(q):
                out = self._on_maps(q, k, v)
                gram = attention_gram(q, k, scale=self.scale, backend="reference") if return_gram else None
            else:
                out = self._mixed_attention(q, k, v, return_gram)
                out, gram = out if return_gram else (out, None)
        elif return_gram:
            raise ValueError("return_gram must be False when apply_transform is False: use attention_gram")
        else:
            dropout_p = self.attn_drop.p if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
        out = self._project(out, x)
        return (out, gram) if return_gram else out

    def _mixed_attention(self, q, k, v, return_gram):
        mix, mix_bias = _effective.read_mix(self, "reatten_matrix")
        norm, training, put_back = _effective.read_norm(self), self.training, False
        options = {"norm": norm.kind}
        if norm.kind != "none":
            options.update(norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps)
        if norm.kind == "batch":
            training = norm.from_batch
            if self.training and not training and self.attn_drop.p > 0:
                raise ValueError("attn_drop must be 0 in training with the batch norm var_norm in evaluation")
            mean, var, momentum = norm.running_mean, norm.running_var, 0.0
            if training and mean is not None:
                module = self.var_norm
                momentum = module.momentum
                put_back = momentum is None or not self.count_recomputed
                if put_back:
                    mean, var, momentum = _statistics.copies(module)
                elif module.num_batches_tracked is not None:
                    module.num_batches_tracked.add_(1)
            options.update(running_mean=mean, running_var=var, momentum=momentum)
            options["process_group"] = _process_group(self.var_norm)
        out = reattention(
            q, k, v, mix, mix_bias=mix_bias, training=training, out_scale=self.out_scale, scale=self.scale,
            dropout_p=self.attn_drop.p if self.training else 0.0, return_gram=return_gram,
            backend=self.backend, **options,
        )  # fmt: skip
        if put_back:
            _statistics.put_back(self.var_norm, mean, var, self.count_recomputed)
        return out

    def _on_maps(self, q, k, v):
        """The published form, which calls the modules."""
        if not self.count_recomputed:
            raise ValueError("count_recomputed must be True where the reference backend calls var_norm on the maps")
        maps = self.attn_drop((self.scale * q @ k.mT).softmax(-1))
        mixed = self.reatten_matrix(maps)
        if self.map_norm == "layer":
            mixed = self.var_norm(mixed.movedim(1, -1)).movedim(-1, 1)
        else:
            mixed = self.var_norm(mixed)
        return self.out_scale * (mixed @ v)

    def extra_repr(self):
        mix = f"norm={self.map_norm!r}, out_scale={self.out_scale:.4g}" if self.apply_transform else "no mix"
        return f"num_heads={self.num_heads}, {mix}, backend={self.backend!r}"


def _mix_of_heads(mix_init, num_heads, kind):
    if mix_init == "identity":
        return MixConv2d(num_heads, num_heads, 1, **kind).start_unmixed()
    if mix_init == "conv":
        return nn.Conv2d(num_heads, num_heads, 1, **kind)
    raise ValueError(f"mix_init must be one of 'identity', 'conv', got {mix_init!r}")


def _norm_over_heads(norm, num_heads, eps, momentum, gain, kind):
    if norm == "batch":
        return MapBatchNorm2d(num_heads, eps, momentum, **kind).start_from(gain)
    if norm == "layer":
        return MapLayerNorm(num_heads, eps, **kind).start_from(gain)
    if norm == "none":
        return nn.Identity()
    raise ValueError(f"norm must be one of 'none', 'batch', 'layer', got {norm!r}")


def _process_group(batch_norm):
    if not isinstance(batch_norm, nn.SyncBatchNorm):
        return None
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed:
        return None
    return batch_norm.process_group or torch.distributed.group.WORLD
