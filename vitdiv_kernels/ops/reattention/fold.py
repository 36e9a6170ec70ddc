"""Everything of re-attention that is H x H: the kernels know one affine mix of the maps,

    Y_g = sum_h weight[g, h] A_h + bias[g],    or, centred, of A_h - 1/M,

then, for norm "layer", a layer norm over heads; `fold` turns mix, mix_bias, out_scale and batch norm into
it, and `fold_backward` takes the gradients back.
"""

from typing import NamedTuple

import torch


class Statistics(NamedTuple):
    """Of batch norm in training: of the mixed maps over (image, query, key), and what they were made from."""

    var: torch.Tensor  # [H], biased
    mixed_covariance: torch.Tensor  # [H, H], mix times the maps' covariance over this process's images
    count: torch.Tensor | int  # B N M, over all processes


def batch_statistics(mix, centered_gram, queries, keys, process_group):
    """Rows of a softmax sum to 1, so a map's mean is 1/M; the Gram matrix gives a mix's variance."""
    total = centered_gram.sum(0)
    count = centered_gram.shape[0] * queries * keys
    if process_group is None:
        count = max(count, 1)  # an empty batch
        mixed_covariance = mix @ (total / count)
        return Statistics((mix * mixed_covariance).sum(1), mixed_covariance, count)
    packed = torch.cat([total.flatten(), total.new_tensor([count])])
    torch.distributed.all_reduce(packed, group=process_group)
    count = packed[-1]
    var = (mix * (mix @ (packed[:-1].view_as(total) / count))).sum(1)
    return Statistics(var, mix @ (total / count), count)


def batch_mean(mix, mix_bias, keys):
    mean = mix.sum(1) / keys
    return mean if mix_bias is None else mean + mix_bias


def fold(mix, mix_bias, norm, norm_weight, norm_bias, mean, var, eps, out_scale):
    """(weight [H, H], bias [H] or None) of the affine mix; mean and var are running statistics."""
    if norm == "layer":
        return mix, mix_bias
    if norm == "batch":
        gain = (var + eps).rsqrt()
        if norm_weight is not None:
            gain = gain * norm_weight
        mix_bias = (-mean if mix_bias is None else mix_bias - mean) * gain
        mix = mix * gain.unsqueeze(1)
        if norm_bias is not None:
            mix_bias = mix_bias + norm_bias
    if out_scale == 1:
        return mix, mix_bias
    return mix * out_scale, None if mix_bias is None else mix_bias * out_scale


def gain_of(norm_weight, var, eps, out_scale):
    """What batch norm and out_scale multiply a mixed map by: [H]."""
    gain = (var + eps).rsqrt()
    if norm_weight is not None:
        gain = gain * norm_weight
    return gain if out_scale == 1 else gain * out_scale


def variance_gradient(dots, var, eps, process_group):
    """dvar [H] of batch norm, without a sweep over the maps or a division by the gain.

    `dots[g]` sums, over the batch, dout_g times the part of out_g that the gain scales: gain times dgain.
    """
    dvar = -0.5 * dots / (var + eps)
    if process_group is not None:
        torch.distributed.all_reduce(dvar, group=process_group)
    return dvar


def variance_coupling(dvar, mix, count):
    """What the gradient of the variances adds to dgram + its transpose: [1, H, H]."""
    return ((mix * dvar.unsqueeze(1)).t() @ mix * 2 / count).unsqueeze(0)


def fold_backward(
    dweight, dbias, mix, mix_bias, norm, norm_weight, mean, var, mixed_covariance, dvar, eps, out_scale
):
    """(dmix, dmix_bias, dnorm_weight, dnorm_bias) from the gradients of the affine mix.

    mixed_covariance is given when batch norm took the batch's own statistics, and dvar when dmix is needed.
    """
    if norm == "layer":
        return dweight, dbias, None, None
    if out_scale != 1:
        dweight, dbias = dweight * out_scale, dbias * out_scale
    if norm == "none":
        return dweight, dbias, None, None
    rstd = (var + eps).rsqrt()
    gain = rstd if norm_weight is None else rstd * norm_weight
    dgain = (dweight * mix).sum(1)
    if mixed_covariance is not None:
        dmix = gain.unsqueeze(1) * dweight
        if dvar is not None:
            dmix = dmix + (2 * dvar).unsqueeze(1) * mixed_covariance
        return dmix, torch.zeros_like(dbias), dgain * rstd, dbias
    dgain = dgain + dbias * (-mean if mix_bias is None else mix_bias - mean)
    return gain.unsqueeze(1) * dweight, gain * dbias, dgain * rstd, dbias
