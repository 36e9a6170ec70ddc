"""Triton kernels that attention_gram and re-attention share: softmax and the gradients of q and k.

Names are set to any tensor at hand (`pre = factor`) where a call does not need them: Triton wants them set on
every way to where they are used. ZERO is 0 as an argument: a load with an offset of j0 * ZERO stays in the
loop (RELOAD), where the compiler would move one of the same address out of it and hold what is loaded.
"""

import triton
import triton.language as tl

from ..._launch import double, to_tf32
from .heads import (
    couple,
    factors,
    head_values,
    hold_heads,
    kronecker,
    load_heads,
    magnitude,
    mix_heads,
    natural,
    products,
    row_values,
    scaled_kronecker,
    store_coupled,
    store_heads,
)


@triton.jit
def logits(
    s, pre, factor, HP: tl.constexpr, A: tl.constexpr, B: tl.constexpr, KEYS: tl.constexpr, PRE: tl.constexpr,
    ZT: tl.constexpr, ZPREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Logits to the base of 2 of a tile of products."""
    if PRE:
        if ZPREC == "rounded tf32":
            s = mix_heads(to_tf32(pre), to_tf32(s), HP, A, B, KEYS, "tf32", ACC)
        else:
            s = mix_heads(pre, s.to(ZT), HP, A, B, KEYS, ZPREC, ACC)
    return s * factor


@triton.jit
def mixed_maps(
    mix, size, constant, centred, HP: tl.constexpr, A: tl.constexpr, B: tl.constexpr, KEYS: tl.constexpr,
    PREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    return mix_heads(mix, centred, HP, A, B, KEYS, PREC, ACC) * size + constant


@triton.jit
def mix_constant(
    mix, bias, mean, H: tl.constexpr, HP: tl.constexpr, CENTRED: tl.constexpr, BIAS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """What stands beside the mix of centred maps, [HP, 1, 1]: bias + sum_h mix[g, h] / M, unless CENTRED."""
    constant = tl.zeros((HP, 1, 1), ACC)
    if not CENTRED:
        g = tl.arange(0, HP)
        mask = (g < H)[:, None] & (g < H)[None, :]
        weights = tl.load(mix + g[:, None] * H + g[None, :], mask=mask, other=0.0).to(ACC)
        constant += (tl.sum(weights, 1) * mean)[:, None, None]
    if BIAS:
        constant += head_values(bias, H, HP, ACC)
    return constant


@triton.jit
def layer_norm(mixed, valid, eps, H: tl.constexpr, HP: tl.constexpr):
    """((mixed - mean) rstd over heads, rstd = 1 / sqrt(var + eps) [rows, columns]); 0 outside of `valid`."""
    inside = (tl.arange(0, HP) < H)[:, None, None]
    deviation = tl.where(inside, mixed - (tl.sum(mixed, 0) / H)[None, :, :], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(deviation * deviation, 0) / H + eps)
    # with eps = 0 that of the padding is Inf
    rstd = tl.where(valid, rstd, 0.0)
    return deviation * rstd[None, :, :], rstd


@triton.jit
def layer_norm_gradient(dy, normalised, rstd, weight, H: tl.constexpr):
    dn = dy * weight
    mean = tl.sum(dn, 0) / H
    projection = tl.sum(dn * normalised, 0) / H
    return rstd[None, :, :] * (dn - mean[None, :, :] - normalised * projection[None, :, :])


@triton.jit(do_not_specialize=["tiles", "N", "M"])
def softmax_sweep(
    q, q_b, q_h, q_n,  # [B, H, N, d] and its strides
    k, k_b, k_h, k_n,  # [B, H, M, d]
    pre_mix,  # [H, H]
    pre_bias,  # [H]
    coupling, coupling_b,  # [B or 1, H, H], the stride over images
    row_max, row_scale, row_dot,  # [B, HP, NS]
    gram,  # [B, tiles, HP, HP]
    tiles, ZERO, N, M, NS,  # tiles of an image; queries, keys, queries padded
    factor_high, factor_low, factor2_high, factor2_low,
    H: tl.constexpr, H1: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr, PRE: tl.constexpr, PRE_BIAS: tl.constexpr, STATISTICS: tl.constexpr,
    GRAM: tl.constexpr, ROW_DOT: tl.constexpr, HOLD: tl.constexpr, RELOAD: tl.constexpr, PS: tl.constexpr,
    DT: tl.constexpr, ZT: tl.constexpr, PREC: tl.constexpr, ZPREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """L = pre_mix (scale q k^T) / ln 2,  row_max = max_j L,  row_scale = 1 / sum_j 2^(L - row_max),  and of
    A = 2^(L - row_max) row_scale the centred Gram matrix, in one pass over the keys: summed over the rows of
    a tile (GRAM) or, row by row, against the coupling C (ROW_DOT):

        row_dot_h[i] = sum_j A_h dA_h = sum_k C[h,k] sum_j (A_h - 1/M) (A_k - 1/M)

    The Gram matrix is kept per row, [BR, HP, HP], so that it can follow the row's maximum. It is of e -
    pivot, e the exponentials and the pivot their mean over the first keys: what nearly uniform maps have in
    common is gone before anything is rounded, and sum (e - mean)^2 = sum (e - pivot)^2 - (sum (e - pivot))^2
    / M loses no digits there.
    """
    pid = tl.program_id(0)
    image = (pid // tiles).to(tl.int64)
    i = (pid % tiles) * BR + tl.arange(0, BR)
    h = tl.arange(0, HP)
    q += image * q_b
    k += image * k_b
    factor = factors(factor_high, factor_low, factor2_high, factor2_low, H1, HP, ACC)
    held = hold_heads(q, i, N, q_h, q_n, H, HP, D, DB, DT, HOLD)
    pre = factor
    if PRE:
        pre = kronecker(pre_mix, H, HP, False, ACC).to(ZT)
    top = tl.full((HP, BR), float("-inf"), ACC)
    total = tl.zeros((HP, BR), ACC)
    if GRAM or ROW_DOT:
        pivot = tl.zeros((HP, BR), ACC)
        rounded_total = tl.zeros((HP, BR), ACC)
        acc = tl.zeros((BR, HP, HP), ACC)
        first_keys = tl.full((), tl.minimum(M, BC), ACC)
    for j0 in tl.range(0, M, BC):
        j = j0 + tl.arange(0, BC)
        pre_now = pre
        if RELOAD:
            if PRE:
                pre_now = kronecker(pre_mix + j0 * ZERO, H, HP, False, ACC).to(ZT)
        inside = (j < M)[None, None, :]
        s = products(held, q, i, N, q_h, q_n, k, j, M, k_h, k_n, H, HP, D, DB, DT, HOLD, PREC, ACC)
        z = logits(s, pre_now, factor, HP, BR, BC, 2, PRE, ZT, ZPREC, ACC)
        z = tl.where(inside, z, float("-inf"))
        next_top = tl.maximum(top, tl.max(z, 2))
        # a row of -Inf alone is NaN by 0 * 1/0, but -Inf so far and finite later is not
        base = tl.where(next_top == float("-inf"), 0.0, next_top)
        fade = tl.exp2(top - base)
        e = tl.exp2(z - base[:, :, None])
        top = next_top
        if GRAM or ROW_DOT:
            pivot = tl.where(j0 == 0, tl.sum(e, 2) / first_keys, pivot * fade)
            e = tl.where(inside, e - pivot[:, :, None], 0.0)
            rounded = (e * PS).to(DT)
            rounded_total = rounded_total * fade + tl.sum(rounded.to(ACC), 2)
            rows = tl.permute(rounded, (1, 0, 2))  # [BR, HP, BC]
            fade_t = tl.trans(fade)
            acc = acc * (fade_t[:, :, None] * fade_t[:, None, :])
            acc = tl.dot(rows, tl.permute(rows, (0, 2, 1)), acc, input_precision=PREC, out_dtype=ACC)
        total = total * fade + tl.sum(e, 2)
    if GRAM or ROW_DOT:
        total += pivot * tl.full((), M, ACC)
    row_scales = 1.0 / total
    if PRE_BIAS:
        # added to a row of logits it changes no softmax, unless it is not finite
        added = tl.load(pre_bias + h, mask=h < H, other=0.0).to(ACC)
        row_scales += (added - added)[:, None]
    if STATISTICS:
        offsets = (image * HP + h[:, None]) * NS + i[None, :]
        mask = (i < N)[None, :] & (h < HP)[:, None]
        tl.store(row_max + offsets, tl.where(top == float("-inf"), 0.0, top), mask=mask)
        tl.store(row_scale + offsets, row_scales, mask=mask)
    if GRAM or ROW_DOT:
        sums = tl.trans(rounded_total) * (1.0 / PS)
        row_scales_t = tl.trans(row_scales)
        acc = acc * (1.0 / (PS * PS)) - sums[:, :, None] * sums[:, None, :] / tl.full((), M, ACC)
        acc = acc * (row_scales_t[:, :, None] * row_scales_t[:, None, :])
        if GRAM:
            tl.store(gram + pid.to(tl.int64) * HP * HP + h[:, None] * HP + h[None, :], tl.sum(acc, 0))
        if ROW_DOT:
            inside_c = (h < H)[:, None] & (h < H)[None, :]
            c = tl.load(
                coupling + image * coupling_b + h[:, None] * H + h[None, :], mask=inside_c, other=0.0
            ).to(ACC)
            d = tl.trans(tl.sum(acc * c[None, :, :], 2))
            tl.store(
                row_dot + (image * HP + h[:, None]) * NS + i[None, :],
                d,
                mask=(i < N)[None, :] & (h < HP)[:, None],
            )


@triton.jit
def reload_matrices(
    pre, pre_t, w, wt, c,  # as held
    pre_mix, mix, coupling, image, coupling_b, pre_size, size, c_size, offset,
    H: tl.constexpr, HP: tl.constexpr, PRE: tl.constexpr, PRE_T: tl.constexpr, W: tl.constexpr,
    WT: tl.constexpr, C: tl.constexpr, DT: tl.constexpr, ZT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The matrices of a step of a loop, those that have a flag made again from `offset`, which is 0."""
    if PRE:
        pre = kronecker(pre_mix + offset, H, HP, False, ACC).to(ZT)
    if W:
        w = scaled_kronecker(mix + offset, size, H, HP, False, DT, ACC)
    if WT:
        wt = scaled_kronecker(mix + offset, size, H, HP, True, DT, ACC)
    if C:
        c = scaled_kronecker(coupling + image * coupling_b + offset, c_size, H, HP, False, DT, ACC)
    if PRE_T:
        pre_t = scaled_kronecker(pre_mix + offset, pre_size, H, HP, True, DT, ACC)
    return pre, pre_t, w, wt, c


@triton.jit
def maps_gradient(
    dy, centred, valid, mix, mix_t, size, constant, norm_weight, eps, c, c_size, H: tl.constexpr,
    HP: tl.constexpr, A: tl.constexpr, B: tl.constexpr, KEYS: tl.constexpr, DOUT: tl.constexpr,
    LAYER: tl.constexpr, COUPLING: tl.constexpr, PS: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of maps from that of the normed mix (DOUT) and of the Gram matrix (COUPLING);
    without DOUT it is to be multiplied by c_size. The centred maps serve the latter too: a constant along a
    row of the maps' gradient has no effect on that of the logits."""
    if DOUT:
        if LAYER:
            mixed = mixed_maps(mix, size * (1.0 / PS), constant, centred, HP, A, B, KEYS, PREC, ACC)
            normalised, rstd = layer_norm(mixed, valid, eps, H, HP)
            dy = layer_norm_gradient(dy, normalised, rstd, norm_weight, H)
        d = mix_heads(mix_t, dy.to(DT), HP, A, B, KEYS, PREC, ACC) * size
        if COUPLING:
            d += mix_heads(c, centred, HP, A, B, KEYS, PREC, ACC) * (c_size * (1.0 / PS))
    else:
        d = mix_heads(c, centred, HP, A, B, KEYS, PREC, ACC) * (1.0 / PS)
    return d


@triton.jit(do_not_specialize=["tiles", "N", "M"])
def query_gradient(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, dout, o_b, o_h, o_n, dq, dq_b, dq_h, dq_n, pre_mix,
    mix, bias, norm_weight, coupling, coupling_b, row_max, row_scale, row_dot, dpre_mix, tiles, ZERO, N, M,
    NS, factor_high, factor_low, factor2_high, factor2_low, eps_high, eps_low, H: tl.constexpr,
    H1: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, DV: tl.constexpr,
    DVB: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, PRE: tl.constexpr, CENTRED: tl.constexpr,
    BIAS: tl.constexpr, DOUT: tl.constexpr, LAYER: tl.constexpr, COUPLING: tl.constexpr,
    NEED_DQ: tl.constexpr, NEED_DPRE: tl.constexpr, W: tl.constexpr, HOLD: tl.constexpr,
    RELOAD: tl.constexpr, PS: tl.constexpr, DT: tl.constexpr, ZT: tl.constexpr, PREC: tl.constexpr,
    ZPREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dL = A (dA - row_dot),  dZ = pre_mix^T dL,  dq = scale sum_j dZ k,  dpre_mix = sum_ij dL Z^T: DB
    columns of dq of a tile of queries, and the tile's part of dpre_mix less a factor ln 2."""
    pid = tl.program_id(0)
    image = (pid // tiles).to(tl.int64)
    i = (pid % tiles) * BR + tl.arange(0, BR)
    if D > DB:
        c0 = tl.program_id(1) * DB
    else:
        c0 = 0
    q += image * q_b
    k += image * k_b
    statistics = image * HP * NS
    mean = 1.0 / tl.full((), M, ACC)
    factor = factors(factor_high, factor_low, factor2_high, factor2_low, H1, HP, ACC)
    held_q = hold_heads(q, i, N, q_h, q_n, H, HP, D, DB, DT, HOLD)
    held_o, pre, pre_t, w, wt = held_q, factor, factor, factor, factor
    pre_size, size, constant, gain = mean, mean, factor, factor
    if PRE:
        pre_acc = kronecker(pre_mix, H, HP, False, ACC)
        pre = pre_acc.to(ZT)
        pre_size = magnitude(pre_acc, DT, ACC)
        pre_t = scaled_kronecker(pre_mix, pre_size, H, HP, True, DT, ACC)
    if DOUT:
        v += image * v_b
        dout += image * o_b
        held_o = hold_heads(dout, i, N, o_h, o_n, H, HP, DV, DVB, DT, HOLD)
        w_acc = kronecker(mix, H, HP, False, ACC)
        size = magnitude(w_acc, DT, ACC)
        wt = scaled_kronecker(mix, size, H, HP, True, DT, ACC)
        if LAYER:
            w = (w_acc / size).to(DT)
            constant = mix_constant(mix, bias, mean, H, HP, CENTRED, BIAS, ACC)
            gain = head_values(norm_weight, H, HP, ACC)
    eps = double(eps_high, eps_low, ACC)
    c, c_size = factor, mean
    if COUPLING:
        c_acc = kronecker(coupling + image * coupling_b, H, HP, False, ACC)
        c_size = magnitude(c_acc, DT, ACC)
        c = (c_acc / c_size).to(DT)
    row_maxes = row_values(row_max + statistics, i, N, NS, 0.0, HP)[:, :, None]
    row_scales = row_values(row_scale + statistics, i, N, NS, mean, HP)[:, :, None]
    row_dots = row_values(row_dot + statistics, i, N, NS, 0.0, HP)[:, :, None]
    if not DOUT:
        row_dots = row_dots / c_size
    acc = tl.zeros((HP, BR, DB), ACC)
    if NEED_DPRE:
        pre_sums = tl.zeros((W, 16 if HP < 16 else HP, 16 if HP < 16 else HP), ACC)
    for j0 in tl.range(0, M, BC):
        j = j0 + tl.arange(0, BC)
        pre_now, pre_t_now, w_now, wt_now, c_now = pre, pre_t, w, wt, c
        if RELOAD:
            pre_now, pre_t_now, w_now, wt_now, c_now = reload_matrices(
                pre, pre_t, w, wt, c, pre_mix, mix, coupling, image, coupling_b, pre_size, size, c_size,
                j0 * ZERO, H, HP, PRE, PRE, DOUT and LAYER, DOUT, COUPLING, DT, ZT, ACC,
            )  # fmt: skip
        inside = (j < M)[None, None, :]
        s = products(held_q, q, i, N, q_h, q_n, k, j, M, k_h, k_n, H, HP, D, DB, DT, HOLD, PREC, ACC)
        z = logits(s, pre_now, factor, HP, BR, BC, 2, PRE, ZT, ZPREC, ACC)
        p = tl.where(inside, tl.exp2(z - row_maxes) * row_scales, 0.0)
        centred = (tl.where(inside, p - mean, 0.0) * PS).to(DT)
        dy = p
        if DOUT:
            dy = products(
                held_o, dout, i, N, o_h, o_n, v, j, M, v_h, v_n, H, HP, DV, DVB, DT, HOLD, PREC, ACC
            )
        valid = (i < N)[:, None] & (j < M)[None, :]
        d = maps_gradient(
            dy, centred, valid, w_now, wt_now, size, constant, gain, eps, c_now, c_size, H, HP, BR, BC, 2,
            DOUT, LAYER, COUPLING, PS, DT, PREC, ACC,
        )  # fmt: skip
        d = p * (d - row_dots)
        if not DOUT:
            d = d * PS
        dz = d.to(DT)
        if NEED_DPRE:
            pre_sums = couple(pre_sums, dz, (s * factor).to(DT), HP, BR, BC, W, PREC, ACC)
        if NEED_DQ:
            if PRE:
                dz = (mix_heads(pre_t_now, dz, HP, BR, BC, 2, PREC, ACC) * pre_size).to(DT)
            y = load_heads(k, j, M, c0, k_h, k_n, H, HP, D, DB, DT)
            acc = tl.dot(dz, y, acc, input_precision=PREC, out_dtype=ACC)
    if NEED_DQ:
        acc = acc * natural(factor)
        if not DOUT:
            acc = acc * (c_size * (1.0 / PS))
        store_heads(dq + image * dq_b, acc, i, N, c0, dq_h, dq_n, H, HP, D, DB)
    if NEED_DPRE:
        if not DOUT:
            pre_sums = pre_sums * (c_size * (1.0 / PS))
        if tl.program_id(1) == 0:
            ROWS: tl.constexpr = 16 if HP < 16 else HP
            store_coupled(dpre_mix + pid.to(tl.int64) * ROWS * ROWS, pre_sums, HP, W)


@triton.jit(do_not_specialize=["tiles", "N", "M"])
def key_gradient(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, dout, o_b, o_h, o_n, dk, dk_b, dk_h, dk_n, pre_mix,
    mix, bias, norm_weight, coupling, coupling_b, row_max, row_scale, row_dot, tiles, ZERO, N, M, NS,
    factor_high, factor_low, factor2_high, factor2_low, eps_high, eps_low, H: tl.constexpr, H1: tl.constexpr,
    HP: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, DV: tl.constexpr, DVB: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, PRE: tl.constexpr, CENTRED: tl.constexpr, BIAS: tl.constexpr,
    DOUT: tl.constexpr, LAYER: tl.constexpr, COUPLING: tl.constexpr, HOLD: tl.constexpr,
    RELOAD: tl.constexpr, PS: tl.constexpr, DT: tl.constexpr, ZT: tl.constexpr, PREC: tl.constexpr,
    ZPREC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dL = A (dA - row_dot),  dZ = pre_mix^T dL,  dk = scale sum_i dZ q: DB columns of dk of a tile of BR
    keys, from transposed tiles [HP, keys, queries]."""
    pid = tl.program_id(0)
    image = (pid // tiles).to(tl.int64)
    j = (pid % tiles) * BR + tl.arange(0, BR)
    if D > DB:
        c0 = tl.program_id(1) * DB
    else:
        c0 = 0
    q += image * q_b
    k += image * k_b
    statistics = image * HP * NS
    mean = 1.0 / tl.full((), M, ACC)
    factor = factors(factor_high, factor_low, factor2_high, factor2_low, H1, HP, ACC)
    held_k = hold_heads(k, j, M, k_h, k_n, H, HP, D, DB, DT, HOLD)
    held_v, pre, pre_t, w, wt = held_k, factor, factor, factor, factor
    pre_size, size, constant, gain = mean, mean, factor, factor
    if PRE:
        pre_acc = kronecker(pre_mix, H, HP, False, ACC)
        pre = pre_acc.to(ZT)
        pre_size = magnitude(pre_acc, DT, ACC)
        pre_t = scaled_kronecker(pre_mix, pre_size, H, HP, True, DT, ACC)
    if DOUT:
        v += image * v_b
        dout += image * o_b
        held_v = hold_heads(v, j, M, v_h, v_n, H, HP, DV, DVB, DT, HOLD)
        w_acc = kronecker(mix, H, HP, False, ACC)
        size = magnitude(w_acc, DT, ACC)
        wt = scaled_kronecker(mix, size, H, HP, True, DT, ACC)
        if LAYER:
            w = (w_acc / size).to(DT)
            constant = mix_constant(mix, bias, mean, H, HP, CENTRED, BIAS, ACC)
            gain = head_values(norm_weight, H, HP, ACC)
    eps = double(eps_high, eps_low, ACC)
    c, c_size = factor, mean
    if COUPLING:
        c_acc = kronecker(coupling + image * coupling_b, H, HP, False, ACC)
        c_size = magnitude(c_acc, DT, ACC)
        c = (c_acc / c_size).to(DT)
    inside = (j < M)[None, :, None]
    acc = tl.zeros((HP, BR, DB), ACC)
    for i0 in tl.range(0, N, BC):
        i = i0 + tl.arange(0, BC)
        pre_now, pre_t_now, w_now, wt_now, c_now = pre, pre_t, w, wt, c
        if RELOAD:
            pre_now, pre_t_now, w_now, wt_now, c_now = reload_matrices(
                pre, pre_t, w, wt, c, pre_mix, mix, coupling, image, coupling_b, pre_size, size, c_size,
                i0 * ZERO, H, HP, PRE, PRE, DOUT and LAYER, DOUT, COUPLING, DT, ZT, ACC,
            )  # fmt: skip
        row_maxes = row_values(row_max + statistics, i, N, NS, 0.0, HP)[:, None, :]
        row_scales = row_values(row_scale + statistics, i, N, NS, mean, HP)[:, None, :]
        row_dots = row_values(row_dot + statistics, i, N, NS, 0.0, HP)[:, None, :]
        if not DOUT:
            row_dots = row_dots / c_size
        if DT == tl.float32 and not DOUT:  # noqa: SIM300
            # q times k, as in the sweep for the statistics: where logits are large, their last bit, which
            # another order of sums changes, is much of a map that should be 0 or 1. With DOUT it spills.
            s = products((), q, i, N, q_h, q_n, k, j, M, k_h, k_n, H, HP, D, DB, DT, False, PREC, ACC)
            s = tl.permute(s, (0, 2, 1))
        else:
            s = products(held_k, k, j, M, k_h, k_n, q, i, N, q_h, q_n, H, HP, D, DB, DT, HOLD, PREC, ACC)
        z = logits(s, pre_now, factor, HP, BR, BC, 1, PRE, ZT, ZPREC, ACC)
        p = tl.where(inside, tl.exp2(z - row_maxes) * row_scales, 0.0)
        centred = (tl.where(inside, p - mean, 0.0) * PS).to(DT)
        dy = p
        if DOUT:
            dy = products(
                held_v, v, j, M, v_h, v_n, dout, i, N, o_h, o_n, H, HP, DV, DVB, DT, HOLD, PREC, ACC
            )
        valid = (j < M)[:, None] & (i < N)[None, :]
        d = maps_gradient(
            dy, centred, valid, w_now, wt_now, size, constant, gain, eps, c_now, c_size, H, HP, BR, BC, 1,
            DOUT, LAYER, COUPLING, PS, DT, PREC, ACC,
        )  # fmt: skip
        d = p * (d - row_dots)
        if not DOUT:
            d = d * PS
        dz = d.to(DT)
        if PRE:
            dz = (mix_heads(pre_t_now, dz, HP, BR, BC, 1, PREC, ACC) * pre_size).to(DT)
        y = load_heads(q, i, N, c0, q_h, q_n, H, HP, D, DB, DT)
        acc = tl.dot(dz, y, acc, input_precision=PREC, out_dtype=ACC)
    acc = acc * natural(factor)
    if not DOUT:
        acc = acc * (c_size * (1.0 / PS))
    store_heads(dk + image * dk_b, acc, j, M, c0, dk_h, dk_n, H, HP, D, DB)
