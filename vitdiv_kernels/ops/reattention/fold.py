"""Everything of re-attention that is H x H: the kernels know one affine mix of the centred maps,

    Y_g = sum_h weight[g, h] (A_h - 1/M) + bias[g],

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


def fold(mix, mix_bias, keys, norm, norm_weight, norm_bias, mean, var, from_batch, eps, out_scale):
    """(weight [H, H], bias [H]) of the affine mix. mean and var are those of norm "batch", `from_batch` or running."""
    centre = mix.sum(1) / keys  # of the mixed maps, less mix_bias
    if mix_bias is not None:
        centre = centre + mix_bias
    if norm == "layer":
        return mix, centre
    if norm == "batch":
        gain = (var + eps).rsqrt()
        if norm_weight is not None:
            gain = gain * norm_weight
        # the batch's own mean is the centre, exactly
        centre = torch.zeros_like(centre) if from_batch else (centre - mean) * gain
        if norm_bias is not None:
            centre = centre + norm_bias
        mix = mix * gain.unsqueeze(1)
    return (mix, centre) if out_scale == 1 else (mix * out_scale, centre * out_scale)


class FoldGradients(NamedTuple):
    dmix: torch.Tensor
    dmix_bias: torch.Tensor
    dnorm_weight: torch.Tensor | None
    dnorm_bias: torch.Tensor | None
    coupling: torch.Tensor | None  # [1, H, H]: what the batch's statistics add to dgram + its transpose


def fold_backward(
    dweight, dbias, mix, mix_bias, keys, norm, norm_weight, mean, var, statistics, eps, out_scale, process_group
):
    """From the gradients of the affine mix to those of what it was made from."""
    if norm == "layer":
        return FoldGradients(dweight + dbias.unsqueeze(1) / keys, dbias, None, None, None)
    if out_scale != 1:
        dweight, dbias = dweight * out_scale, dbias * out_scale
    if norm == "none":
        return FoldGradients(dweight + dbias.unsqueeze(1) / keys, dbias, None, None, None)
    rstd = (var + eps).rsqrt()
    gain = rstd if norm_weight is None else rstd * norm_weight
    dgain = (dweight * mix).sum(1)
    if statistics is None:
        centre = mix.sum(1) / keys - mean
        if mix_bias is not None:
            centre = centre + mix_bias
        dgain = dgain + dbias * centre
        dmix = gain.unsqueeze(1) * (dweight + dbias.unsqueeze(1) / keys)
        return FoldGradients(dmix, gain * dbias, dgain * rstd, dbias, None)
    dvar = -0.5 * dgain * gain * rstd * rstd
    if process_group is not None:
        torch.distributed.all_reduce(dvar, group=process_group)
    pull = 2 * dvar.unsqueeze(1) * mix
    dmix = gain.unsqueeze(1) * dweight + _times(pull, statistics.covariance)
    coupling = _times(pull.t(), mix) / statistics.count
    return FoldGradients(dmix, torch.zeros_like(dbias), dgain * rstd, dbias, coupling.unsqueeze(0))
