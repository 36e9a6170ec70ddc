"""Everything of re-attention that is H x H: the kernels know one affine mix of the maps,

    Y_g = sum_h folded_mix[g, h] A_h + folded_bias[g],    or, centred, of A_h - 1/M,

then, for norm "layer", a layer norm over heads. `fold` turns mix, mix_bias, out_scale and batch norm in
evaluation into it, `fold_backward` takes the gradients back, and the operators `vitdiv::batch_norm_*` do both
for batch norm in training. Their specification are the functions here; on the CPU they run in C++
(csrc/batch_norm.h; a dozen small torch calls cost 60 us), and a test compares the two.
"""

from typing import NamedTuple

import torch

from ...._checks import autocast_off
from ..._operators import define


class Statistics(NamedTuple):
    """Of the mixed maps over (image, query, key)."""

    mean: torch.Tensor  # [H]
    var: torch.Tensor  # [H]
    unbiased_var: torch.Tensor  # [H]
    mixed_covariance: torch.Tensor  # [H, H], the mix times the maps' covariance over this process's images
    gain: torch.Tensor  # [H], see `gain_of`
    count: int | torch.Tensor  # type: ignore[assignment]  # B N M, over all processes


def gain_of(norm_weight, var, eps, out_scale):
    """What batch norm and out_scale multiply a mixed map by, [H]: with norm_weight, and without."""
    rstd = (var + eps).rsqrt() * out_scale
    return rstd if norm_weight is None else rstd * norm_weight, rstd


def _count(gram, queries, keys):
    return max(gram.shape[0] * queries * keys, 1)  # 1 for an empty batch


def _statistics(total, count, local, mix, mix_bias, norm_weight, keys, eps, out_scale):
    """Rows of a softmax sum to 1, so a map's mean is 1/M; the Gram matrix gives a mix's variance."""
    mean = mix.sum(1) / keys
    if mix_bias is not None:
        mean = mean + mix_bias
    var = (mix * (mix @ (total / count))).sum(1)
    gain, _ = gain_of(norm_weight, var, eps, out_scale)
    return mean, var, var * count / (count - 1), mix @ (local / count), gain


def batch_norm_fwd(gram, mix, mix_bias, norm_weight, queries, keys, eps, out_scale):
    total, count = gram.sum(0), _count(gram, queries, keys)
    return _statistics(total, count, total, mix, mix_bias, norm_weight, keys, eps, out_scale)


def batch_norm_coupling(head_dots, var, mix, count, eps):
    dvar = -0.5 * head_dots / (var + eps)
    return dvar, _coupling(dvar, mix, count)


def _coupling(dvar, mix, count):
    return ((mix * dvar.unsqueeze(1)).t() @ mix * 2 / count).unsqueeze(0)


def batch_norm_bwd(dweight, mix, norm_weight, var, mixed_covariance, dvar, eps, out_scale):
    gain, rstd = gain_of(norm_weight, var, eps, out_scale)
    dmix = gain.unsqueeze(1) * dweight
    if dvar is not None:
        dmix = dmix + (2 * dvar).unsqueeze(1) * mixed_covariance
    return dmix, (dweight * mix).sum(1) * rstd


def batch_norm_gain_bwd(dgain, mix, norm_weight, var, mixed_covariance, count, eps, out_scale):
    gain, rstd = gain_of(norm_weight, var, eps, out_scale)
    with autocast_off(mix):
        dvar, coupling = batch_norm_coupling(dgain * gain, var, mix, count, eps)
        return coupling.squeeze(0) / 2, (2 * dvar).unsqueeze(1) * mixed_covariance, dgain * rstd


def _fwd_fake(gram, mix, mix_bias, norm_weight, queries, keys, eps, out_scale):
    def empty():
        return gram.new_empty(gram.shape[1])

    return empty(), empty(), empty(), gram.new_empty(gram.shape[1:]), empty()


