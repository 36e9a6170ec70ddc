"""Everything of re-attention that is H x H: the kernels know one affine mix of the maps,

    Y_g = sum_h weight[g, h] A_h + bias[g],    or, centred, of A_h - 1/M,

then, for norm "layer", a layer norm over heads; `fold` turns mix, mix_bias, out_scale and batch norm into it, and
`fold_backward` takes the gradients back. Products are written as sums: autocast leaves those in their dtype.
"""

from typing import NamedTuple

import torch


class Statistics(NamedTuple):
    """Of batch norm in training: of the mixed maps over (image, query, key), and what they were made from."""

    mean: torch.Tensor  # [H]
    var: torch.Tensor  # [H], biased
    covariance: torch.Tensor  # [H, H], sum over this process's images of the centred Gram / count
    count: torch.Tensor | int  # B N M, over all processes


def _times(left, right):
    return (left.unsqueeze(2) * right.unsqueeze(0)).sum(1)


def batch_statistics(mix, mix_bias, centered_gram, queries, keys, process_group):
    """Rows of a softmax sum to 1, so the mean of a map is 1/M, and the variance of a mix is that of its Gram matrix."""
    total = centered_gram.sum(0)
    count = centered_gram.shape[0] * queries * keys
    covariance = total / count if process_group is None else None
    if process_group is not None:
        packed = torch.cat([total.flatten(), total.new_tensor([count])])
        torch.distributed.all_reduce(packed, group=process_group)
        count = packed[-1]
        covariance = total / count
        total = packed[:-1].view_as(total)
    var = (mix * _times(mix, total / count)).sum(1)
    mean = mix.sum(1) / keys
    return Statistics(mean if mix_bias is None else mean + mix_bias, var, covariance, count)


def fold(mix, mix_bias, norm, norm_weight, norm_bias, mean, var, eps, out_scale):
    """(weight [H, H], bias [H] or None) of the affine mix; mean and var are the running statistics of norm "batch"."""
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


def fold_batch(mix, norm_weight, norm_bias, var, eps, out_scale):
    """(gain [H], bias [H]) with batch statistics, whose mean is the mixed maps' own, exactly: the affine mix is then
    gain[g] mix[g, h] and norm_bias."""
    gain = (var + eps).rsqrt()
    if norm_weight is not None:
        gain = gain * norm_weight
    bias = torch.zeros_like(var) if norm_bias is None else norm_bias
    return (gain, bias) if out_scale == 1 else (gain * out_scale, bias * out_scale)


def variance_gradient(aligned, var, eps, process_group):
    """dvar [H] of batch norm. `aligned[g]` is the sum over the batch of dout_g times the part of out_g that the gain
    scales, so gain times its gradient: a variance needs no sweep over the maps, nor a division by the gain."""
    dvar = -0.5 * aligned / (var + eps)
    if process_group is not None:
        torch.distributed.all_reduce(dvar, group=process_group)
    return dvar


def variance_coupling(dvar, mix, count):
    """What the gradient of the variances adds to dgram + its transpose: [1, H, H]."""
    return (2 * _times((dvar.unsqueeze(1) * mix).t(), mix) / count).unsqueeze(0)


def fold_backward(dweight, dbias, mix, mix_bias, norm, norm_weight, mean, var, covariance, dvar, eps, out_scale):
    """(dmix, dmix_bias, dnorm_weight, dnorm_bias) from the gradients of the affine mix; covariance and dvar are given
    when batch norm took the batch's own statistics."""
    if norm == "layer":
        return dweight, dbias, None, None
    if out_scale != 1:
        dweight, dbias = dweight * out_scale, dbias * out_scale
    if norm == "none":
        return dweight, dbias, None, None
    rstd = (var + eps).rsqrt()
    gain = rstd if norm_weight is None else rstd * norm_weight
    dgain = (dweight * mix).sum(1)
    if dvar is not None:
        dmix = gain.unsqueeze(1) * dweight + 2 * dvar.unsqueeze(1) * _times(mix, covariance)
        return dmix, torch.zeros_like(dbias), dgain * rstd, dbias
    dgain = dgain + dbias * (-mean if mix_bias is None else mix_bias - mean)
    return gain.unsqueeze(1) * dweight, gain * dbias, dgain * rstd, dbias
