"""The operators `reattention_{fwd,bwd}` and `head_dots`, their autograd.Function; maths in README.md."""

import math

import torch

from .._autograd import once_differentiable
from .._checks import autocast_off, values_at_hand
from .._layout import accumulation_dtype, heads_like, nothing, when
from .._operators import define
from .fold import batch_norm_backward, batch_statistics, fold, fold_backward, variance_gradient

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, float scale, Tensor? pre_mix, Tensor? pre_bias, Tensor mix, Tensor? bias,"
    " bool centred, Tensor? norm_weight, Tensor? norm_bias, float eps"
)


def _fwd_fake(
    q, k, v, scale, pre_mix, pre_bias, mix, bias, centred, norm_weight, norm_bias, eps, needs_out, needs_gram
):  # fmt: skip
    gram_shape = (q.shape[0], q.shape[1], q.shape[1])
    return (
        heads_like(q) if needs_out else nothing(q),
        q.new_empty(gram_shape, dtype=accumulation_dtype(q)) if needs_gram else nothing(q),
    )


def _bwd_fake(
    dout, coupling, q, k, v, scale, pre_mix, pre_bias, mix, bias, centred, norm_weight, norm_bias, eps, needs
):  # fmt: skip
    heads, dtype = q.shape[1], accumulation_dtype(q)
    needs_dq, needs_dk, needs_dv, needs_dpre_mix, needs_dmix, needs_dnorm = needs

    def empty(need, *shape):
        return q.new_empty(shape, dtype=dtype) if need else nothing(q)

    return (
        heads_like(q) if needs_dq else nothing(q),
        heads_like(k) if needs_dk else nothing(q),
        heads_like(v) if needs_dv else nothing(q),
        empty(needs_dpre_mix, heads, heads),
        empty(needs_dmix, heads, heads),
        empty(needs_dmix, heads),
        empty(needs_dnorm, heads),
        empty(needs_dnorm, heads),
    )


def _head_dots_fake(x, y):
    return x.new_empty(x.shape[1], dtype=accumulation_dtype(x))


_fwd = define(
    "reattention_fwd",
    f"({_INPUTS}, bool needs_out, bool needs_gram) -> (Tensor out, Tensor gram)",
    _fwd_fake,
)
# needs: dq, dk, dv, dpre_mix, dmix (with dbias), dnorm (weight and bias)
_bwd = define(
    "reattention_bwd",
    f"(Tensor? dout, Tensor? coupling, {_INPUTS}, bool[] needs) -> (Tensor dq, Tensor dk, Tensor dv,"
    " Tensor dpre_mix, Tensor dmix, Tensor dbias, Tensor dnorm_weight, Tensor dnorm_bias)",
    _bwd_fake,
)
# [H]: sums over images and rows of x . y, both [B, H, N, d]
_head_dots = define("head_dots", "(Tensor x, Tensor y) -> Tensor", _head_dots_fake)


def _accumulation(tensor, dtype):
    if tensor is None or (tensor.dtype == dtype and tensor.is_contiguous()):
        return tensor
    return tensor.to(dtype).contiguous()


