"""Everything of re-attention that is H x H: the kernels know one affine mix of the maps,

    Y_g = sum_h weight[g, h] A_h + bias[g],    or, centred, of A_h - 1/M,

then, for norm "layer", a layer norm over heads. `fold` turns mix, mix_bias, out_scale and batch norm in
evaluation into it, `fold_backward` takes the gradients back, and the operators `vitdiv::batch_norm_*` do both
for batch norm in training: on the CPU in C++ (csrc/batch_norm.h; a dozen small torch calls cost 60 us), else
by the functions here.
"""

import torch

torch.library.define(
    "vitdiv::batch_norm_fwd",
    "(Tensor gram, Tensor mix, Tensor? mix_bias, Tensor? norm_weight, SymInt queries, SymInt keys, float eps,"
    " float out_scale)"
    " -> (Tensor mean, Tensor var, Tensor unbiased_var, Tensor mixed_covariance, Tensor gain)",
)
torch.library.define(
    "vitdiv::batch_norm_coupling",
    "(Tensor dots, Tensor var, Tensor mix, SymInt count, float eps) -> (Tensor dvar, Tensor coupling)",
)
torch.library.define(
    "vitdiv::batch_norm_bwd",
    "(Tensor dweight, Tensor mix, Tensor? norm_weight, Tensor var, Tensor mixed_covariance, Tensor? dvar,"
    " float eps, float out_scale) -> (Tensor dmix, Tensor dnorm_weight)",
)


@torch.library.register_fake("vitdiv::batch_norm_fwd")
def _(gram, mix, mix_bias, norm_weight, queries, keys, eps, out_scale):
    def empty():
        return gram.new_empty(gram.shape[1])

    return empty(), empty(), empty(), gram.new_empty(gram.shape[1:]), empty()


@torch.library.register_fake("vitdiv::batch_norm_coupling")
def _(dots, var, mix, count, eps):
    return torch.empty_like(var), mix.new_empty((1, *mix.shape))


@torch.library.register_fake("vitdiv::batch_norm_bwd")
def _(dweight, mix, norm_weight, var, mixed_covariance, dvar, eps, out_scale):
    return torch.empty_like(mix), torch.empty_like(var)


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


# what an operator does where it has no kernel of its own
for _function in (batch_norm_fwd, batch_norm_coupling, batch_norm_bwd):
    torch.library.impl(f"vitdiv::{_function.__name__}", "CompositeExplicitAutograd", _function)
_batch_norm_fwd = torch.ops.vitdiv.batch_norm_fwd.default
_batch_norm_coupling = torch.ops.vitdiv.batch_norm_coupling.default
_batch_norm_bwd = torch.ops.vitdiv.batch_norm_bwd.default


def batch_statistics(gram, mix, mix_bias, norm_weight, queries, keys, eps, out_scale, process_group):
    """Of the mixed maps over (image, query, key): mean, var, unbiased var [H], the mix times the maps'
    covariance over this process's images [H, H], `gain_of`, and the number B N M over all processes."""
    if process_group is None:
        results = _batch_norm_fwd(gram, mix, mix_bias, norm_weight, queries, keys, eps, out_scale)
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
        return _batch_norm_coupling(dots, var, mix, count, eps)
    dvar = -0.5 * dots / (var + eps)
    torch.distributed.all_reduce(dvar, group=process_group)
    return dvar, _coupling(dvar, mix, count)


def batch_norm_backward(dweight, mix, norm_weight, var, mixed_covariance, dvar, eps, out_scale):
    """(dmix, dnorm_weight) from the gradient of gain times mix; dvar is None where dmix is not needed."""
    return _batch_norm_bwd(dweight, mix, norm_weight, var, mixed_covariance, dvar, eps, out_scale)


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
