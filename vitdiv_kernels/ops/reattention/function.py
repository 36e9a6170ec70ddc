"""The operators `vitdiv::reattention_{fwd,bwd}` and their autograd.Function; the maths is in README.md."""

import torch
from torch.autograd.function import once_differentiable

from ... import _native
from .._layout import accumulation_dtype, heads_like, nothing, unit_stride, when
from .fold import Statistics, batch_statistics, fold, fold_backward

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, float scale, Tensor? pre_mix, Tensor? pre_bias, Tensor mix, Tensor bias,"
    " Tensor? norm_weight, Tensor? norm_bias, float eps"
)
torch.library.define(
    "vitdiv::reattention_fwd", f"({_INPUTS}, bool needs_out, bool needs_gram) -> (Tensor out, Tensor gram)"
)
# needs: dq, dk, dv, dpre_mix, dmix (with dbias), dnorm (weight and bias)
torch.library.define(
    "vitdiv::reattention_bwd",
    f"(Tensor? dout, Tensor? coupling, {_INPUTS}, bool[] needs) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dpre_mix,"
    " Tensor dmix, Tensor dbias, Tensor dnorm_weight, Tensor dnorm_bias)",
)


def _outputs(q, needs_out, needs_gram):
    gram_shape = (q.shape[0], q.shape[1], q.shape[1])
    return (
        heads_like(q) if needs_out else nothing(q),
        q.new_empty(gram_shape, dtype=accumulation_dtype(q)) if needs_gram else nothing(q),
    )


@torch.library.register_fake("vitdiv::reattention_fwd")
def _(q, k, v, scale, pre_mix, pre_bias, mix, bias, norm_weight, norm_bias, eps, needs_out, needs_gram):
    return _outputs(q, needs_out, needs_gram)


@torch.library.impl("vitdiv::reattention_fwd", "cpu")
def _(q, k, v, scale, pre_mix, pre_bias, mix, bias, norm_weight, norm_bias, eps, needs_out, needs_gram):
    out, gram = _outputs(q, needs_out, needs_gram)
    _native.library().reattention_fwd(
        q, k, v, scale, pre_mix, pre_bias, mix, bias, norm_weight, norm_bias, eps,
        when(needs_out, out), when(needs_gram, gram),
    )  # fmt: skip
    return out, gram


def _gradients(q, k, v, needs):
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


@torch.library.register_fake("vitdiv::reattention_bwd")
def _(
    dout, coupling, q, k, v, scale, pre_mix, pre_bias, mix, bias, norm_weight, norm_bias, eps, needs
):  # fmt: skip
    return _gradients(q, k, v, needs)


@torch.library.impl("vitdiv::reattention_bwd", "cpu")
def _(
    dout, coupling, q, k, v, scale, pre_mix, pre_bias, mix, bias, norm_weight, norm_bias, eps, needs
):  # fmt: skip
    gradients = _gradients(q, k, v, needs)
    needed = (*needs[:5], needs[4], needs[5], needs[5])
    _native.library().reattention_bwd(
        dout, coupling, q, k, v, scale, pre_mix, pre_bias, mix, bias, norm_weight, norm_bias, eps,
        *(when(need, gradient) for need, gradient in zip(needed, gradients, strict=True)),
    )  # fmt: skip
    return gradients


def _accumulation(tensor, dtype):
    return None if tensor is None else tensor.to(dtype).contiguous()


