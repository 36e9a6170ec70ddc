"""Re-attention made of the operators of function.py: as an autograd.Function that keeps little, and as a
chain of operators; maths in README.md."""

import math
from typing import NamedTuple

import torch

from ...._autograd import once_differentiable, refuse_forward_mode, transformed
from ...._checks import autocast_off, values_at_hand
from ...._exporting import exporting
from ...._layout import accumulation_dtype, when
from .fold import batch_norm_backward, batch_statistics, fold, fold_backward, variance_gradient
from .function import Gradients, Needs, head_dots, reattention_bwd, reattention_fwd


class Inputs(NamedTuple):
    """What has gradients, or of each of these whether its gradient is needed, or the gradient."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mix: torch.Tensor
    mix_bias: torch.Tensor | None
    pre_mix: torch.Tensor | None
    pre_bias: torch.Tensor | None
    norm_weight: torch.Tensor | None
    norm_bias: torch.Tensor | None


class Options(NamedTuple):
    norm: str
    training: bool
    wants_statistics: bool
    eps: float
    out_scale: float
    scale: float
    return_gram: bool
    process_group: object
    backend: str


class Saved(NamedTuple):
    """What is kept for the backward; None for what a call has not. Parameters are in the accumulation dtype.

    Of before_gain and before_shift, [B, H, N, d], batch norm in training keeps one: the output before gain
    and shift or, where that does not fit into float16 or there is no shift, after the gain.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    pre_mix: torch.Tensor | None
    pre_bias: torch.Tensor | None
    mix: torch.Tensor
    mix_bias: torch.Tensor | None
    norm_weight: torch.Tensor | None
    folded_mix: torch.Tensor | None = None  # None in batch norm's training: the gain makes it of mix
    folded_bias: torch.Tensor | None = None
    layer_weight: torch.Tensor | None = None  # of the layer norm, times out_scale
    layer_bias: torch.Tensor | None = None
    running_mean: torch.Tensor | None = None
    running_var: torch.Tensor | None = None
    var: torch.Tensor | None = None  # this and what follows: of batch norm in training
    gain: torch.Tensor | None = None
    mixed_covariance: torch.Tensor | None = None
    before_gain: torch.Tensor | None = None
    before_shift: torch.Tensor | None = None


class ReattentionFunction(torch.autograd.Function):
    """Of `Inputs`, running mean and variance and `Options`: (out, gram or None, and, if they are wanted, in
    batch norm's training its mean and unbiased variance)."""

    @staticmethod
    def forward(ctx, *arguments):
        ctx.set_materialize_grads(False)
        ctx.dtypes = [None if x is None else x.dtype for x in arguments[:9]]
        out, gram, statistics, saved, ctx.options = _forward(*arguments)
        ctx.save_for_backward(*saved)
        mean = unbiased_var = None
        if statistics is not None:
            ctx.count = statistics.count
            if ctx.options.wants_statistics:
                mean, unbiased_var = statistics.mean, statistics.unbiased_var
                ctx.mark_non_differentiable(mean, unbiased_var)
        return out, gram, mean, unbiased_var

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dgram, dmean, dunbiased_var):
        saved, needs = Saved(*ctx.saved_tensors), Inputs(*ctx.needs_input_grad[:9])
        count = ctx.count if saved.gain is not None else None
        gradients = _backward(saved, ctx.options, count, needs, dout, dgram)
        return *(
            gradient.to(dtype) if need and gradient is not None else None
            for need, gradient, dtype in zip(needs, gradients, ctx.dtypes, strict=True)
        ), *(None,) * (len(ctx.needs_input_grad) - 9)


def _composed(*arguments):
    """As `ReattentionFunction`, as a chain of operators with derivatives: what an exported program keeps and
    torch.func transforms. It makes two passes over dout more."""
    out, gram, statistics, _, _ = _forward(*arguments)
    if statistics is None:
        return out, gram, None, None
    return out, gram, statistics.mean, statistics.unbiased_var


