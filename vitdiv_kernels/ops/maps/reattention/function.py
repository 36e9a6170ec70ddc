"""The operators `reattention_{fwd,bwd}` and `head_dots`, and re-attention made of them, as an
autograd.Function and as a chain of operators; maths in README.md."""

import math

import torch

from ...._autograd import once_differentiable, refuse_forward_mode, transformed
from ...._checks import autocast_off, values_at_hand
from ...._exporting import exporting
from ...._layout import accumulation_dtype, heads_like, nothing, when
from ... import _flops
from ..._operators import define
from ..._sharding import BATCH, SUM, WHOLE, batch_where, by_items
from ..._vmap import JOIN
from .fold import (
    batch_norm_backward,
    batch_statistics,
    differentiable_statistics,
    fold,
    fold_backward,
    variance_gradient,
)

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


def _setup(ctx, inputs, outputs):
    q, k, v, scale, pre_mix, pre_bias, mix, bias, centred, norm_weight, norm_bias, eps, *_ = inputs
    ctx.save_for_backward(q, k, v, pre_mix, pre_bias, mix, bias, norm_weight, norm_bias)
    ctx.options = scale, centred, eps


def _backward(ctx, operator, needs, dout, dgram):
    q, k, v, pre_mix, pre_bias, mix, bias, norm_weight, norm_bias = ctx.saved_tensors
    scale, centred, eps = ctx.options
    has_dout = dout is not None
    wanted = [
        needs[0], needs[1], needs[2] and has_dout, needs[4], (needs[6] or needs[7]) and has_dout,
        (needs[9] or needs[10]) and has_dout,
    ]  # fmt: skip
    found = (None,) * 8
    if any(wanted):
        found = operator("reattention_bwd")(
            dout, None if dgram is None else dgram + dgram.mT, q, k, v, scale, pre_mix, pre_bias, mix, bias,
            centred, norm_weight, norm_bias, eps, wanted,
        )  # fmt: skip
    dq, dk, dv, dpre_mix, dmix, dbias, dnorm_weight, dnorm_bias = found
    # a constant added to a row of logits changes no softmax
    dpre_bias = torch.zeros_like(pre_bias) if needs[5] else None
    return (
        when(wanted[0], dq), when(wanted[1], dk), when(wanted[2], dv), None, when(wanted[3], dpre_mix),
        dpre_bias, when(needs[6] and wanted[4], dmix), when(needs[7] and wanted[4], dbias), None,
        when(needs[9] and wanted[5], dnorm_weight), when(needs[10] and wanted[5], dnorm_bias),
    )  # fmt: skip


def _fwd_folds(inputs, dims):
    if any(dims[i] is not None for i in (4, 5, 6, 7, 9, 10)):
        return None  # each item has parameters of its own
    needs_out, needs_gram = inputs[-2:]
    return (JOIN, JOIN, JOIN, *(None,) * 11), (when(needs_out, JOIN), when(needs_gram, JOIN))


def _bwd_folds(inputs, dims):
    needs, coupling = inputs[-1], inputs[1]
    if any(dims[i] is not None for i in (6, 7, 8, 9, 11, 12)) or any(needs[3:]):
        return None  # gradients of parameters are sums over the images of each item
    into = JOIN
    if coupling is not None and coupling.shape[0] == 1 and dims[1] is None:
        into = None  # one for all images
    return (JOIN, into, JOIN, JOIN, JOIN, *(None,) * 10), (
        *(when(need, JOIN) for need in needs[:3]),
        *(None,) * 5,
    )


def _fwd_shards(inputs):
    if not by_items(inputs[0]):
        return None
    out, gram = map(batch_where, inputs[-2:])
    return (BATCH,) * 3 + (WHOLE,) * 11, (out, gram)


def _bwd_shards(inputs):
    if not by_items(inputs[2]):
        return None
    coupling, q, needs = inputs[1], inputs[2], inputs[-1]
    for_all = coupling is not None and coupling.shape[0] == 1 != q.shape[0]
    into = (BATCH, WHOLE if for_all else BATCH, *(BATCH,) * 3, *(WHOLE,) * 10)
    dq, dk, dv = map(batch_where, needs[:3])
    dpre_mix, dmix, dnorm = (SUM if needed else WHOLE for needed in needs[3:])
    return into, (dq, dk, dv, dpre_mix, dmix, dmix, dnorm, dnorm)


def _dots_shards(inputs):
    if not by_items(inputs[0]):
        return None
    return (BATCH, BATCH), (SUM,)


def _fwd_flops(
    q, k, v, scale, pre_mix, pre_bias, mix, bias, centred, nw, nb, eps, needs_out, needs_gram, **_
):
    mixes = (pre_mix is not None) + needs_out + needs_gram
    return (1 + needs_out) * _flops.maps(q, k) + mixes * _flops.mixed(q, k)