class ReattentionFunction(torch.autograd.Function):
    """Returns (out, gram or None, and in batch norm's training its mean and unbiased variance or None)."""

    @staticmethod
    def forward(
        ctx, q, k, v, mix, mix_bias, pre_mix, pre_bias, norm_weight, norm_bias, running_mean, running_var,
        norm, training, wants_statistics, eps, out_scale, scale, return_gram, process_group, backend,
    ):  # fmt: skip
        ctx.set_materialize_grads(False)
        differentiable = q, k, v, mix, mix_bias, pre_mix, pre_bias, norm_weight, norm_bias
        ctx.dtypes = [None if x is None else x.dtype for x in differentiable]
        dtype, queries, keys = accumulation_dtype(q), q.shape[2], k.shape[2]
        mix, mix_bias, pre_mix, pre_bias, norm_weight, norm_bias, mean, var = (
            _accumulation(x, dtype)
            for x in (mix, mix_bias, pre_mix, pre_bias, norm_weight, norm_bias, running_mean, running_var)
        )
        inputs = q, k, v, scale, pre_mix, pre_bias
        layer = None, None
        if norm == "layer":
            ones = q.new_ones(q.shape[1], dtype=dtype)
            layer = (
                out_scale * (ones if norm_weight is None else norm_weight),
                out_scale * (torch.zeros_like(ones) if norm_bias is None else norm_bias),
            )
        if norm == "batch" and training:
            out, scaled, gram, bias, statistics = _batch_norm_forward(
                inputs, mix, mix_bias, norm_weight, norm_bias, eps, out_scale, process_group,
                any(ctx.needs_input_grad), backend,
            )  # fmt: skip
            mean, var, unbiased, mixed_covariance, gain, ctx.count = statistics
            ctx.save_for_backward(
                q, k, v, pre_mix, pre_bias, gain, bias, None, None, mix, mix_bias, norm_weight, None, var,
                mixed_covariance, scaled,
            )  # fmt: skip
            if wants_statistics:
                ctx.mark_non_differentiable(mean, unbiased)
            else:
                mean = unbiased = None
        else:
            weight, bias = fold(mix, mix_bias, norm, norm_weight, norm_bias, mean, var, eps, out_scale)
            out, gram = _fwd[backend](*inputs, weight, bias, False, *layer, eps, True, return_gram)
            ctx.save_for_backward(
                q, k, v, pre_mix, pre_bias, weight, bias, *layer, mix, mix_bias, norm_weight, mean, var,
                None, None,
            )  # fmt: skip
            mean = unbiased = None
        ctx.options = norm, eps, out_scale, scale, process_group, backend
        return out, gram + queries / keys if return_gram else None, mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dgram, dmean, dunbiased):
        (
            q, k, v, pre_mix, pre_bias, weight, bias, layer_weight, layer_bias, mix, mix_bias, norm_weight,
            mean, var, mixed_covariance, scaled,
        ) = ctx.saved_tensors  # fmt: skip
        norm, eps, out_scale, scale, process_group, backend = ctx.options
        needs = ctx.needs_input_grad
        has_dout, from_batch = dout is not None, mixed_covariance is not None
        coupling = None if dgram is None else dgram + dgram.mT
        dvar = None
        if from_batch:  # what was saved is the gain
            weight = mix * weight.unsqueeze(1)
        # beside dmix, only the maps' gradient needs that of the variances
        if from_batch and has_dout and (needs[0] or needs[1] or needs[3] or needs[5]):
            with autocast_off(q):
                dvar, from_variance = variance_gradient(
                    _head_dots[backend](dout, scaled), var, mix, ctx.count, eps, process_group
                )
            coupling = from_variance if coupling is None else coupling + from_variance

        needs_affine = needs[3] or needs[4] or (norm == "batch" and (needs[7] or needs[8]))
        needs_layer = norm == "layer" and (needs[7] or needs[8])
        sums = needs[2] and has_dout, needs[5], needs_affine and has_dout, needs_layer and has_dout
        results = (None,) * 8
        if any((*needs[:2], *sums)) and (has_dout or coupling is not None):
            results = _bwd[backend](
                dout, coupling, q, k, v, scale, pre_mix, pre_bias, weight, bias, from_batch, layer_weight,
                layer_bias, eps, [*needs[:2], *sums],
            )  # fmt: skip
        dq, dk, dv, dpre_mix, dweight, dbias, dlayer_weight, dlayer_bias = results
        dmix = dmix_bias = dnorm_weight = dnorm_bias = None
        if sums[2] and from_batch:
            dmix, dnorm_weight = batch_norm_backward(
                dweight, mix, norm_weight, var, mixed_covariance, dvar, eps, out_scale
            )
            # a bias moves the mean and nothing else
            dmix_bias = torch.zeros_like(dbias) if needs[4] else None
            dnorm_bias = dbias if out_scale == 1 else dbias * out_scale
        elif sums[2]:
            dmix, dmix_bias, dnorm_weight, dnorm_bias = fold_backward(
                dweight, dbias, mix, mix_bias, norm, norm_weight, mean, var, eps, out_scale
            )
        if sums[3]:
            dnorm_weight, dnorm_bias = dlayer_weight * out_scale, dlayer_bias * out_scale
        # a constant added to a row of logits changes no softmax
        dpre_bias = torch.zeros_like(pre_bias) if needs[6] else None
        gradients = dq, dk, when(sums[0], dv), dmix, dmix_bias, dpre_mix, dpre_bias, dnorm_weight, dnorm_bias
        return *(
            gradient.to(dtype) if need and gradient is not None else None
            for need, gradient, dtype in zip(needs[:9], gradients, ctx.dtypes, strict=True)
        ), *(None,) * 11


