"""The public function `reattention`."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .... import _checks, _dispatch
from ...._types import Backend
from . import operation, reference

NORMS = ("none", "batch", "layer")


@overload
def reattention(
    q: Tensor, k: Tensor, v: Tensor, mix: Tensor, *, mix_bias: Tensor | None = None,
    pre_mix: Tensor | None = None, pre_bias: Tensor | None = None,
    norm: Literal["none", "batch", "layer"] = "none", norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5, out_scale: float = 1.0,
    scale: float | None = None, dropout_p: float = 0.0, return_gram: Literal[False] = False,
    process_group: "torch.distributed.ProcessGroup | None" = None, backend: Backend = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def reattention(
    q: Tensor, k: Tensor, v: Tensor, mix: Tensor, *, mix_bias: Tensor | None = None,
    pre_mix: Tensor | None = None, pre_bias: Tensor | None = None,
    norm: Literal["none", "batch", "layer"] = "none", norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5, out_scale: float = 1.0,
    scale: float | None = None, dropout_p: float = 0.0, return_gram: Literal[True],
    process_group: "torch.distributed.ProcessGroup | None" = None, backend: Backend = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def reattention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mix: Tensor,
    *,
    mix_bias: Tensor | None = None,
    pre_mix: Tensor | None = None,
    pre_bias: Tensor | None = None,
    norm: Literal["none", "batch", "layer"] = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    out_scale: float = 1.0,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_gram: bool = False,
    process_group: "torch.distributed.ProcessGroup | None" = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention whose maps are mixed across heads, forward and backward without holding any N x M map.

    ```
    Z_h = scale q_h k_h^T
    L   = Z, or with pre_mix  L_g = sum_h pre_mix[g, h] Z_h + pre_bias[g]       (talking heads)
    A   = softmax(L)
    X_g = sum_h mix[g, h] A_h + mix_bias[g]
    Y   = X | batch norm over (image, query, key), per head | layer norm over heads, per (image, query, key)
    O_g = out_scale Y_g v_g
    ```

    Args:
        q, k, v: [B, H, N, d], [B, H, M, d], [B, H, M, d]. float16, bfloat16, float32 or float64, one dtype
            and device; any strides. triton reads them all in place, native those whose last one is 1 (views
            into a packed qkv projection). native takes at most 256 heads on CPUs, 32 on GPUs; triton 32.
        mix: [H, H], row = output head, column = input head (the orientation of Linear and Conv2d weights).
        mix_bias: [H].
        pre_mix, pre_bias: [H, H] and [H], the mix of the logits; pre_bias needs pre_mix.
        norm: "none", "batch" or "layer".
        norm_weight, norm_bias: [H], the affine part of the norm.
        running_mean, running_var: [H], both or neither, for "batch": updated in place in training, as
            torch.nn.functional.batch_norm does; used instead of the batch's statistics, and needed, in
            evaluation. Their dtype is float32 or that of q.
        training: batch norm uses the statistics of this batch; dropout is on.
        momentum, eps: of the norm.
        out_scale: a factor of the output (DeepViT's transform_scale).
        scale: the factor of the logits; None is d^-1/2.
        dropout_p: dropout of A, in training, before the mix; by the reference backend only.
        return_gram: return also the Gram matrix of the softmax maps A, `attention_gram(q, k)` when there is
            no pre_mix; with "batch" in training it costs nothing.
        process_group: batch norm in training takes its statistics over the batches of all processes of this
            torch.distributed group, as SyncBatchNorm does. Every backend supports it.
        backend: "auto", "reference", "native" or "triton". An explicit choice never falls back.

    Returns:
        The output [B, H, N, d] in the dtype of q; with return_gram the pair (output, gram [B, H, H] in
        float32, float64 for float64). Differentiable once in q, k, v, mix, pre_mix, the biases, norm_weight
        and norm_bias.

    The dtype of mix, pre_mix, the biases and norm_* is that of q, or float32 when q is float16 or bfloat16;
    accumulation is in float32 at least. Under autocast q, k and v are cast to autocast's dtype, as
    scaled_dot_product_attention does.

    Raises:
        TypeError: an argument that is not a floating tensor, or of another dtype than these.
        ValueError: shapes or devices that do not match, pre_bias without pre_mix, batch norm in evaluation
            without running statistics or in training on a single value per head, dropout on an explicit
            backend without it, an unknown norm or backend.
        RuntimeError: an explicit backend that is not here.

    Sources: Zhou et al. 2021 (arXiv 2103.11886), equation 3: `norm="batch"`. Talking heads, Shazeer et al.
    2020 (arXiv 2003.02436): pre_mix and mix. lucidrains' vit-pytorch DeepViT: `norm="layer"` with the
    transposed matrix.

    Example:
        >>> qkv = torch.randn(8, 197, 3, 6, 64)
        >>> q, k, v = qkv.permute(2, 0, 3, 1, 4)
        >>> mix = torch.eye(6, requires_grad=True)
        >>> reattention(q, k, v, mix, norm="batch", training=True).sum().backward()
    """
    if _checks.autocast_enabled(q):
        q, k, v = _checks.autocast_to(q, k, v)
    _checks.queries_and_keys(q, k)
    _checks.same_kind("v", v, "q", q)
    _checks.shaped("v", v, k.shape, because=", that of k")
    _parameter("mix", mix, q, 2)
    for name, value, rank in (("mix_bias", mix_bias, 1), ("pre_mix", pre_mix, 2), ("pre_bias", pre_bias, 1)):
        if value is not None:
            _parameter(name, value, q, rank)
    if pre_bias is not None and pre_mix is None:
        raise ValueError("pre_bias must be None when pre_mix is None: a constant does not change a softmax")
    _checks.one_of("norm", norm, NORMS)
    for name, value in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if value is not None:
            _parameter(name, value, q, 1)
    if norm == "batch":
        _batch_norm_arguments(q, k, running_mean, running_var, training, process_group)
    elif running_mean is not None or running_var is not None:
        raise ValueError(
            f'running_mean and running_var must be None unless norm is "batch", got norm {norm!r}'
        )
    if norm == "none" and (norm_weight is not None or norm_bias is not None):
        raise ValueError('norm_weight and norm_bias must be None when norm is "none"')
    momentum = _checks.number("momentum", momentum, at_least=0)
    eps = _checks.number("eps", eps, at_least=0)
    out_scale = _checks.number("out_scale", out_scale)
    dropout_p = _checks.number("dropout_p", dropout_p, at_least=0, at_most=1)
    scale = q.shape[3] ** -0.5 if scale is None else _checks.number("scale", scale)

    dropout = training and dropout_p > 0
    condition = _dispatch.MANY_HEADS if q.shape[1] > _dispatch.TRITON_HEADS else None
    condition = _dispatch.DROPOUT if dropout else condition
    backend = _dispatch.resolve("reattention", q.device, backend, condition)
    arguments = dict(
        mix_bias=mix_bias, pre_mix=pre_mix, pre_bias=pre_bias, norm=norm, norm_weight=norm_weight,
        norm_bias=norm_bias, running_mean=running_mean, running_var=running_var, training=training,
        momentum=momentum, eps=eps, out_scale=out_scale, scale=scale, return_gram=return_gram,
        process_group=process_group,
    )  # fmt: skip
    if backend == "reference":
        run: Any = reference.reattention
        arguments["dropout_p"] = dropout_p
    else:
        run = operation.reattention
        arguments["backend"] = backend
    with _checks.autocast_off(q):
        out, gram = run(q, k, v, mix, **arguments)
    return (out, gram) if return_gram else out