def _setup(ctx, inputs, outputs):
    gram, mix, mix_bias, norm_weight, queries, keys, *ctx.options = inputs
    mean, var, unbiased_var, mixed_covariance, _ = outputs
    ctx.mark_non_differentiable(mean, var, unbiased_var, mixed_covariance)
    ctx.save_for_backward(mix, mix_bias, norm_weight, var, mixed_covariance)
    ctx.images, ctx.count = gram.shape[0], _count(gram, queries, keys)


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


def batch_statistics(gram, mix, mix_bias, norm_weight, queries, keys, eps, out_scale, process_group):
    """The `Statistics` from the maps' centred Gram matrices [B, H, H]. Only the gain has a derivative, and
    that without a process group."""
    if process_group is None:
        results = _batch_norm_fwd["native"](gram, mix, mix_bias, norm_weight, queries, keys, eps, out_scale)
        return Statistics(*results, _count(gram, queries, keys))
    local = gram.sum(0)
    # filled on the device: a copy of a Python number would wait for it
    packed = torch.cat([local.flatten(), local.new_full((1,), gram.shape[0] * queries * keys)])
    torch.distributed.all_reduce(packed, group=process_group)
    total, count = packed[:-1].view_as(local), packed[-1]
    results = _statistics(total, count, local, mix, mix_bias, norm_weight, keys, eps, out_scale)
    return Statistics(*results, count)


def variance_gradient(head_dots, var, mix, count, eps, process_group):
    """dvar [H] of batch norm, and what it adds to dgram + its transpose [1, H, H].

    `head_dots[g]` sums, over the batch, dout_g times the part of out_g that the gain scales, gain times
    dgain: no sweep over the maps and no division by the gain.
    """
    if process_group is None:
        return _batch_norm_coupling["native"](head_dots, var, mix, count, eps)
    dvar = -0.5 * head_dots / (var + eps)
    torch.distributed.all_reduce(dvar, group=process_group)
    return dvar, _coupling(dvar, mix, count)


def batch_norm_backward(dfolded_mix, mix, norm_weight, var, mixed_covariance, dvar, eps, out_scale):
    """(dmix, dnorm_weight) from the gradient of gain times mix; dvar is None where dmix is not needed."""
    return _batch_norm_bwd["native"](
        dfolded_mix, mix, norm_weight, var, mixed_covariance, dvar, eps, out_scale
    )


def fold(mix, mix_bias, norm, norm_weight, norm_bias, mean, var, eps, out_scale):
    """(folded_mix [H, H], folded_bias [H] or None); mean and var are running statistics."""
    if norm == "layer":
        return mix, mix_bias
    if norm == "batch":
        gain, _ = gain_of(norm_weight, var, eps, 1)
        mix_bias = (-mean if mix_bias is None else mix_bias - mean) * gain
        mix = mix * gain.unsqueeze(1)
        if norm_bias is not None:
            mix_bias = mix_bias + norm_bias
    if out_scale == 1:
        return mix, mix_bias
    return mix * out_scale, None if mix_bias is None else mix_bias * out_scale


def fold_backward(dfolded_mix, dfolded_bias, mix, mix_bias, norm, norm_weight, mean, var, eps, out_scale):
    """(dmix, dmix_bias, dnorm_weight, dnorm_bias) from the gradients of the affine mix of `fold`."""
    if norm == "layer":
        return dfolded_mix, dfolded_bias, None, None
    if out_scale != 1:
        dfolded_mix, dfolded_bias = dfolded_mix * out_scale, dfolded_bias * out_scale
    if norm == "none":
        return dfolded_mix, dfolded_bias, None, None
    gain, rstd = gain_of(norm_weight, var, eps, 1)
    dgain = (dfolded_mix * mix).sum(1) + dfolded_bias * (-mean if mix_bias is None else mix_bias - mean)
    return gain.unsqueeze(1) * dfolded_mix, gain * dfolded_bias, dgain * rstd, dfolded_bias