def _forward(
    q, k, v, mix, mix_bias, pre_mix, pre_bias, norm_weight, norm_bias, running_mean, running_var, *options
):
    """(out, gram or None, batch norm's Statistics or None, Saved, Options)"""
    options = Options(*options)
    mix, mix_bias, pre_mix, pre_bias, norm_weight, norm_bias, running_mean, running_var = (
        _accumulation(x, accumulation_dtype(q))
        for x in (mix, mix_bias, pre_mix, pre_bias, norm_weight, norm_bias, running_mean, running_var)
    )
    if options.norm == "batch" and options.training:
        saved = Saved(q, k, v, pre_mix, pre_bias, mix, mix_bias, norm_weight)
        out, gram, statistics, saved = _batch_norm_forward(saved, norm_bias, options)
    else:
        folded_mix, folded_bias = fold(
            mix, mix_bias, options.norm, norm_weight, norm_bias, running_mean, running_var, options.eps,
            options.out_scale,
        )  # fmt: skip
        layer = _layer_parameters(norm_weight, norm_bias, q, options)
        saved = Saved(
            q, k, v, pre_mix, pre_bias, mix, mix_bias, norm_weight, folded_mix, folded_bias, *layer,
            running_mean, running_var,
        )  # fmt: skip
        out, gram = _run(saved, options, folded_mix, folded_bias, needs_gram=options.return_gram)
        statistics = None
    return out, gram + q.shape[2] / k.shape[2] if options.return_gram else None, statistics, saved, options


def _accumulation(tensor, dtype):
    if tensor is None or (tensor.dtype == dtype and tensor.is_contiguous()):
        return tensor
    return tensor.to(dtype).contiguous()


def _layer_parameters(norm_weight, norm_bias, q, options):
    """Weight and bias of the layer norm, with out_scale; None for another norm."""
    if options.norm != "layer":
        return None, None
    ones = q.new_ones(q.shape[1], dtype=accumulation_dtype(q))
    return (
        options.out_scale * (ones if norm_weight is None else norm_weight),
        options.out_scale * (torch.zeros_like(ones) if norm_bias is None else norm_bias),
    )


def _run(saved, options, folded_mix, folded_bias, *, centred=False, needs_out=True, needs_gram=False):
    """(out, centred Gram matrix) of an affine mix of the maps, or of the centred maps."""
    return reattention_fwd[options.backend](
        saved.q, saved.k, saved.v, options.scale, saved.pre_mix, saved.pre_bias, folded_mix, folded_bias,
        centred, saved.layer_weight, saved.layer_bias, options.eps, needs_out, needs_gram,
    )  # fmt: skip


def _batch_norm_forward(saved, norm_bias, options):
    """One sweep makes the Gram matrix, hence the statistics, and the output but for gain and shift.

    Centred maps are mixed, so that the mean of the batch is gone already.
    """
    q, v, mix = saved.q, saved.v, saved.mix
    # float16 cannot hold the unscaled output of nearly uniform maps: the statistics get a sweep of their own
    one_sweep = q.dtype != torch.float16
    unscaled, gram = _run(saved, options, mix, None, centred=True, needs_out=one_sweep, needs_gram=True)
    statistics = batch_statistics(
        gram, mix, saved.mix_bias, saved.norm_weight, q.shape[2], saved.k.shape[2], options.eps,
        options.out_scale, options.process_group,
    )  # fmt: skip
    gain, scaled, bias = statistics.gain, None, None
    if not one_sweep:
        scaled, _ = _run(saved, options, mix * gain.unsqueeze(1), None, centred=True)
    elif norm_bias is None:
        scaled = (unscaled * gain.view(-1, 1, 1)).to(q.dtype)
    if norm_bias is not None:
        bias = norm_bias if options.out_scale == 1 else norm_bias * options.out_scale
    saved = saved._replace(
        folded_bias=bias, var=statistics.var, gain=gain, mixed_covariance=statistics.mixed_covariance,
        before_gain=unscaled if scaled is None else None, before_shift=scaled,
    )  # fmt: skip
    if norm_bias is None:
        return scaled, gram, statistics, saved
    shift = bias.view(-1, 1, 1) * v.sum(2, keepdim=True, dtype=bias.dtype)  # [B, H, 1, d]
    if values_at_hand(shift) and not math.isfinite(shift.sum()):
        # of an Inf in v both terms are infinite: their signs may differ, that of the sum is the mixed map's
        out, _ = _run(saved, options, mix * gain.unsqueeze(1), bias, centred=True)
    elif scaled is not None:
        out = (scaled + shift).to(q.dtype)
    else:
        out = torch.addcmul(shift, unscaled, gain.view(-1, 1, 1)).to(q.dtype)  # rounded once
    return out, gram, statistics, saved