def _parameter(name, value, q, rank, always_float32=False):
    """A parameter [H] or [H, H], in the dtype of q or, for 16 bits or always, in float32."""
    _checks.floating_tensor(name, value)
    heads = q.shape[1]
    if value.shape != (heads,) * rank:
        expected = f"{_checks.sizes(*'HH'[:rank])} with H = {heads}"
        raise ValueError(f"{name} must have shape {expected}, got {_checks.shape_of(value)}")
    float32_too = always_float32 or q.dtype in _checks.LOW_PRECISION
    if value.dtype != q.dtype and not (float32_too and value.dtype == _checks.FLOATS[0]):
        expected = _checks.name_of(q.dtype) + (" or float32" if float32_too else "")
        raise TypeError(f"{name} must have the dtype of q, {expected}, got {_checks.name_of(value.dtype)}")
    _checks.same_device(name, value, "q", q)


def _batch_norm_arguments(q, k, running_mean, running_var, training, process_group):
    _checks.both_or_neither("running_mean", running_mean, "running_var", running_var)
    if running_mean is not None:
        for name, value in (("running_mean", running_mean), ("running_var", running_var)):
            _parameter(name, value, q, 1, always_float32=True)
    elif not training:
        raise ValueError('running_mean and running_var must be given for norm "batch" when training is False')
    if training and process_group is None and q.shape[0] * q.shape[2] * k.shape[2] == 1:
        raise ValueError("batch norm in training needs more than 1 value per head, got B = N = M = 1")
