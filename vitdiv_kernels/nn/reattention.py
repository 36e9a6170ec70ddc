"""DeepViT's attention, with the constructor arguments (by keyword) and the forward of timm's Attention."""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from .._types import Backend
from ..ops.maps.attention_gram import attention_gram
from ..ops.maps.reattention import reattention
from . import _attention, _statistics, effective
from ._initial import MapBatchNorm2d, MapLayerNorm, MixConv2d

NORM_GAIN = 0.05


class ReAttention(_attention.PackedAttention):
    """Self-attention whose maps are mixed across heads and normalised (Zhou et al. 2021, arXiv 2103.11886).

    A drop-in for timm's Attention: `VisionTransformer(..., attn_layer=ReAttention)`; other options than the
    usual go in as a class, `attn_layer=ReAttention.with_options(norm="layer")`. Its parameter names are those
    of the official DeepViT code (`qkv`, `proj`, `reatten_matrix`, `var_norm`): its checkpoints load.

    Args:
        dim, num_heads, attn_head_dim, dim_out, qkv_bias, qk_norm, scale_norm, proj_bias, gated, attn_drop,
            proj_drop, norm_layer, device, dtype: as timm's Attention; attn_drop is for the reference only.
        qk_scale: the factor of the logits, positive; None is head_dim^-1/2.
        norm: of the mixed maps, "batch" (the paper), "layer" (over the heads) or "none".
        apply_transform: False gives plain attention, without mix and norm: DeepViT's first blocks.
        transform_scale: scale the output by the factor of the logits, as DeepViT-S does.
        mix_init: "identity" starts from the heads unmixed, I plus noise of 0.1 with zero bias, and small
            maps: norm weight 0.05. "conv" is the published initialisation: that of Conv2d and a norm weight
            of 1. That makes the branch many times stronger than plain attention, see below; deep small models
            trained better from the weak start.
        norm_gain: the initial norm weight, instead of that of mix_init.
        eps, momentum: of the norm; momentum None averages over all batches, as in BatchNorm2d.
        count_recomputed: whether a batch counts again in the running statistics of batch norm when gradient
            checkpointing computes it again, as it does with torch's own BatchNorm. False counts it once: a
            forward pass inside of a backward pass leaves the statistics alone.
        backend: of the operation, as `vitdiv_kernels.reattention`.

    Raises ValueError when num_heads does not divide dim, qk_scale is not positive, or an option has an
    unknown value.

    The operation reads the tensors of `reatten_matrix` and `var_norm` and never calls them. Their forward
    pre-hooks run, with None as input: weight_norm, spectral_norm, pruning and FSDP2 work; so do
    parametrizations, plain LoRA of peft, SyncBatchNorm (statistics of all processes) and frozen batch norm of
    torchvision and timm. Any other module there, a hook on an output or gradient, a quantised weight or LoRA
    with dropout raise TypeError at the first call; with backend="reference" the modules are called on the
    maps instead, which are then held. Hooks set for all modules at once (`register_module_forward_hook`) see
    neither of the two. torch.compile has a limit of its own: a hook set after the first compiled call never
    runs (torch 2.13).

    What batch norm does to attention maps, measured with torch 2.13.0 at the start of training, on tokens of
    variance 1 (N = 197, 6 and 12 heads, d = 32 and 64, qkv as Linear or timm starts it): a softmax entry is
    about 1/N = 0.005, and the variance of the mixed maps is 1e-7 to 5e-6, less than eps = 1e-5. So the norm
    does not make it 1: before the norm weight, the root mean square of the entries is 0.11 to 0.36 with
    "conv" and 0.23 to 0.57 with "identity". A smaller eps makes them larger, and is not the paper's model.

    The bias of `reatten_matrix` changes nothing in training with batch norm, and its gradient here is exactly
    0, unless the modules are called on the maps. In the published form it is rounding noise, up to 1e-4 in
    float32, and AdamW scales that up: the bias drifts, by 4e-3 in 100 steps at a learning rate of 1e-3, and
    the running mean lags behind it.

    Example:
        >>> attention = ReAttention(48, num_heads=4)
        >>> attention(torch.randn(2, 17, 48)).shape
        torch.Size([2, 17, 48])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        attn_head_dim: int | None = None,
        qk_scale: float | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        norm: Literal["none", "batch", "layer"] = "batch",
        apply_transform: bool = True,
        transform_scale: bool = False,
        mix_init: Literal["identity", "conv"] = "identity",
        norm_gain: float | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        count_recomputed: bool = True,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        self.apply_transform = apply_transform
        self.map_norm = norm
        self.count_recomputed = count_recomputed
        self.backend = backend
        self._add_input(
            dim, num_heads, attn_head_dim, qk_scale, qkv_bias, qk_norm, scale_norm, norm_layer, kind
        )
        self.out_scale = self.scale if transform_scale else 1.0
        self.attn_drop = nn.Dropout(attn_drop)
        if apply_transform:
            self.reatten_matrix = _mix_of_heads(mix_init, num_heads, kind)
            gain = (NORM_GAIN if mix_init == "identity" else 1.0) if norm_gain is None else norm_gain
            self.var_norm = _norm_over_heads(norm, num_heads, eps, momentum, gain, kind)
        self._add_output(dim_out, qkv_bias, scale_norm, proj_bias, gated, proj_drop, norm_layer, kind)

    def init_weights(self) -> None:
        """Gives the mix and the norm their initial values again.

        timm's models call it after they have given all Linear layers, and with "jax" all convolutions, their
        own.
        """
        if self.apply_transform:
            for module in (self.reatten_matrix, self.var_norm):
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, return_gram: bool = False
    ) -> Any:
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
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=self.scale)
        out = self._project(out, x)
        return (out, gram) if return_gram else out

    def _mixed_attention(self, q, k, v, return_gram):
        mix, mix_bias = effective.read_mix(self, "reatten_matrix")
        norm, training, put_back = effective.read_norm(self), self.training, False
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
            options["process_group"] = norm.process_group
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
            raise ValueError(
                "count_recomputed must be True where the reference backend calls var_norm on the maps"
            )
        dtype = torch.promote_types(q.dtype, torch.float32)
        maps = self.attn_drop((self.scale * q.to(dtype) @ k.to(dtype).mT).softmax(-1))
        mixed = self._called(self.reatten_matrix, maps)
        if self.map_norm == "layer":
            mixed = self._called(self.var_norm, mixed.movedim(1, -1)).movedim(-1, 1)
        else:
            mixed = self._called(self.var_norm, mixed)
        return (self.out_scale * (mixed.to(dtype) @ v.to(dtype))).to(q.dtype)

    def extra_repr(self) -> str:
        mix = f"norm={self.map_norm!r}, out_scale={self.out_scale:.4g}" if self.apply_transform else "no mix"
        return f"num_heads={self.num_heads}, {mix}, backend={self.backend!r}"


def _mix_of_heads(mix_init, num_heads, kind):
    _checks.one_of("mix_init", mix_init, ("identity", "conv"))
    if mix_init == "identity":
        return MixConv2d(num_heads, num_heads, 1, **kind).start_unmixed()
    return nn.Conv2d(num_heads, num_heads, 1, **kind)


def _norm_over_heads(norm, num_heads, eps, momentum, gain, kind):
    _checks.one_of("norm", norm, ("none", "batch", "layer"))
    if norm == "batch":
        if gain == 1:  # torch's own, which its fuse_modules knows
            return nn.BatchNorm2d(num_heads, eps, momentum, **kind)
        return MapBatchNorm2d(num_heads, eps, momentum, **kind).start_from(gain)
    if norm == "layer":
        return MapLayerNorm(num_heads, eps, **kind).start_from(gain)
    return nn.Identity()
