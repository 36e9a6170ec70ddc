"""Everything of re-attention that is H x H: the kernels know one affine mix of the maps,

    Y_g = sum_h weight[g, h] A_h + bias[g],    or, centred, of A_h - 1/M,

then, for norm "layer", a layer norm over heads. `fold` turns mix, mix_bias, out_scale and batch norm in
evaluation into it, `fold_backward` takes the gradients back, and the operators `vitdiv::batch_norm_*` do both
for batch norm in training: on the CPU in C++ (csrc/batch_norm.h; a dozen small torch calls cost 60 us), else
by the functions here.
"""

import torch

from ...._checks import autocast_off
from ..._operators import define


def gain_of(norm_weight, var, eps, out_scale):
    """What batch norm and out_scale multiply a mixed map by: [H]."""
    gain = (var + eps).rsqrt()
    if norm_weight is not None:
        gain = gain * norm_weight
    return gain * out_scale


def _statistics(total, count, local, mix, mix_bias, norm_weight, keys, eps, out_scale):
    """Rows of a softmax sum to 1, so a map's mean is 1/M; the Gram matrix gives a mix's variance."""
    mean = mix.sum(1) / keys
    if mix_bias is not None:
        mean = mean + mix_bias
    var = (mix * (mix @ (total / count))).sum(1)
    gain = gain_of(norm_weight, var, eps, out_scale)
    return mean, var, var * count / (count - 1), mix @ (local / count), gain


def batch_norm_fwd(gram, mix, mix_bias, norm_weight, queries, keys, eps, out_scale):
    total, count = gram.sum(0), max(gram.shape[0] * queries * keys, 1)  # 1 for an empty batch
    return _statistics(total, count, total, mix, mix_bias, norm_weight, keys, eps, out_scale)


def batch_norm_coupling(dots, var, mix, count, eps):
    dvar = -0.5 * dots / (var + eps)
    return dvar, _coupling(dvar, mix, count)


def batch_norm_bwd(dweight, mix, norm_weight, var, mixed_covariance, dvar, eps, out_scale):
    rstd = (var + eps).rsqrt() * out_scale
    gain = rstd if norm_weight is None else rstd * norm_weight
    dmix = gain.unsqueeze(1) * dweight
    if dvar is not None:
        dmix = dmix + (2 * dvar).unsqueeze(1) * mixed_covariance
    return dmix, (dweight * mix).sum(1) * rstd


def _coupling(dvar, mix, count):
    return ((mix * dvar.unsqueeze(1)).t() @ mix * 2 / count).unsqueeze(0)


def batch_norm_gain_bwd(dgain, mix, norm_weight, var, mixed_covariance, count, eps, out_scale):
    rstd = (var + eps).rsqrt() * out_scale
    dnorm_weight = dgain * rstd
    dvar = -0.5 * (dnorm_weight if norm_weight is None else dnorm_weight * norm_weight) / (var + eps)
    with autocast_off(mix):
        return _coupling(dvar, mix, count) / 2, (2 * dvar).unsqueeze(1) * mixed_covariance, dnorm_weight


def _fwd_fake(gram, mix, mix_bias, norm_weight, queries, keys, eps, out_scale):
    def empty():
        return gram.new_empty(gram.shape[1])

    return empty(), empty(), empty(), gram.new_empty(gram.shape[1:]), empty()


def _setup(ctx, inputs, outputs):
    gram, mix, mix_bias, norm_weight, queries, keys, *ctx.options = inputs
    mean, var, unbiased_var, mixed_covariance, _ = outputs
    ctx.mark_non_differentiable(mean, var, unbiased_var, mixed_covariance)
    ctx.save_for_backward(mix, mix_bias, norm_weight, var, mixed_covariance)
    ctx.images, ctx.count = gram.shape[0], max(gram.shape[0] * queries * keys, 1)


def _backward(ctx, operator, needs, dmean, dvar, dunbiased, dcovariance, dgain):
    mix, mix_bias, norm_weight, var, mixed_covariance = ctx.saved_tensors
    dgram, dmix, dnorm_weight = operator("batch_norm_gain_bwd")(
        dgain, mix, norm_weight, var, mixed_covariance, ctx.count, *ctx.options
    )
    # a bias moves the mean and nothing else
    dmix_bias = torch.zeros_like(mix_bias) if needs[2] else None
    return dgram.expand(ctx.images, -1, -1), dmix, dmix_bias, dnorm_weight if needs[3] else None


def _flops(*shapes, **_):
    heads = max(shape[-1] for shape in shapes if isinstance(shape, torch.Size) and len(shape))
    return 2 * heads**3


