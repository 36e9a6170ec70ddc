"""Re-attention by streaming: a program holds a tile of queries (or keys) of all heads and walks the keys
(queries).

No workspace: maps are made again in every sweep. ../../_triton/maps.py has the sweeps that attention_gram
needs too, and says what ZERO is.
"""

import torch
import triton
import triton.language as tl

from ....._layout import accumulation_dtype, nothing
from ...._launch import double, launch, split
from ...._tables import options
from ..._triton.heads import (
    aligned,
    aligned_empty,
    couple,
    deliver,
    factors,
    head_values,
    hold_heads,
    kronecker,
    load_heads,
    magnitude,
    mix_heads,
    products,
    row_values,
    scaled_kronecker,
    store_coupled,
    store_heads,
    uncouple,
)
from ..._triton.maps import (
    layer_norm,
    layer_norm_gradient,
    logits,
    mix_constant,
    mixed_maps,
    reload_matrices,
)
from ..._triton.sweeps import (
    Maps,
    located,
    or_else,
    parts,
    warp_split,
    with_image_stride,
)


@triton.jit(do_not_specialize=["tiles", "N", "M"])
def output_sweep(
    q, q_b, q_h, q_n,  # [B, H, N, d] and its strides
    k, k_b, k_h, k_n,  # [B, H, M, d]
    v, v_b, v_h, v_n,  # [B, H, M, dv]
    out, o_b, o_h, o_n,  # [B, H, N, dv]
    pre_mix, mix,  # [H, H]
    bias, norm_weight, norm_bias,  # [H]
    row_max, row_scale,  # [B, HP, NS]
    tiles, ZERO, N, M, NS,  # tiles of an image; queries, keys, queries padded
    factor_high, factor_low, factor2_high, factor2_low, eps_high, eps_low,
    H: tl.constexpr, H1: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, DV: tl.constexpr,
    DVB: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, PRE: tl.constexpr, CENTRED: tl.constexpr,
    BIAS: tl.constexpr, LAYER: tl.constexpr, HOLD: tl.constexpr, RELOAD: tl.constexpr, PS: tl.constexpr,
    DT: tl.constexpr, ZT: tl.constexpr, PREC: tl.constexpr, ZPREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """X = mix A + bias,  Y = X or its layer norm over heads,  out = sum_j Y v: DVB columns of a tile of
    queries."""
    pid = tl.program_id(0)
    image = (pid // tiles).to(tl.int64)
    i = (pid % tiles) * BR + tl.arange(0, BR)
    if DV > DVB:
        c0 = tl.program_id(1) * DVB
    else:
        c0 = 0
    q += image * q_b
    k += image * k_b
    v += image * v_b
    statistics = image * HP * NS
    mean = 1.0 / tl.full((), M, ACC)
    factor = factors(factor_high, factor_low, factor2_high, factor2_low, H1, HP, ACC)
    held = hold_heads(q, i, N, q_h, q_n, H, HP, D, DB, DT, HOLD)
    pre = factor
    if PRE:
        pre = kronecker(pre_mix, H, HP, False, ACC).to(ZT)
    w_acc = kronecker(mix, H, HP, False, ACC)
    size = magnitude(w_acc, DT, ACC)
    w = (w_acc / size).to(DT)
    constant = mix_constant(mix, bias, mean, H, HP, CENTRED, BIAS, ACC)
    if LAYER:
        eps = double(eps_high, eps_low, ACC)
        gain = head_values(norm_weight, H, HP, ACC)
        added = head_values(norm_bias, H, HP, ACC)
    row_maxes = row_values(row_max + statistics, i, N, NS, 0.0, HP)[:, :, None]
    row_scales = row_values(row_scale + statistics, i, N, NS, mean, HP)[:, :, None]
    acc = tl.zeros((HP, BR, DVB), ACC)
    for j0 in tl.range(0, M, BC):
        j = j0 + tl.arange(0, BC)
        pre_now = pre
        w_now = w
        if RELOAD:
            if PRE:
                pre_now = kronecker(pre_mix + j0 * ZERO, H, HP, False, ACC).to(ZT)
            w_now = scaled_kronecker(mix + j0 * ZERO, size, H, HP, False, DT, ACC)
        s = products(held, q, i, N, q_h, q_n, k, j, M, k_h, k_n, H, HP, D, DB, DT, HOLD, PREC, ACC)
        z = logits(s, pre_now, factor, HP, BR, BC, 2, PRE, ZT, ZPREC, ACC)
        # the exponential of the padding can be Inf, and times the zeros of v NaN
        p = tl.where((j < M)[None, None, :], tl.exp2(z - row_maxes) * row_scales - mean, 0.0)
        mixed = mixed_maps(w_now, size * (1.0 / PS), constant, (p * PS).to(DT), HP, BR, BC, 2, PREC, ACC)
        if LAYER:
            normalised, _ = layer_norm(mixed, (i < N)[:, None] & (j < M)[None, :], eps, H, HP)
            mixed = normalised * gain + added
        y = load_heads(v, j, M, c0, v_h, v_n, H, HP, DV, DVB, DT)
        acc = tl.dot(mixed.to(DT), y, acc, input_precision=PREC, out_dtype=ACC)
    store_heads(out + image * o_b, acc, i, N, c0, o_h, o_n, H, HP, DV, DVB)


@triton.jit(do_not_specialize=["tiles", "N", "M"])
def parameter_sweep(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, dout, o_b, o_h, o_n, pre_mix, mix, bias,
    norm_weight, coupling, coupling_b, row_max, row_scale, row_dot, dmix, dvectors, tiles, ZERO, N, M, NS,
    factor_high, factor_low, factor2_high, factor2_low, eps_high, eps_low, H: tl.constexpr, H1: tl.constexpr,
    HP: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, DV: tl.constexpr, DVB: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, PRE: tl.constexpr, CENTRED: tl.constexpr, BIAS: tl.constexpr,
    LAYER: tl.constexpr, COUPLING: tl.constexpr, NEED_ROW_DOT: tl.constexpr, NEED_DMIX: tl.constexpr,
    NEED_DNORM: tl.constexpr, W: tl.constexpr, HOLD: tl.constexpr, RELOAD: tl.constexpr, PS: tl.constexpr,
    DT: tl.constexpr, ZT: tl.constexpr, PREC: tl.constexpr, ZPREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dY = dout v^T,  dX = dY or through the layer norm,  dA = mix^T dX + C (A - 1/M),  row_dot = sum_j A dA,
    and a tile of queries' part of dmix = sum_ij dX (A - 1/M)^T and of the gradients of vectors."""
    ROWS: tl.constexpr = 16 if HP < 16 else HP
    pid = tl.program_id(0)
    image = (pid // tiles).to(tl.int64)
    i = (pid % tiles) * BR + tl.arange(0, BR)
    h = tl.arange(0, HP)
    q += image * q_b
    k += image * k_b
    v += image * v_b
    dout += image * o_b
    statistics = image * HP * NS
    mean = 1.0 / tl.full((), M, ACC)
    factor = factors(factor_high, factor_low, factor2_high, factor2_low, H1, HP, ACC)
    held_q = hold_heads(q, i, N, q_h, q_n, H, HP, D, DB, DT, HOLD)
    held_o = hold_heads(dout, i, N, o_h, o_n, H, HP, DV, DVB, DT, HOLD)
    pre, w, wt, c, c_size = factor, factor, factor, factor, mean
    if PRE:
        pre = kronecker(pre_mix, H, HP, False, ACC).to(ZT)
    w_acc = kronecker(mix, H, HP, False, ACC)
    size = magnitude(w_acc, DT, ACC)
    if LAYER:
        w = (w_acc / size).to(DT)
        constant = mix_constant(mix, bias, mean, H, HP, CENTRED, BIAS, ACC)
        eps = double(eps_high, eps_low, ACC)
        gain = head_values(norm_weight, H, HP, ACC)
    if NEED_ROW_DOT:
        wt = scaled_kronecker(mix, size, H, HP, True, DT, ACC)
        sums = tl.zeros((HP, BR), ACC)
        if COUPLING:
            c_acc = kronecker(coupling + image * coupling_b, H, HP, False, ACC)
            c_size = magnitude(c_acc, DT, ACC)
            c = (c_acc / c_size).to(DT)
    row_maxes = row_values(row_max + statistics, i, N, NS, 0.0, HP)[:, :, None]
    row_scales = row_values(row_scale + statistics, i, N, NS, mean, HP)[:, :, None]
    if NEED_DMIX:
        mix_sums = tl.zeros((W, ROWS, ROWS), ACC)
        bias_sums = tl.zeros((HP, BR), ACC)
    if NEED_DNORM:
        norm_weight_sums = tl.zeros((HP, BR), ACC)
        norm_bias_sums = tl.zeros((HP, BR), ACC)
    for j0 in tl.range(0, M, BC):
        j = j0 + tl.arange(0, BC)
        pre_now, w_now, wt_now, c_now = pre, w, wt, c
        if RELOAD:
            pre_now, _, w_now, wt_now, c_now = reload_matrices(
                pre, pre, w, wt, c, pre_mix, mix, coupling, image, coupling_b, size, size, c_size,
                j0 * ZERO, H, HP, PRE, False, LAYER, NEED_ROW_DOT, NEED_ROW_DOT and COUPLING, DT, ZT, ACC,
            )  # fmt: skip
        inside = (j < M)[None, None, :]
        s = products(held_q, q, i, N, q_h, q_n, k, j, M, k_h, k_n, H, HP, D, DB, DT, HOLD, PREC, ACC)
        z = logits(s, pre_now, factor, HP, BR, BC, 2, PRE, ZT, ZPREC, ACC)
        p = tl.where(inside, tl.exp2(z - row_maxes) * row_scales, 0.0)
        centred = (tl.where(inside, p - mean, 0.0) * PS).to(DT)
        dy = products(held_o, dout, i, N, o_h, o_n, v, j, M, v_h, v_n, H, HP, DV, DVB, DT, HOLD, PREC, ACC)
        if LAYER:
            mixed = mixed_maps(w_now, size * (1.0 / PS), constant, centred, HP, BR, BC, 2, PREC, ACC)
            normalised, rstd = layer_norm(mixed, (i < N)[:, None] & (j < M)[None, :], eps, H, HP)
            if NEED_DNORM:
                norm_weight_sums += tl.sum(dy * normalised, 2)
                norm_bias_sums += tl.sum(dy, 2)
            dy = layer_norm_gradient(dy, normalised, rstd, gain, H)
        if NEED_DMIX:
            bias_sums += tl.sum(dy, 2)
        dmixed = dy.to(DT)
        if NEED_DMIX:
            mix_sums = couple(mix_sums, dmixed, centred, HP, BR, BC, W, PREC, ACC)
        if NEED_ROW_DOT:
            d = mix_heads(wt_now, dmixed, HP, BR, BC, 2, PREC, ACC) * size
            if COUPLING:
                d += mix_heads(c_now, centred, HP, BR, BC, 2, PREC, ACC) * (c_size * (1.0 / PS))
            sums += tl.sum(p * d, 2)
    if NEED_ROW_DOT:
        mask = (i < N)[None, :] & (h < HP)[:, None]
        tl.store(row_dot + statistics + h[:, None].to(tl.int64) * NS + i[None, :], sums, mask=mask)
    row = pid.to(tl.int64)
    if NEED_DMIX:
        store_coupled(dmix + row * ROWS * ROWS, mix_sums * (1.0 / PS), HP, W)
        tl.store(dvectors + row * 3 * HP + h, tl.sum(bias_sums, 1))
    if NEED_DNORM:
        tl.store(dvectors + row * 3 * HP + HP + h, tl.sum(norm_weight_sums, 1))
        tl.store(dvectors + row * 3 * HP + 2 * HP + h, tl.sum(norm_bias_sums, 1))


@triton.jit(do_not_specialize=["tiles", "N", "M"])
def value_gradient(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, dout, o_b, o_h, o_n, dv, dv_b, dv_h, dv_n, pre_mix, mix, bias,
    norm_weight, norm_bias, row_max, row_scale, tiles, ZERO, N, M, NS, factor_high, factor_low, factor2_high,
    factor2_low, eps_high, eps_low, H: tl.constexpr, H1: tl.constexpr, HP: tl.constexpr, D: tl.constexpr,
    DB: tl.constexpr, DV: tl.constexpr, DVB: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    PRE: tl.constexpr, CENTRED: tl.constexpr, BIAS: tl.constexpr, LAYER: tl.constexpr, HOLD: tl.constexpr,
    RELOAD: tl.constexpr, PS: tl.constexpr, DT: tl.constexpr, ZT: tl.constexpr, PREC: tl.constexpr,
    ZPREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Y as in `output_sweep`,  dv = sum_i Y dout: DVB columns of a tile of BR keys, from transposed tiles
    [HP, keys, queries]."""
    pid = tl.program_id(0)
    image = (pid // tiles).to(tl.int64)
    j = (pid % tiles) * BR + tl.arange(0, BR)
    if DV > DVB:
        c0 = tl.program_id(1) * DVB
    else:
        c0 = 0
    q += image * q_b
    k += image * k_b
    dout += image * o_b
    statistics = image * HP * NS
    mean = 1.0 / tl.full((), M, ACC)
    factor = factors(factor_high, factor_low, factor2_high, factor2_low, H1, HP, ACC)
    held = hold_heads(k, j, M, k_h, k_n, H, HP, D, DB, DT, HOLD)
    pre = factor
    if PRE:
        pre = kronecker(pre_mix, H, HP, False, ACC).to(ZT)
    w_acc = kronecker(mix, H, HP, False, ACC)
    size = magnitude(w_acc, DT, ACC)
    w = (w_acc / size).to(DT)
    constant = mix_constant(mix, bias, mean, H, HP, CENTRED, BIAS, ACC)
    if LAYER:
        eps = double(eps_high, eps_low, ACC)
        gain = head_values(norm_weight, H, HP, ACC)
        added = head_values(norm_bias, H, HP, ACC)
    acc = tl.zeros((HP, BR, DVB), ACC)
    for i0 in tl.range(0, N, BC):
        i = i0 + tl.arange(0, BC)
        pre_now = pre
        w_now = w
        if RELOAD:
            if PRE:
                pre_now = kronecker(pre_mix + i0 * ZERO, H, HP, False, ACC).to(ZT)
            w_now = scaled_kronecker(mix + i0 * ZERO, size, H, HP, False, DT, ACC)
        row_maxes = row_values(row_max + statistics, i, N, NS, 0.0, HP)[:, None, :]
        row_scales = row_values(row_scale + statistics, i, N, NS, mean, HP)[:, None, :]
        s = products(held, k, j, M, k_h, k_n, q, i, N, q_h, q_n, H, HP, D, DB, DT, HOLD, PREC, ACC)
        z = logits(s, pre_now, factor, HP, BR, BC, 1, PRE, ZT, ZPREC, ACC)
        p = tl.where((j < M)[None, :, None], tl.exp2(z - row_maxes) * row_scales - mean, 0.0)
        mixed = mixed_maps(w_now, size * (1.0 / PS), constant, (p * PS).to(DT), HP, BR, BC, 1, PREC, ACC)
        if LAYER:
            normalised, _ = layer_norm(mixed, (j < M)[:, None] & (i < N)[None, :], eps, H, HP)
            mixed = normalised * gain + added
        y = load_heads(dout, i, N, c0, o_h, o_n, H, HP, DV, DVB, DT)
        acc = tl.dot(mixed.to(DT), y, acc, input_precision=PREC, out_dtype=ACC)
    store_heads(dv + image * dv_b, acc, j, M, c0, dv_h, dv_n, H, HP, DV, DVB)


class Mixed:
    """What is done with the maps: the mix, perhaps a layer norm, and the product with v."""

    def __init__(self, v, dout, mix, bias, centred, norm_weight, norm_bias, eps):
        self.v_given = v
        self.v, self.dout = aligned(v), None if dout is None else aligned(dout)
        self.mix, self.bias, self.centred = mix, bias, centred
        self.norm_weight, self.norm_bias, self.eps = norm_weight, norm_bias, split(eps)
        self.width = self.v.shape[3]


def forward(
    q, k, v, scale, pre_mix, pre_bias, mix, bias, centred, norm_weight, norm_bias, eps, needs_out, needs_gram
):  # fmt: skip
    """As `vitdiv::reattention_fwd`: (out, centred Gram), an empty tensor for what is not needed."""
    maps = Maps(q, k, scale, pre_mix, pre_bias)
    row_max, row_scale, _, gram = maps.softmax(gram=needs_gram, statistics=needs_out)
    out = nothing(q)
    if needs_out:
        mixed = Mixed(v, None, mix, bias, centred, norm_weight, norm_bias, eps)
        out = _output(maps, mixed, (row_max, row_scale))
    return out, gram if needs_gram else nothing(q)


def backward(
    dout, coupling, q, k, v, scale, pre_mix, pre_bias, mix, bias, centred, norm_weight, norm_bias, eps, needs
):  # fmt: skip
    """As `vitdiv::reattention_bwd`: dq, dk, dv, dpre_mix, dmix, dbias, dnorm_weight, dnorm_bias."""
    needs_dq, needs_dk, needs_dv, needs_dpre_mix, needs_dmix, needs_dnorm = needs
    maps = Maps(q, k, scale, pre_mix, pre_bias)
    mixed = None if dout is None else Mixed(v, dout, mix, bias, centred, norm_weight, norm_bias, eps)
    of_maps = needs_dq or needs_dk or needs_dpre_mix
    row_max, row_scale, row_dot, _ = maps.softmax(coupling if of_maps and mixed is None else None)
    statistics = row_max, row_scale
    dmix = dbias = dnorm_weight = dnorm_bias = dv = None
    if mixed is not None and (of_maps or needs_dmix or needs_dnorm):
        row_dot, dmix, dbias, dnorm_weight, dnorm_bias = _parameters(
            maps, mixed, coupling, statistics, of_maps, needs_dmix, needs_dnorm
        )
    dq, dk, dpre_mix = maps.gradients(
        statistics, row_dot, coupling, mixed, needs_dq, needs_dk, needs_dpre_mix
    )
    if needs_dv:
        dv = _value_gradient(maps, mixed, statistics)
    accumulation = accumulation_dtype(q)
    parameters = (
        None if x is None else x.to(accumulation) for x in (dpre_mix, dmix, dbias, dnorm_weight, dnorm_bias)
    )
    return tuple(or_else(x, nothing(q)) for x in (dq, dk, dv, *parameters))


def _constants(maps, mixed, t):
    return dict(
        H=maps.heads, H1=maps.first_heads, HP=maps.padded, D=maps.width, DB=t.width, DV=mixed.width,
        DVB=t.width, BR=t.rows, BC=t.columns, PRE=maps.pre_mix is not None, CENTRED=mixed.centred,
        BIAS=mixed.bias is not None, LAYER=mixed.norm_weight is not None, HOLD=t.hold, RELOAD=t.reload,
        **maps.numbers(),
    )  # fmt: skip


def _matrices(maps, mixed):
    tensors = maps.pre_mix, mixed.mix, mixed.bias, mixed.norm_weight
    return tuple(or_else(x, maps.q) for x in tensors)


def _sizes(maps, mixed):
    return maps.queries, maps.keys, maps.row_stride, *maps.factors, *mixed.eps


def _output(maps, mixed, statistics):
    t = maps.tile("output_sweep", mixed.norm_weight is not None)
    tiles = triton.cdiv(maps.queries, t.rows)
    out, written = aligned_empty(maps.q_given)
    launch(
        output_sweep, (tiles * maps.images, triton.cdiv(mixed.width, t.width)),
        *located(maps.q), *located(maps.k), *located(mixed.v), *located(written), *_matrices(maps, mixed),
        or_else(mixed.norm_bias, maps.q), *statistics, tiles, 0, *_sizes(maps, mixed),
        **options(t), **_constants(maps, mixed, t),
    )  # fmt: skip
    return deliver(out, written)


def _parameters(maps, mixed, coupling, statistics, needs_row_dot, needs_dmix, needs_dnorm):
    """(row_dot, dmix, dbias, dnorm_weight, dnorm_bias); None for what is not needed."""
    t = maps.tile("parameter_sweep", mixed.norm_weight is not None)
    tiles = triton.cdiv(maps.queries, t.rows)
    kron, heads = max(16, maps.padded), maps.heads
    row_dot = maps.rows() if needs_row_dot else maps.q
    matrices = maps.empty(maps.images, tiles, kron, kron) if needs_dmix else maps.q
    vectors = maps.empty(maps.images, tiles, 3, maps.padded) if needs_dmix or needs_dnorm else maps.q
    for does_row_dot, does_dmix, does_dnorm in parts(t, needs_row_dot, needs_dmix, needs_dnorm):
        launch(
            parameter_sweep, (tiles * maps.images,), *located(maps.q), *located(maps.k), *located(mixed.v),
            *located(mixed.dout), *_matrices(maps, mixed), *with_image_stride(coupling, maps.q), *statistics,
            row_dot, matrices, vectors, tiles, 0, *_sizes(maps, mixed), **options(t),
            COUPLING=coupling is not None and does_row_dot, NEED_ROW_DOT=does_row_dot, NEED_DMIX=does_dmix,
            NEED_DNORM=does_dnorm, W=warp_split(maps.padded, t), **_constants(maps, mixed, t),
        )  # fmt: skip
    dmix = dbias = dnorm_weight = dnorm_bias = None
    if needs_dmix:
        dmix = uncouple(matrices, heads).sum(0)
        dbias = vectors[:, :, 0, :heads].sum((0, 1), dtype=torch.float64)
        if not mixed.centred:
            dmix = dmix + dbias.unsqueeze(1) / maps.keys
    if needs_dnorm:
        dnorm_weight, dnorm_bias = vectors[:, :, 1:, :heads].sum((0, 1), dtype=torch.float64)
    return row_dot, dmix, dbias, dnorm_weight, dnorm_bias


def _value_gradient(maps, mixed, statistics):
    t = maps.tile("value_gradient", mixed.norm_weight is not None)
    tiles = triton.cdiv(maps.keys, t.rows)
    dv, written = aligned_empty(mixed.v_given)
    launch(
        value_gradient, (tiles * maps.images, triton.cdiv(mixed.width, t.width)),
        *located(maps.q), *located(maps.k), *located(mixed.dout), *located(written), *_matrices(maps, mixed),
        or_else(mixed.norm_bias, maps.q), *statistics, tiles, 0, *_sizes(maps, mixed),
        **options(t), **_constants(maps, mixed, t),
    )  # fmt: skip
    return deliver(dv, written)
