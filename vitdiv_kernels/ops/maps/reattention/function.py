"""The operators `reattention_{fwd,bwd}` and `head_dots`: schemas, fake kernels, derivative; maths in
README.md."""

from typing import NamedTuple

import torch

from ...._layout import accumulation_dtype, heads_like, nothing, when
from ... import _flops
from ..._operators import define
from ..._sharding import BATCH, SUM, WHOLE, batch_where, by_items
from ..._vmap import JOIN


class Needs(NamedTuple):
    """Which gradients `reattention_bwd` is asked for: its last argument."""

    dq: bool
    dk: bool
    dv: bool
    dpre_mix: bool
    dfolded_mix: bool  # and dfolded_bias
    dnorm: bool  # of the layer norm's weight and bias


class Gradients(NamedTuple):
    """What `reattention_bwd` returns; an empty tensor for what is not needed."""

    dq: torch.Tensor | None = None
    dk: torch.Tensor | None = None
    dv: torch.Tensor | None = None
    dpre_mix: torch.Tensor | None = None
    dfolded_mix: torch.Tensor | None = None
    dfolded_bias: torch.Tensor | None = None
    dnorm_weight: torch.Tensor | None = None
    dnorm_bias: torch.Tensor | None = None


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, float scale, Tensor? pre_mix, Tensor? pre_bias, Tensor folded_mix,"
    " Tensor? folded_bias, bool centred, Tensor? norm_weight, Tensor? norm_bias, float eps"
)


def _fwd_fake(
    q, k, v, scale, pre_mix, pre_bias, folded_mix, folded_bias, centred, norm_weight, norm_bias, eps,
    needs_out, needs_gram,
):  # fmt: skip
    gram_shape = (q.shape[0], q.shape[1], q.shape[1])
    return (
        heads_like(q) if needs_out else nothing(q),
        q.new_empty(gram_shape, dtype=accumulation_dtype(q)) if needs_gram else nothing(q),
    )


def _bwd_fake(
    dout, coupling, q, k, v, scale, pre_mix, pre_bias, folded_mix, folded_bias, centred, norm_weight,
    norm_bias, eps, needs,
):  # fmt: skip
    heads, dtype, needs = q.shape[1], accumulation_dtype(q), Needs(*needs)

    def empty(need, *shape):
        return q.new_empty(shape, dtype=dtype) if need else nothing(q)

    dq, dk, dv = (
        heads_like(x) if need else nothing(q)
        for x, need in zip((q, k, v), (needs.dq, needs.dk, needs.dv), strict=True)
    )
    found = Gradients(
        dq, dk, dv, dpre_mix=empty(needs.dpre_mix, heads, heads),
        dfolded_mix=empty(needs.dfolded_mix, heads, heads), dfolded_bias=empty(needs.dfolded_mix, heads),
        dnorm_weight=empty(needs.dnorm, heads), dnorm_bias=empty(needs.dnorm, heads),
    )  # fmt: skip
    return tuple(found)


def _head_dots_fake(x, y):
    return x.new_empty(x.shape[1], dtype=accumulation_dtype(x))


def _setup(ctx, inputs, outputs):
    q, k, v, scale, pre_mix, pre_bias, folded_mix, folded_bias, centred, norm_weight, norm_bias, eps, *_ = (
        inputs
    )
    ctx.save_for_backward(q, k, v, pre_mix, pre_bias, folded_mix, folded_bias, norm_weight, norm_bias)
    ctx.options = scale, centred, eps