def _bwd_flops(
    dout, coupling, q, k, v, scale, pre_mix, pre_bias, mix, bias, centred, nw, nb, eps, needs, **_
):
    dq, dk, dv, dpre_mix, dmix, dnorm = needs
    of_maps = dq or dk or dpre_mix
    of_out = dout is not None and (of_maps or dmix or dnorm)
    products = 1 + of_out + dq + dk + dv  # the logits again, dY, and one a gradient
    # the maps mixed again, dY mixed back, the coupling, and what mixes the logits, forward and back
    mixes = (dv or dnorm) + (of_out and of_maps) + (coupling is not None) + dmix + dpre_mix
    mixes += (pre_mix is not None) * (1 + (dq or dk))
    return products * _flops.maps(q, k) + mixes * _flops.mixed(q, k)


def _dots_flops(x, y, **_):
    return _flops.closed(x)


_fwd = define(
    "reattention_fwd",
    f"({_INPUTS}, bool needs_out, bool needs_gram) -> (Tensor out, Tensor gram)",
    _fwd_fake,
    setup=_setup,
    backward=_backward,
    folds=_fwd_folds,
    shards=_fwd_shards,
    flops=_fwd_flops,
)
# needs: dq, dk, dv, dpre_mix, dmix (with dbias), dnorm (weight and bias)
_bwd = define(
    "reattention_bwd",
    f"(Tensor? dout, Tensor? coupling, {_INPUTS}, bool[] needs) -> (Tensor dq, Tensor dk, Tensor dv,"
    " Tensor dpre_mix, Tensor dmix, Tensor dbias, Tensor dnorm_weight, Tensor dnorm_bias)",
    _bwd_fake,
    folds=_bwd_folds,
    shards=_bwd_shards,
    flops=_bwd_flops,
)
# [H]: sums over images and rows of x . y, both [B, H, N, d]
_head_dots = define(
    "head_dots", "(Tensor x, Tensor y) -> Tensor", _head_dots_fake, shards=_dots_shards, flops=_dots_flops
)


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
            layer = _layer_parameters(norm_weight, norm_bias, q, out_scale)
        if norm == "batch" and training:
            out, kept, gram, bias, statistics = _batch_norm_forward(
                inputs, mix, mix_bias, norm_weight, norm_bias, eps, out_scale, process_group, backend,
            )  # fmt: skip
            mean, var, unbiased, mixed_covariance, gain, ctx.count = statistics
            ctx.kept_is_scaled = kept is out or q.dtype == torch.float16
            ctx.save_for_backward(
                q, k, v, pre_mix, pre_bias, gain, bias, None, None, mix, mix_bias, norm_weight, None, var,
                mixed_covariance, kept,
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
            mean, var, mixed_covariance, kept,
        ) = ctx.saved_tensors  # fmt: skip
        norm, eps, out_scale, scale, process_group, backend = ctx.options
        needs = ctx.needs_input_grad
        has_dout, from_batch = dout is not None, mixed_covariance is not None
        coupling = None if dgram is None else dgram + dgram.mT
        dvar = None
        if from_batch:
            gain, weight = weight, mix * weight.unsqueeze(1)
        # beside dmix, only the maps' gradient needs that of the variances
        if from_batch and has_dout and (needs[0] or needs[1] or needs[3] or needs[5]):
            with autocast_off(q):
                dots = _head_dots[backend](dout, kept)
                dvar, from_variance = variance_gradient(
                    dots if ctx.kept_is_scaled else dots * gain, var, mix, ctx.count, eps, process_group
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
    inputs, mix, mix_bias, norm_weight, norm_bias, eps, out_scale, process_group, backend
):  # fmt: skip
    """One sweep makes the Gram matrix, hence the statistics, and the output but for gain and shift.

    Returns (out, what of it the gain scales, centred gram, bias of the centred mix, statistics). The second
    is the output before the gain; in float16, and where there is no shift, after it.
    """
    q, k, v = inputs[:3]
    # float16 cannot hold the unscaled output of nearly uniform maps: the statistics get a sweep of their own
    one_sweep = q.dtype != torch.float16
    out, gram = _fwd[backend](*inputs, mix, None, True, None, None, eps, one_sweep, True)
    statistics = batch_statistics(
        gram, mix, mix_bias, norm_weight, q.shape[2], k.shape[2], eps, out_scale, process_group
    )
    gain = statistics[4]
    if not one_sweep:
        out, _ = _fwd[backend](*inputs, mix * gain.unsqueeze(1), None, True, None, None, eps, True, False)
    # centred maps are mixed, so that the mean of the batch is gone already
    if norm_bias is None:
        out = _scaled_and_shifted(out, gain, None) if one_sweep else out
        return out, out, gram, None, statistics
    bias = norm_bias if out_scale == 1 else norm_bias * out_scale
    shift = bias.view(-1, 1, 1) * v.sum(2, keepdim=True, dtype=bias.dtype)  # [B, H, 1, d]
    if values_at_hand(shift) and not math.isfinite(shift.sum()):
        # of an Inf in v both terms are infinite: their signs may differ, that of the sum is the mixed map's
        weight = mix * gain.unsqueeze(1)
        whole, _ = _fwd[backend](*inputs, weight, bias, True, None, None, eps, True, False)
        return whole, out, gram, bias, statistics
    return _scaled_and_shifted(out, gain if one_sweep else None, shift), out, gram, bias, statistics