# For all backends; where an operator has no kernel of its own it is the function above.
_batch_norm_fwd = define(
    "batch_norm_fwd",
    "(Tensor gram, Tensor mix, Tensor? mix_bias, Tensor? norm_weight, SymInt queries, SymInt keys, float eps,"
    " float out_scale)"
    " -> (Tensor mean, Tensor var, Tensor unbiased_var, Tensor mixed_covariance, Tensor gain)",
    _fwd_fake,
    plain=batch_norm_fwd,
    setup=_setup,
    backward=_backward,
    flops=_flops,
)
_batch_norm_coupling = define(
    "batch_norm_coupling",
    "(Tensor dots, Tensor var, Tensor mix, SymInt count, float eps) -> (Tensor dvar, Tensor coupling)",
    batch_norm_coupling,
    plain=batch_norm_coupling,
    flops=_flops,
)
_batch_norm_bwd = define(
    "batch_norm_bwd",
    "(Tensor dweight, Tensor mix, Tensor? norm_weight, Tensor var, Tensor mixed_covariance, Tensor? dvar,"
    " float eps, float out_scale) -> (Tensor dmix, Tensor dnorm_weight)",
    batch_norm_bwd,
    plain=batch_norm_bwd,
    flops=_flops,
)
_batch_norm_gain_bwd = define(
    "batch_norm_gain_bwd",
    "(Tensor dgain, Tensor mix, Tensor? norm_weight, Tensor var, Tensor mixed_covariance, SymInt count,"
    " float eps, float out_scale) -> (Tensor dgram, Tensor dmix, Tensor dnorm_weight)",
    batch_norm_gain_bwd,
    plain=batch_norm_gain_bwd,
    flops=_flops,
)


def differentiable_statistics(gram, mix, mix_bias, norm_weight, queries, keys, eps, out_scale):
    """Of the mixed maps (mean, unbiased var, `gain_of`), the last with a derivative."""
    results = _batch_norm_fwd["native"](gram, mix, mix_bias, norm_weight, queries, keys, eps, out_scale)
    mean, _, unbiased_var, _, gain = results
    return mean, unbiased_var, gain


def batch_statistics(gram, mix, mix_bias, norm_weight, queries, keys, eps, out_scale, process_group):
    """Of the mixed maps over (image, query, key): mean, var, unbiased var [H], the mix times the maps'
    covariance over this process's images [H, H], `gain_of`, and the number B N M over all processes."""
    if process_group is None:
        results = _batch_norm_fwd["native"](gram, mix, mix_bias, norm_weight, queries, keys, eps, out_scale)
        return *results, max(gram.shape[0] * queries * keys, 1)
    local = gram.sum(0)
    # filled on the device: a copy of a Python number would wait for it
    packed = torch.cat([local.flatten(), local.new_full((1,), gram.shape[0] * queries * keys)])
    torch.distributed.all_reduce(packed, group=process_group)
    total, count = packed[:-1].view_as(local), packed[-1]
    return *_statistics(total, count, local, mix, mix_bias, norm_weight, keys, eps, out_scale), count


def variance_gradient(dots, var, mix, count, eps, process_group):
    """dvar [H] of batch norm, and what it adds to dgram + its transpose [1, H, H].

    `dots[g]` sums, over the batch, dout_g times the part of out_g that the gain scales, gain times dgain: no
    sweep over the maps and no division by the gain.
    """
    if process_group is None:
        return _batch_norm_coupling["native"](dots, var, mix, count, eps)
    dvar = -0.5 * dots / (var + eps)
    torch.distributed.all_reduce(dvar, group=process_group)
    return dvar, _coupling(dvar, mix, count)


def batch_norm_backward(dweight, mix, norm_weight, var, mixed_covariance, dvar, eps, out_scale):
    """(dmix, dnorm_weight) from the gradient of gain times mix; dvar is None where dmix is not needed."""
    return _batch_norm_bwd["native"](dweight, mix, norm_weight, var, mixed_covariance, dvar, eps, out_scale)


def fold(mix, mix_bias, norm, norm_weight, norm_bias, mean, var, eps, out_scale):
    """(weight [H, H], bias [H] or None) of the affine mix; mean and var are running statistics."""
    if norm == "layer":
        return mix, mix_bias
    if norm == "batch":
        gain = gain_of(norm_weight, var, eps, 1)
        mix_bias = (-mean if mix_bias is None else mix_bias - mean) * gain
        mix = mix * gain.unsqueeze(1)
        if norm_bias is not None:
            mix_bias = mix_bias + norm_bias
    if out_scale == 1:
        return mix, mix_bias
    return mix * out_scale, None if mix_bias is None else mix_bias * out_scale


def fold_backward(dweight, dbias, mix, mix_bias, norm, norm_weight, mean, var, eps, out_scale):
    """(dmix, dmix_bias, dnorm_weight, dnorm_bias) from the gradients of the affine mix of `fold`."""
    if norm == "layer":
        return dweight, dbias, None, None
    if out_scale != 1:
        dweight, dbias = dweight * out_scale, dbias * out_scale
    if norm == "none":
        return dweight, dbias, None, None
    rstd = (var + eps).rsqrt()
    gain = rstd if norm_weight is None else rstd * norm_weight
    dgain = (dweight * mix).sum(1) + dbias * (-mean if mix_bias is None else mix_bias - mean)
    return gain.unsqueeze(1) * dweight, gain * dbias, dgain * rstd, dbias