def _batch_norm_forward(
    inputs, mix, mix_bias, norm_weight, norm_bias, eps, out_scale, process_group, keep_scaled, backend
):  # fmt: skip
    """One sweep makes the Gram matrix, hence the statistics, and the output but for gain and shift.

    Returns (out, out less its shift, centred gram, bias of the centred mix, statistics).
    """
    q, k, v = inputs[:3]
    # float16 cannot hold the unscaled output of nearly uniform maps: the statistics get a sweep of their own
    one_sweep = q.dtype != torch.float16
    out, gram = _fwd[backend](*inputs, mix, None, True, None, None, eps, one_sweep, True)
    statistics = batch_statistics(
        gram, mix, mix_bias, norm_weight, q.shape[2], k.shape[2], eps, out_scale, process_group
    )
    gain = statistics[4]
    if one_sweep:
        scaled = out.mul_(gain.view(-1, 1, 1))
    else:
        scaled, _ = _fwd[backend](*inputs, mix * gain.unsqueeze(1), None, True, None, None, eps, True, False)
    # centred maps are mixed, so that the mean of the batch is gone already
    if norm_bias is None:
        return scaled, scaled, gram, None, statistics
    bias = norm_bias if out_scale == 1 else norm_bias * out_scale
    shift = bias.view(-1, 1, 1) * v.sum(2, keepdim=True, dtype=bias.dtype)  # [B, H, 1, d]
    if values_at_hand(shift) and not math.isfinite(shift.sum()):
        # of an Inf in v both terms are infinite: their signs may differ, that of the sum is the mixed map's
        weight = mix * gain.unsqueeze(1)
        out, _ = _fwd[backend](*inputs, weight, bias, True, None, None, eps, True, False)
        return out, scaled, gram, bias, statistics
    if keep_scaled and scaled.dtype == shift.dtype:
        out = scaled + shift
    else:  # in place it is added in float32 and rounded once
        out = (scaled.clone() if keep_scaled else scaled).add_(shift)
    return out, scaled, gram, bias, statistics


def reattention(
    q, k, v, mix, *, mix_bias, pre_mix, pre_bias, norm, norm_weight, norm_bias, running_mean, running_var,
    training, momentum, eps, out_scale, scale, return_gram, process_group, backend,
):  # fmt: skip
    """(out, gram or None), as the public function says; updates the running statistics in place."""
    from_batch = norm == "batch" and training
    # an empty batch has no statistics to add, unless other processes have some
    updates = from_batch and running_mean is not None and (q.shape[0] > 0 or process_group is not None)
    given = (None, None) if from_batch else (running_mean, running_var)
    out, gram, mean, unbiased_var = ReattentionFunction.apply(
        q, k, v, mix, mix_bias, pre_mix, pre_bias, norm_weight, norm_bias, *given, norm, training, updates,
        eps, out_scale, scale, return_gram, process_group, backend,
    )  # fmt: skip
    if updates:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased_var.to(running_var.dtype), momentum)
    return out, gram