def _scaled_and_shifted(out, gain, shift):
    """out [B, H, N, d] times gain [H] plus shift [B, H, 1, d], rounded once."""
    if gain is None:
        whole = out + shift
    elif shift is None:
        whole = out * gain.view(-1, 1, 1)
    else:
        whole = torch.addcmul(shift, out, gain.view(-1, 1, 1))
    return whole.to(out.dtype)


def _composed(
    q, k, v, mix, mix_bias, pre_mix, pre_bias, norm_weight, norm_bias, running_mean, running_var, norm,
    training, wants_statistics, eps, out_scale, scale, return_gram, process_group, backend,
):  # fmt: skip
    """As `ReattentionFunction`, as a chain of operators with derivatives: what an exported program keeps and
    torch.func transforms. It makes two passes over dout more."""
    dtype = accumulation_dtype(q)
    mix, mix_bias, pre_mix, pre_bias, norm_weight, norm_bias, mean, var = (
        _accumulation(x, dtype)
        for x in (mix, mix_bias, pre_mix, pre_bias, norm_weight, norm_bias, running_mean, running_var)
    )
    inputs = q, k, v, scale, pre_mix, pre_bias
    unbiased = None
    if norm == "batch" and training:
        one_sweep = q.dtype != torch.float16  # as in _batch_norm_forward
        out, gram = _fwd[backend](*inputs, mix, None, True, None, None, eps, one_sweep, True)
        mean, unbiased, gain = differentiable_statistics(
            gram, mix, mix_bias, norm_weight, q.shape[2], k.shape[2], eps, out_scale
        )
        if not one_sweep:
            out, _ = _fwd[backend](*inputs, mix * gain.unsqueeze(1), None, True, None, None, eps, True, False)
        shift = None
        if norm_bias is not None:
            bias = norm_bias if out_scale == 1 else norm_bias * out_scale
            shift = bias.view(-1, 1, 1) * v.sum(2, keepdim=True, dtype=bias.dtype)
        if one_sweep or shift is not None:
            out = _scaled_and_shifted(out, gain if one_sweep else None, shift)
    else:
        layer = None, None
        if norm == "layer":
            layer = _layer_parameters(norm_weight, norm_bias, q, out_scale)
        weight, bias = fold(mix, mix_bias, norm, norm_weight, norm_bias, mean, var, eps, out_scale)
        out, gram = _fwd[backend](*inputs, weight, bias, False, *layer, eps, True, return_gram)
        mean = None
    return out, gram + q.shape[2] / k.shape[2] if return_gram else None, mean, unbiased


def _layer_parameters(norm_weight, norm_bias, q, out_scale):
    ones = q.new_ones(q.shape[1], dtype=accumulation_dtype(q))
    return (
        out_scale * (ones if norm_weight is None else norm_weight),
        out_scale * (torch.zeros_like(ones) if norm_bias is None else norm_bias),
    )


def reattention(
    q, k, v, mix, *, mix_bias, pre_mix, pre_bias, norm, norm_weight, norm_bias, running_mean, running_var,
    training, momentum, eps, out_scale, scale, return_gram, process_group, backend,
):  # fmt: skip
    """(out, gram or None), as the public function says; updates the running statistics in place."""
    from_batch = norm == "batch" and training
    # an empty batch has no statistics to add, unless other processes have some
    updates = from_batch and running_mean is not None and (q.shape[0] > 0 or process_group is not None)
    given = (None, None) if from_batch else (running_mean, running_var)
    apply = ReattentionFunction.apply
    if exporting() or transformed():
        if process_group is not None:
            raise RuntimeError(
                "batch norm of several processes (SyncBatchNorm) can't be exported, nor be transformed by "
                "torch.func"
            )
        apply = _composed
    elif not torch.compiler.is_compiling():
        refuse_forward_mode(q, k, v, mix, mix_bias, pre_mix, pre_bias, norm_weight, norm_bias)
    out, gram, mean, unbiased_var = apply(
        q, k, v, mix, mix_bias, pre_mix, pre_bias, norm_weight, norm_bias, *given, norm, training, updates,
        eps, out_scale, scale, return_gram, process_group, backend,
    )  # fmt: skip
    if updates:
        # detached, as dynamo does not see that they have no gradient; a no_grad block could not be exported
        running_mean.lerp_(mean.detach().to(running_mean.dtype), momentum)
        running_var.lerp_(unbiased_var.detach().to(running_var.dtype), momentum)
    return out, gram