def _backward(saved, options, count, needs, dout, dgram):
    """The gradients of `Inputs`; None for what is zero."""
    norm, eps, out_scale = options.norm, options.eps, options.out_scale
    has_dout, from_batch = dout is not None, saved.gain is not None
    coupling = None if dgram is None else dgram + dgram.mT
    folded_mix = saved.mix * saved.gain.unsqueeze(1) if from_batch else saved.folded_mix
    dvar = None
    # beside dfolded_mix, only the maps' gradient needs that of the variances
    if from_batch and has_dout and (needs.q or needs.k or needs.mix or needs.pre_mix):
        with autocast_off(saved.q):
            dots = _head_dots(saved, dout, options.backend)
            dvar, from_variance = variance_gradient(
                dots, saved.var, saved.mix, count, eps, options.process_group
            )
        coupling = from_variance if coupling is None else coupling + from_variance

    needs_norm = needs.norm_weight or needs.norm_bias
    needs_affine = needs.mix or needs.mix_bias or (norm == "batch" and needs_norm)
    wanted = Needs(
        dq=needs.q, dk=needs.k, dv=needs.v and has_dout, dpre_mix=needs.pre_mix,
        dfolded_mix=needs_affine and has_dout, dnorm=norm == "layer" and needs_norm and has_dout,
    )  # fmt: skip
    found = Gradients()
    if any(wanted) and (has_dout or coupling is not None):
        found = Gradients(
            *reattention_bwd[options.backend](
                dout, coupling, saved.q, saved.k, saved.v, options.scale, saved.pre_mix, saved.pre_bias,
                folded_mix, saved.folded_bias, from_batch, saved.layer_weight, saved.layer_bias, eps,
                list(wanted),
            )
        )  # fmt: skip
    dmix = dmix_bias = dnorm_weight = dnorm_bias = None
    if wanted.dfolded_mix and from_batch:
        dmix, dnorm_weight = batch_norm_backward(
            found.dfolded_mix, saved.mix, saved.norm_weight, saved.var, saved.mixed_covariance, dvar, eps,
            out_scale,
        )  # fmt: skip
        # a bias moves the mean and nothing else
        dmix_bias = torch.zeros_like(found.dfolded_bias) if needs.mix_bias else None
        dnorm_bias = found.dfolded_bias if out_scale == 1 else found.dfolded_bias * out_scale
    elif wanted.dfolded_mix:
        dmix, dmix_bias, dnorm_weight, dnorm_bias = fold_backward(
            found.dfolded_mix, found.dfolded_bias, saved.mix, saved.mix_bias, norm, saved.norm_weight,
            saved.running_mean, saved.running_var, eps, out_scale,
        )  # fmt: skip
    if wanted.dnorm:
        dnorm_weight, dnorm_bias = found.dnorm_weight * out_scale, found.dnorm_bias * out_scale
    # a constant added to a row of logits changes no softmax
    dpre_bias = torch.zeros_like(saved.pre_bias) if needs.pre_bias else None
    return Inputs(
        q=found.dq, k=found.dk, v=when(wanted.dv, found.dv), mix=dmix, mix_bias=dmix_bias,
        pre_mix=found.dpre_mix, pre_bias=dpre_bias, norm_weight=dnorm_weight, norm_bias=dnorm_bias,
    )  # fmt: skip


def _head_dots(saved, dout, backend):
    """Sums over images and rows of dout times the output before its shift: [H]."""
    if saved.before_gain is None:
        return head_dots[backend](dout, saved.before_shift)
    return head_dots[backend](dout, saved.before_gain) * saved.gain


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