class ReattentionFunction(torch.autograd.Function):
    """Returns (out, gram or None, mean or None, var or None): mean and unbiased variance of batch norm in training."""

    @staticmethod
    def forward(
        ctx, q, k, v, mix, mix_bias, pre_mix, pre_bias, norm_weight, norm_bias, running_mean, running_var,
        norm, training, eps, out_scale, scale, return_gram, process_group,
    ):  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.parameters = [x is not None and x.dtype for x in (mix, mix_bias, pre_mix, pre_bias, norm_weight, norm_bias)]
        q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
        dtype, keys = accumulation_dtype(q), k.shape[2]
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
        statistics, gram = None, None
        if norm == "batch" and training:
            # only the maps' Gram matrix is made: mix and bias have no part in it
            _, gram = torch.ops.vitdiv.reattention_fwd(*inputs, mix, mix[0], None, None, eps, False, True)
            statistics = batch_statistics(mix, mix_bias, gram, q.shape[2], keys, process_group)
            mean, var = statistics.mean, statistics.var
        weight, bias = fold(
            mix, mix_bias, keys, norm, norm_weight, norm_bias, mean, var, statistics is not None, eps, out_scale
        )
        needs_gram = return_gram and gram is None
        out, new_gram = torch.ops.vitdiv.reattention_fwd(*inputs, weight, bias, *layer, eps, True, needs_gram)
        if needs_gram:
            gram = new_gram
        ctx.save_for_backward(
            q, k, v, pre_mix, pre_bias, weight, bias, *layer, mix, mix_bias, norm_weight, mean, var,
            None if statistics is None else statistics.covariance,
        )  # fmt: skip
        ctx.options = norm, eps, out_scale, scale, process_group
        gram = gram + q.shape[2] / keys if return_gram else None
        if statistics is None:
            return out, gram, None, None
        ctx.count = statistics.count
        unbiased = var * (statistics.count / (statistics.count - 1))
        ctx.mark_non_differentiable(mean, unbiased)
        return out, gram, mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dgram, dmean, dvar):
        (
            q, k, v, pre_mix, pre_bias, weight, bias, layer_weight, layer_bias, mix, mix_bias, norm_weight, mean,
            var, covariance,
        ) = ctx.saved_tensors  # fmt: skip
        norm, eps, out_scale, scale, process_group = ctx.options
        statistics = None if covariance is None else Statistics(mean, var, covariance, ctx.count)
        needs = ctx.needs_input_grad
        needs_dq, needs_dk, needs_dv = needs[:3]
        needs_dpre_mix = needs[5]
        needs_affine = needs[3] or needs[4] or (norm == "batch" and (needs[7] or needs[8]))
        needs_layer = norm == "layer" and (needs[7] or needs[8])
        needs_maps = needs_dq or needs_dk or needs_dpre_mix
        inputs = q, k, v, scale, pre_mix, pre_bias, weight, bias, layer_weight, layer_bias, eps
        coupling = None if dgram is None else dgram + dgram.mT
        if dout is not None:
            dout = unit_stride(dout)

        dq = dk = dv = dpre_mix = dweight = dbias = dlayer_weight = dlayer_bias = folded = None
        # Batch statistics couple every pair of maps through sums over the batch: those first, in a sweep of their own.
        sums_first = statistics is not None and dout is not None
        if sums_first and (needs_affine or needs_maps):
            only_sums = [False, False, needs_dv and not needs_maps, False, True, False]
            _, _, dv, _, dweight, dbias, _, _ = torch.ops.vitdiv.reattention_bwd(dout, None, *inputs, only_sums)
            folded = fold_backward(
                dweight, dbias, mix, mix_bias, k.shape[2], norm, norm_weight, mean, var, statistics, eps, out_scale,
                process_group,
            )  # fmt: skip
            coupling = folded.coupling if coupling is None else coupling + folded.coupling
            needs_dv = needs_dv and needs_maps
        gradients = [
            needs_dq, needs_dk, needs_dv and dout is not None, needs_dpre_mix,
            needs_affine and dout is not None and not sums_first, needs_layer and dout is not None,
        ]  # fmt: skip
        if any(gradients) and (dout is not None or coupling is not None):
            results = torch.ops.vitdiv.reattention_bwd(dout, coupling, *inputs, gradients)
            dq, dk, new_dv, dpre_mix, new_dweight, new_dbias, dlayer_weight, dlayer_bias = results
            dv = new_dv if gradients[2] else dv
            if gradients[4]:
                folded = fold_backward(
                    new_dweight, new_dbias, mix, mix_bias, k.shape[2], norm, norm_weight, mean, var, None, eps,
                    out_scale, process_group,
                )  # fmt: skip
        dmix = dmix_bias = dnorm_weight = dnorm_bias = None
        if folded is not None:
            dmix, dmix_bias, dnorm_weight, dnorm_bias = folded[:4]
        if needs_layer and dout is not None:
            dnorm_weight, dnorm_bias = dlayer_weight * out_scale, dlayer_bias * out_scale
        dpre_bias = None
        if needs[6]:  # a constant added to a row of logits changes no softmax
            dpre_bias = torch.zeros_like(pre_bias)
        parameters = (
            gradient.to(dtype) if need and gradient is not None else None
            for need, gradient, dtype in zip(
                needs[3:9],
                (dmix, dmix_bias, dpre_mix, dpre_bias, dnorm_weight, dnorm_bias),
                ctx.parameters,
                strict=True,
            )
        )
        tensors = (when(needs[0], dq), when(needs[1], dk), when(needs[2], dv), *parameters)
        return *tensors, *(None,) * 9


def reattention(
    q, k, v, mix, *, mix_bias, pre_mix, pre_bias, norm, norm_weight, norm_bias, running_mean, running_var, training,
    momentum, eps, out_scale, scale, return_gram, process_group,
):  # fmt: skip
    """(out, gram or None), as the public function says; updates the running statistics in place."""
    from_batch = norm == "batch" and training
    given = (None, None) if from_batch else (running_mean, running_var)
    out, gram, mean, var = ReattentionFunction.apply(
        q, k, v, mix, mix_bias, pre_mix, pre_bias, norm_weight, norm_bias, *given, norm, training, eps, out_scale,
        scale, return_gram, process_group,
    )  # fmt: skip
    if from_batch and running_mean is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(var.to(running_var.dtype), momentum)
    return out, gram