def _backward(ctx, operator, needs, dout, dgram):
    q, k, v, pre_mix, pre_bias, folded_mix, folded_bias, norm_weight, norm_bias = ctx.saved_tensors
    scale, centred, eps = ctx.options
    has_dout = dout is not None
    needs_q, needs_k, needs_v, _, needs_pre_mix, needs_pre_bias, needs_folded_mix, needs_folded_bias, _ = (
        needs[:9]
    )
    needs_norm_weight, needs_norm_bias = needs[9:11]
    wanted = Needs(
        dq=needs_q, dk=needs_k, dv=needs_v and has_dout, dpre_mix=needs_pre_mix,
        dfolded_mix=(needs_folded_mix or needs_folded_bias) and has_dout,
        dnorm=(needs_norm_weight or needs_norm_bias) and has_dout,
    )  # fmt: skip
    found = Gradients()
    if any(wanted):
        coupling = None if dgram is None else dgram + dgram.mT
        found = Gradients(
            *operator("reattention_bwd")(
                dout, coupling, q, k, v, scale, pre_mix, pre_bias, folded_mix, folded_bias, centred,
                norm_weight, norm_bias, eps, list(wanted),
            )
        )  # fmt: skip
    # a constant added to a row of logits changes no softmax
    dpre_bias = torch.zeros_like(pre_bias) if needs_pre_bias else None
    return (
        when(wanted.dq, found.dq), when(wanted.dk, found.dk), when(wanted.dv, found.dv), None,
        when(wanted.dpre_mix, found.dpre_mix), dpre_bias,
        when(needs_folded_mix and has_dout, found.dfolded_mix),
        when(needs_folded_bias and has_dout, found.dfolded_bias), None,
        when(needs_norm_weight and has_dout, found.dnorm_weight),
        when(needs_norm_bias and has_dout, found.dnorm_bias),
    )  # fmt: skip


def _fwd_folds(inputs, dims):
    if any(dims[i] is not None for i in (4, 5, 6, 7, 9, 10)):
        return None  # each item has parameters of its own
    needs_out, needs_gram = inputs[-2:]
    return (JOIN, JOIN, JOIN, *(None,) * 11), (when(needs_out, JOIN), when(needs_gram, JOIN))


def _bwd_folds(inputs, dims):
    needs, coupling = Needs(*inputs[-1]), inputs[1]
    parameters = needs.dpre_mix or needs.dfolded_mix or needs.dnorm
    if parameters or any(dims[i] is not None for i in (6, 7, 8, 9, 11, 12)):
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
    dpre_mix, dfolded_mix, dnorm = (SUM if needed else WHOLE for needed in needs[3:])
    return into, (dq, dk, dv, dpre_mix, dfolded_mix, dfolded_mix, dnorm, dnorm)


def _dots_shards(inputs):
    if not by_items(inputs[0]):
        return None
    return (BATCH, BATCH), (SUM,)


def _fwd_flops(
    q, k, v, scale, pre_mix, pre_bias, folded_mix, folded_bias, centred, nw, nb, eps, needs_out, needs_gram,
    **_,
):  # fmt: skip
    mixes = (pre_mix is not None) + needs_out + needs_gram
    return (1 + needs_out) * _flops.maps(q, k) + mixes * _flops.mixed(q, k)


def _bwd_flops(
    dout, coupling, q, k, v, scale, pre_mix, pre_bias, folded_mix, folded_bias, centred, nw, nb, eps, needs,
    **_,
):  # fmt: skip
    dq, dk, dv, dpre_mix, dfolded_mix, dnorm = Needs(*needs)
    of_maps = dq or dk or dpre_mix
    of_out = dout is not None and (of_maps or dfolded_mix or dnorm)
    products = 1 + of_out + dq + dk + dv  # the logits again, dY, and one a gradient
    # the maps mixed again, dY mixed back, the coupling, and what mixes the logits, forward and back
    mixes = (dv or dnorm) + (of_out and of_maps) + (coupling is not None) + dfolded_mix + dpre_mix
    mixes += (pre_mix is not None) * (1 + (dq or dk))
    return products * _flops.maps(q, k) + mixes * _flops.mixed(q, k)


def _dots_flops(x, y, **_):
    return _flops.closed(x)


reattention_fwd = define(
    "reattention_fwd",
    f"({_INPUTS}, bool needs_out, bool needs_gram) -> (Tensor out, Tensor gram)",
    _fwd_fake,
    setup=_setup,
    backward=_backward,
    folds=_fwd_folds,
    shards=_fwd_shards,
    flops=_fwd_flops,
)
reattention_bwd = define(
    "reattention_bwd",
    f"(Tensor? dout, Tensor? coupling, {_INPUTS}, bool[] needs) -> (Tensor dq, Tensor dk, Tensor dv,"
    " Tensor dpre_mix, Tensor dfolded_mix, Tensor dfolded_bias, Tensor dnorm_weight, Tensor dnorm_bias)",
    _bwd_fake,
    folds=_bwd_folds,
    shards=_bwd_shards,
    flops=_bwd_flops,
)
# [H]: sums over images and rows of x . y, both [B, H, N, d]
head_dots = define(
    "head_dots", "(Tensor x, Tensor y) -> Tensor", _head_dots_fake, shards=_dots_shards, flops=_dots_flops
)
