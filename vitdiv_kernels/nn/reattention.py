"""DeepViT's attention, with the constructor arguments (by keyword) and the forward of timm's Attention."""

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.reattention import reattention

MIX_NOISE = 0.1
NORM_GAIN = 0.05


class ReAttention(nn.Module):
    """Self-attention whose maps are mixed across heads and normalised (Zhou et al. 2021, arXiv 2103.11886).

    A drop-in for timm's Attention: `VisionTransformer(..., attn_layer=ReAttention)`. Its parameter names are
    those of the official DeepViT code (`qkv`, `proj`, `reatten_matrix`, `var_norm`): its checkpoints load.

    Args:
        dim, num_heads, attn_head_dim, dim_out, qkv_bias, qk_norm, scale_norm, proj_bias, attn_drop,
            proj_drop, norm_layer, device, dtype: as timm's Attention; attn_drop is for the reference only.
        norm: of the mixed maps, "batch" (the paper), "layer" (over the heads) or "none".
        apply_transform: False gives plain attention, without mix and norm: DeepViT's first blocks.
        transform_scale: scale the output by head_dim^-1/2, as DeepViT-S and -L do.
        mix_init: "identity" starts from the heads unmixed, I plus noise of 0.1 with zero bias, and small
            maps: norm weight 0.05. "conv" is the published initialisation: that of Conv2d and a norm weight
            of 1. Normalised maps have entries of size 1 where a softmax has 1/N, so a weight of 1 makes the
            branch many times stronger than plain attention; deep small models trained better from the weak
            start.
        norm_gain: the initial norm weight, instead of that of mix_init.
        eps, momentum: of the norm.
        backend: of the operation, as `vitdiv_kernels.reattention`.

    Raises ValueError when num_heads does not divide dim, or an option is unknown.

    With `torch.nn.SyncBatchNorm.convert_sync_batchnorm` the statistics are those of all processes.
    """

    def __init__(
        self, dim, num_heads=8, *, attn_head_dim=None, dim_out=None, qkv_bias=False, qk_norm=False,
        scale_norm=False, proj_bias=True, attn_drop=0.0, proj_drop=0.0, norm_layer=None, norm="batch",
        apply_transform=True, transform_scale=False, mix_init="identity", norm_gain=None, eps=1e-5,
        momentum=0.1, backend="auto", device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        if attn_head_dim is None and dim % num_heads != 0:
            raise ValueError(f"num_heads must divide dim, got num_heads {num_heads} and dim {dim}")
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError("norm_layer must be given when qk_norm or scale_norm is True")
        kind = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = attn_head_dim or dim // num_heads
        self.attn_dim = num_heads * self.head_dim
        self.scale = self.head_dim**-0.5
        self.apply_transform = apply_transform
        self.map_norm = norm
        self.out_scale = self.scale if transform_scale else 1.0
        self.backend = backend

        self.qkv = nn.Linear(dim, 3 * self.attn_dim, bias=qkv_bias, **kind)
        self.q_norm = norm_layer(self.head_dim, **kind) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **kind) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        if apply_transform:
            self.reatten_matrix = nn.Conv2d(num_heads, num_heads, 1, **kind)
            self.var_norm = _norm_over_heads(norm, num_heads, eps, momentum, kind)
            self._init_mix(mix_init, norm_gain)
        self.norm = norm_layer(self.attn_dim, **kind) if scale_norm else nn.Identity()
        self.proj = nn.Linear(self.attn_dim, dim_out or dim, bias=proj_bias, **kind)
        self.proj_drop = nn.Dropout(proj_drop)

    @torch.no_grad()
    def _init_mix(self, mix_init, norm_gain):
        if mix_init not in ("identity", "conv"):
            raise ValueError(f"mix_init must be one of 'identity', 'conv', got {mix_init!r}")
        if mix_init == "identity":
            weight = self.reatten_matrix.weight
            noise = MIX_NOISE * torch.randn_like(weight)
            weight.copy_(torch.eye(self.num_heads, device=weight.device)[:, :, None, None] + noise)
            self.reatten_matrix.bias.zero_()
        if self.map_norm != "none":
            default_gain = NORM_GAIN if mix_init == "identity" else 1.0
            self.var_norm.weight.fill_(default_gain if norm_gain is None else norm_gain)

    def forward(self, x, attn_mask=None, is_causal=False, return_gram=False):
        """x [B, N, dim] -> [B, N, dim_out]; with return_gram also the Gram matrix [B, H, H] of the softmax
        maps.

        Raises ValueError for a mask or is_causal: masked maps are not supported.
        """
        if attn_mask is not None or is_causal:
            raise ValueError(
                "attn_mask must be None and is_causal False: ReAttention mixes maps over all keys"
            )
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # views [B, H, N, d] into the packed projection
        q, k = self.q_norm(q), self.k_norm(k)
        gram = None
        if self.apply_transform:
            out = self._mixed_attention(q, k, v, return_gram)
            out, gram = out if return_gram else (out, None)
        elif return_gram:
            raise ValueError("return_gram must be False when apply_transform is False: use attention_gram")
        else:
            dropout_p = self.attn_drop.p if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
        out = self.norm(out.transpose(1, 2).reshape(batch, tokens, self.attn_dim))
        out = self.proj_drop(self.proj(out))
        return (out, gram) if return_gram else out

    def _mixed_attention(self, q, k, v, return_gram):
        training, norm_options = self.training, {}
        if self.map_norm != "none":
            norm = self.var_norm
            norm_options = {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}
        if self.map_norm == "batch":
            # as BatchNorm2d: its own mode, so that it can be frozen; the batch's statistics if none are kept
            training = norm.training or norm.running_mean is None
            if self.training and not training and self.attn_drop.p > 0:
                raise ValueError("attn_drop must be 0 in training with the batch norm var_norm in evaluation")
            norm_options["running_mean"] = norm.running_mean
            norm_options["running_var"] = norm.running_var
            norm_options["momentum"] = self._momentum(training)
            norm_options["process_group"] = _process_group(norm)
        return reattention(
            q, k, v, self.reatten_matrix.weight.flatten(1), mix_bias=self.reatten_matrix.bias,
            norm=self.map_norm, training=training, out_scale=self.out_scale, scale=self.scale,
            dropout_p=self.attn_drop.p if self.training else 0.0, return_gram=return_gram,
            backend=self.backend, **norm_options,
        )  # fmt: skip

    def _momentum(self, training):
        norm = self.var_norm
        if training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if norm.momentum is None:  # cumulative average
                return 1.0 / float(norm.num_batches_tracked)
        return 0.0 if norm.momentum is None else norm.momentum

    def extra_repr(self):
        mix = f"norm={self.map_norm!r}, out_scale={self.out_scale:.4g}" if self.apply_transform else "no mix"
        return f"num_heads={self.num_heads}, {mix}, backend={self.backend!r}"


def _norm_over_heads(norm, num_heads, eps, momentum, kind):
    if norm == "batch":
        return nn.BatchNorm2d(num_heads, eps, momentum, **kind)
    if norm == "layer":
        return nn.LayerNorm(num_heads, eps, **kind)
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
