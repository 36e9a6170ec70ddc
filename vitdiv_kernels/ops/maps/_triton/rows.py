"""The row kernels: all that happens to the maps between two matrix products.

A tile holds the logits of all heads for SHARE query rows: tile row r is head r % H of query row r // H, and
T = 16, 32, ... tile rows are what a tensor-core product needs. A mix over heads is then one product with the
[T, T] matrix that has the [H, H] one SHARE times on its diagonal, so few heads do not leave most of it idle.
A row longer than BLOCK keys is walked in blocks (ONE_BLOCK is False): once for the softmax's statistics, once
more for each thing that needs a whole row before it; it comes from L1 then.

Names are set to any tensor at hand (`gain, offset = shift, shift`) where a call does not need them: Triton
wants them set on every way to where they are used.

Names of constants, here and in products.py: H heads, SHARE query rows of T tile rows; ROWS, COLUMNS, INNER,
WIDTH, BLOCK, STEP are sizes, of a tile or of a step; SPLIT, TILES, STEPS are numbers of parts. HAS_.. tells
whether an input is given, NEEDS_.. whether a result is wanted, STORES_.. whether a launch leaves it in
memory, and an adjective (CENTRED, RELOAD, TRANSPOSED, ONE_BLOCK) how it is made. DOT is the element type of
the factors of products, PRECISION theirs if float32, ACC that of all else; BOOST lifts factors in float16.
"""

import triton
import triton.language as tl


@triton.jit
def tile_rows(H: tl.constexpr, SHARE: tl.constexpr, T: tl.constexpr):
    """Of each tile row: its head, its query row in the tile, whether it is one; which rows share one."""
    r = tl.arange(0, T)
    share = r // H
    used = r < SHARE * H
    together = (share[:, None] == share[None, :]) & used[:, None] & used[None, :]
    return r % H, share, used, together


@triton.jit
def diagonal_blocks(matrix, head, together, TRANSPOSED: tl.constexpr, H: tl.constexpr):
    """[H, H] in memory -> [T, T], once per query row of the tile."""
    if TRANSPOSED:
        offsets = head[None, :] * H + head[:, None]
    else:
        offsets = head[:, None] * H + head[None, :]
    return tl.load(matrix + offsets, mask=together, other=0.0)


@triton.jit
def matrix_of(matrix, head, together, TRANSPOSED: tl.constexpr, RELOAD: tl.constexpr, H: tl.constexpr):
    """With RELOAD the pointer, for `mix_heads` to load from: a matrix held for the tensor cores costs 8 to 64
    registers a thread, times two in TF32x3."""
    if RELOAD:
        return matrix
    else:
        return diagonal_blocks(matrix, head, together, TRANSPOSED, H)


@triton.jit
def mix_heads(
    weight, x, head, together, TRANSPOSED: tl.constexpr, RELOAD: tl.constexpr, H: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """weight [T, T] (see `matrix_of`) times x [T, BLOCK]."""
    if RELOAD:
        held = diagonal_blocks(weight, head, together, TRANSPOSED, H)
    else:
        held = weight
    return tl.dot(held.to(DOT), x.to(DOT), input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def not_finite(value):
    return (value - value) != 0


@triton.jit
def without(x, lost, SHARE: tl.constexpr):
    """x [T, BLOCK], 0 in the rows `lost`, where a tile holds several query rows: zeros of a mix's matrix
    would carry NaN and Inf from one to the others. See `in_query_rows`."""
    if SHARE > 1:
        return tl.where(lost[:, None], 0.0, x)
    else:
        return x


@triton.jit
def in_query_rows(lost, together, SHARE: tl.constexpr, ACC: tl.constexpr):
    """[T]: NaN in all rows of a query row of which one is lost, else 0."""
    if SHARE > 1:
        return tl.sum(tl.where(together & lost[None, :], float("nan"), 0.0), 1).to(ACC)
    else:
        return tl.zeros_like(lost).to(ACC)


@triton.jit
def add_products(
    sums, x, y, SPLIT: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """sums + x y^T. [SPLIT, T, T]: keys are shared out, for [T, T] is too little for all warps. Or [T, T]:
    of a three-dimensional product every warp would make the whole."""
    if SPLIT == 1:
        x_parts, y_parts = x.to(DOT), tl.trans(y.to(DOT))
    else:
        x_parts = tl.permute(tl.reshape(x.to(DOT), (T, SPLIT, BLOCK // SPLIT)), (1, 0, 2))
        y_parts = tl.permute(tl.reshape(y.to(DOT), (T, SPLIT, BLOCK // SPLIT)), (1, 2, 0))
    return tl.dot(x_parts, y_parts, sums, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def no_products(SPLIT: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr):
    if SPLIT == 1:
        return tl.zeros((T, T), ACC)
    else:
        return tl.zeros((SPLIT, T, T), ACC)


@triton.jit
def all_products(sums, SPLIT: tl.constexpr):
    if SPLIT == 1:
        return sums
    else:
        return tl.sum(sums, 0)


@triton.jit
def load_logits(
    z_rows, j, live, keys, padded_keys, pre, pre_shift, head, together, HAS_PRE: tl.constexpr,
    RELOAD: tl.constexpr, H: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(raw logits; what goes into the softmax, -inf past the keys)"""
    if HAS_PRE:
        raw = load_maps(z_rows, j, live, padded_keys, 0.0).to(ACC)
        logits = mix_heads(pre, raw, head, together, False, RELOAD, H, DOT, PRECISION, ACC)
        logits = tl.where((j < keys)[None, :], logits + pre_shift[:, None], float("-inf"))
    else:
        raw = load_maps(z_rows, j, live, padded_keys, float("-inf")).to(ACC)
        logits = raw
    return raw, logits


@triton.jit
def load_maps(rows, j, live, padded_keys, other):
    """[T, BLOCK]. The mask is that of whole rows, padding too, which loads of 16 bytes need."""
    return tl.load(rows[:, None] + j[None, :], mask=live[:, None] & (j < padded_keys)[None, :], other=other)


@triton.jit
def exponentials(logits, top, ACC: tl.constexpr):
    """exp(logits - top). In float32 to the base of 2, by one multiply-add an element."""
    # all -inf: not inf - inf
    finite_top = tl.where(top == float("-inf"), 0.0, top)
    if ACC == tl.float64:  # noqa: SIM300
        return tl.exp(logits - finite_top[:, None])
    else:
        LOG2_E: tl.constexpr = 1.4426950408889634
        return tl.exp2(logits * LOG2_E - (finite_top * LOG2_E)[:, None])


@triton.jit
def add_to_statistics(logits, top, total, ACC: tl.constexpr):
    """The softmax's running maximum and sum of exponentials, per tile row, with one block more."""
    new_top = tl.maximum(top, tl.max(logits, 1))
    finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    total = total * tl.exp(top - finite_top) + tl.sum(exponentials(logits, new_top, ACC), 1)
    return new_top, total


@triton.jit
def softmax_terms(logits, top, total, used, ONE_BLOCK: tl.constexpr, ACC: tl.constexpr):
    """(exp(logits - top), top, total); of one block alone the statistics are made here."""
    if ONE_BLOCK:
        top = tl.max(logits, 1)
    exponential = exponentials(logits, top, ACC)
    if ONE_BLOCK:
        total = tl.sum(exponential, 1)
    # so that of rows past the tile's a compiler makes nothing, where a thread has no others
    return tl.where(used[:, None], exponential, 0.0), top, total


@triton.jit
def layer_norm(
    mixed, used, inside, norm_weight, norm_bias, EPS: tl.constexpr, H: tl.constexpr, ACC: tl.constexpr
):
    """(normalised over the heads, with weight and bias, 1 / standard deviation [BLOCK]); SHARE is 1.

    The last is 0 past the keys, where maps are 0 for all heads and have no deviation to divide by.
    """
    mean = tl.sum(mixed, 0) / H
    deviation = tl.where(used[:, None], mixed - mean[None, :], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(deviation * deviation, 0) / H + tl.full((), EPS, ACC))
    rstd = tl.where(inside, rstd, 0.0)
    normalised = deviation * rstd[None, :]
    return normalised, normalised * norm_weight[:, None] + norm_bias[:, None], rstd


@triton.jit(do_not_specialize=["rows", "keys", "tiles", "programs"])
def forward_rows(
    z,  # [B, H, rows, padded_keys]
    pre_mix,  # [H, H], or None, as all that follows may be
    pre_bias,  # [H]
    mix,  # [H, H]
    bias,  # [H]
    norm_weight,  # [H]
    norm_bias,  # [H]
    grams,  # [B, programs, T, T]
    rows,
    keys,
    padded_keys,
    tiles,  # of a program
    programs,  # of an image
    gram_stride,  # from image to image
    EPS: tl.constexpr, CENTRED: tl.constexpr, NEEDS_OUT: tl.constexpr, NEEDS_GRAM: tl.constexpr,
    H: tl.constexpr, SHARE: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr, RELOAD: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BOOST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A = softmax(pre_mix z + pre_bias),  X = mix A + bias,  Y = X or its layer norm over heads, which takes
    the place of z; and of A - 1/M the Gram matrices."""
    HAS_PRE: tl.constexpr = pre_mix is not None
    LAYER: tl.constexpr = norm_weight is not None
    # one axis: the others of a grid end at 65535
    image, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    head, share, used, together = tile_rows(H, SHARE, T)
    z += image.to(tl.int64) * (H * rows) * padded_keys
    mean = (tl.full((), 1.0, ACC) / keys).to(ACC)

    pre, pre_shift = together, head
    if HAS_PRE:
        pre = matrix_of(pre_mix, head, together, False, RELOAD, H)
        pre_shift = tl.zeros((T,), ACC)
        if pre_bias is not None:
            pre_shift = tl.load(pre_bias + head, mask=used, other=0.0)
    if NEEDS_OUT:
        weight = matrix_of(mix, head, together, False, RELOAD, H)
        shift = tl.zeros((T,), ACC)
        if not CENTRED:
            shift += tl.sum(diagonal_blocks(mix, head, together, False, H), 1) * mean
        if bias is not None:
            shift += tl.load(bias + head, mask=used, other=0.0)
        gain, offset = shift, shift
        if LAYER:
            gain = tl.load(norm_weight + head, mask=used, other=0.0)
            offset = tl.load(norm_bias + head, mask=used, other=0.0)
    gram = no_products(SPLIT, T, ACC)

    # a constant number of tiles would be unrolled, and spill
    for tile in range(tiles):
        i = (program * tiles + tile) * SHARE + share
        live = used & (i < rows)
        z_rows = z + (head * rows + i).to(tl.int64) * padded_keys
        top = tl.full((T,), float("-inf"), ACC)
        total = tl.zeros((T,), ACC)
        if not ONE_BLOCK:
            for j0 in tl.range(0, keys, BLOCK):
                _, block_logits = load_logits(
                    z_rows, j0 + tl.arange(0, BLOCK), live, keys, padded_keys, pre, pre_shift, head,
                    together, HAS_PRE, RELOAD, H, DOT, PRECISION, ACC,
                )  # fmt: skip
                top, total = add_to_statistics(block_logits, top, total, ACC)
        for j0 in tl.range(0, BLOCK if ONE_BLOCK else keys, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            _, logits = load_logits(
                z_rows, j, live, keys, padded_keys, pre, pre_shift, head, together, HAS_PRE, RELOAD, H, DOT,
                PRECISION, ACC,
            )  # fmt: skip
            exponential, top, total = softmax_terms(logits, top, total, used, ONE_BLOCK, ACC)
            inverse = tl.where(live, 1.0 / total, 0.0)
            centred = exponential * (inverse * BOOST)[:, None] - tl.where(live, mean * BOOST, 0.0)[:, None]
            if NEEDS_GRAM:
                centred = tl.where((j < keys)[None, :], centred, 0.0)
                gram = add_products(gram, centred, centred, SPLIT, T, BLOCK, DOT, PRECISION, ACC)
            if NEEDS_OUT:
                lost = not_finite(inverse)
                y = mix_heads(
                    weight, without(centred, lost, SHARE), head, together, False, RELOAD, H, DOT, PRECISION,
                    ACC,
                )  # fmt: skip
                y = y * (1.0 / BOOST) + (shift + in_query_rows(lost, together, SHARE, ACC))[:, None]
                if LAYER:
                    _, y, _ = layer_norm(y, used, j < keys, gain, offset, EPS, H, ACC)
                # others of this program may still be reading what is overwritten here
                tl.debug_barrier()
                tl.store(
                    z_rows[:, None] + j[None, :],
                    y.to(z.dtype.element_ty),
                    mask=live[:, None] & (j < padded_keys)[None, :],
                )
    if NEEDS_GRAM:
        r = tl.arange(0, T)
        grams += image.to(tl.int64) * gram_stride + program * (T * T)
        tl.store(grams + r[:, None] * T + r[None, :], all_products(gram, SPLIT) * (1.0 / (BOOST * BOOST)))


@triton.jit
def maps_gradient(
    exponential, inverse, dy_rows, j, live, keys, padded_keys, mean, weight, weight_t, shift, gain, offset,
    couple, used, head, together, HAS_DOUT: tl.constexpr, HAS_COUPLING: tl.constexpr, LAYER: tl.constexpr,
    NEEDS_Y: tl.constexpr, NEEDS_MAPS: tl.constexpr, EPS: tl.constexpr, H: tl.constexpr, T: tl.constexpr,
    SHARE: tl.constexpr, RELOAD: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BOOST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(maps, centred * BOOST, Y, dY, normalised X, dX, the maps' gradient, NaN for rows without one [T]);
    `maps` for what is not needed"""
    maps = exponential * inverse[:, None]
    centred = exponential * (inverse * BOOST)[:, None] - tl.where(live, mean * BOOST, 0.0)[:, None]
    lost = not_finite(inverse)
    finite = without(centred, lost, SHARE)
    y, dy, normalised, dmixed, dmaps = maps, maps, maps, maps, maps
    if NEEDS_Y or (LAYER and HAS_DOUT):
        y = mix_heads(weight, finite, head, together, False, RELOAD, H, DOT, PRECISION, ACC)
        y = y * (1.0 / BOOST) + (shift + in_query_rows(lost, together, SHARE, ACC))[:, None]
        rstd = mean
        if LAYER:
            normalised, y, rstd = layer_norm(y, used, j < keys, gain, offset, EPS, H, ACC)
    if HAS_DOUT:
        dy = load_maps(dy_rows, j, live, padded_keys, 0.0).to(ACC)
        dmixed = dy
        if LAYER:
            scaled = dy * gain[:, None]
            first = tl.sum(scaled, 0)[None, :] / H
            second = tl.sum(scaled * normalised, 0)[None, :] / H
            dmixed = rstd[None, :] * (scaled - first - normalised * second)
    if NEEDS_MAPS:
        if HAS_DOUT:
            lost_here = not_finite(tl.sum(dmixed, 1))
            dmaps = mix_heads(
                weight_t, without(dmixed, lost_here, SHARE), head, together, True, RELOAD, H, DOT, PRECISION,
                ACC,
            )  # fmt: skip
            if HAS_COUPLING:
                lost_here = lost | lost_here
            lost = lost_here
        if HAS_COUPLING:
            # far below float16's range where it comes from a batch norm's variance
            if BOOST > 1:
                # three products would spill where T is 32
                TF32: tl.constexpr = "tf32x3" if T == 16 else "tf32"
                from_gram = mix_heads(couple, finite, head, together, False, RELOAD, H, ACC, TF32, ACC)
            else:
                from_gram = mix_heads(couple, finite, head, together, False, RELOAD, H, DOT, PRECISION, ACC)
            if HAS_DOUT:
                dmaps += from_gram * (1.0 / BOOST)
            else:
                dmaps = from_gram * (1.0 / BOOST)
    return maps, centred, y, dy, normalised, dmixed, dmaps, in_query_rows(lost, together, SHARE, ACC)


# Where the coupling of a chunk's first image starts depends on the chunk, and helps no load.
@triton.jit(
    do_not_specialize=["rows", "keys", "tiles", "programs", "coupling_stride"],
    do_not_specialize_on_alignment=["coupling"],
)
def backward_rows(
    z,  # [B, H, rows, padded_keys]
    dy,  # [B, H, rows, padded_keys], or None, as all that follows may be
    coupling,  # [B or 1, H, H]
    pre_mix,  # [H, H]
    pre_bias,  # [H]
    mix,  # [H, H]
    bias,  # [H]
    norm_weight,  # [H]
    norm_bias,  # [H]
    matrix_sums,  # [B, programs, 2, T, T]: dmix from centred maps, dpre_mix
    vector_sums,  # [B, programs, 3, T]: dbias, dnorm_weight, dnorm_bias
    rows,
    keys,
    padded_keys,
    tiles,  # of a program
    programs,  # of an image
    coupling_stride,  # strides from image to image
    matrix_stride,
    vector_stride,
    EPS: tl.constexpr, CENTRED: tl.constexpr, NEEDS_DV: tl.constexpr, NEEDS_DZ: tl.constexpr,
    NEEDS_DPRE: tl.constexpr, NEEDS_DMIX: tl.constexpr, NEEDS_DNORM: tl.constexpr, STORES_DM: tl.constexpr,
    H: tl.constexpr, SHARE: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr, RELOAD: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BOOST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dA = mix^T dX + coupling (A - 1/M),  dL = A (dA - sum_j A dA),  dz = pre_mix^T dL, with dX = dy, or its
    gradient through the layer norm. Y takes the place of z, and dz that of dy (that of z without dy).

    STORES_DM leaves dX in dy, for launches that then need not know of the norm.
    """
    HAS_DOUT: tl.constexpr = dy is not None
    HAS_COUPLING: tl.constexpr = coupling is not None
    HAS_PRE: tl.constexpr = pre_mix is not None
    LAYER: tl.constexpr = norm_weight is not None
    NEEDS_MAPS: tl.constexpr = NEEDS_DZ or NEEDS_DPRE
    # one axis: the others of a grid end at 65535
    image, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    head, share, used, together = tile_rows(H, SHARE, T)
    image_offset = image.to(tl.int64) * (H * rows) * padded_keys
    mean = (tl.full((), 1.0, ACC) / keys).to(ACC)

    pre, pre_shift = together, head
    if HAS_PRE:
        pre = matrix_of(pre_mix, head, together, False, RELOAD, H)
        pre_shift = tl.zeros((T,), ACC)
        if pre_bias is not None:
            pre_shift = tl.load(pre_bias + head, mask=used, other=0.0)
    weight, weight_t = together, together
    if mix is not None:
        weight = matrix_of(mix, head, together, False, RELOAD, H)
        weight_t = matrix_of(mix, head, together, True, RELOAD, H)
    shift = tl.zeros((T,), ACC)
    if not CENTRED:
        shift += tl.sum(diagonal_blocks(mix, head, together, False, H), 1) * mean
    if bias is not None:
        shift += tl.load(bias + head, mask=used, other=0.0)
    gain, offset = shift, shift
    if LAYER:
        gain = tl.load(norm_weight + head, mask=used, other=0.0)
        offset = tl.load(norm_bias + head, mask=used, other=0.0)
    pre_t, couple = weight, weight
    if HAS_PRE:
        pre_t = matrix_of(pre_mix, head, together, True, RELOAD, H)
    if HAS_COUPLING:
        coupling += image.to(tl.int64) * coupling_stride
        couple = matrix_of(coupling, head, together, False, RELOAD, H)

    dmix = no_products(SPLIT, T, ACC)
    dpre = no_products(SPLIT, T, ACC)
    dbias = tl.zeros((T, BLOCK // 8), ACC)
    dnorm_weight = tl.zeros((T,), ACC)
    dnorm_bias = tl.zeros((T,), ACC)

    # a constant number of tiles would be unrolled, and spill
    for tile in range(tiles):
        i = (program * tiles + tile) * SHARE + share
        live = used & (i < rows)
        offsets = image_offset + (head * rows + i).to(tl.int64) * padded_keys
        z_rows = z + offsets
        dy_rows = z_rows
        if HAS_DOUT:
            dy_rows = dy + offsets
        top = tl.full((T,), float("-inf"), ACC)
        total = tl.zeros((T,), ACC)
        row_dot = tl.zeros((T,), ACC)
        if not ONE_BLOCK:
            for j0 in tl.range(0, keys, BLOCK):
                _, block_logits = load_logits(
                    z_rows, j0 + tl.arange(0, BLOCK), live, keys, padded_keys, pre, pre_shift, head,
                    together, HAS_PRE, RELOAD, H, DOT, PRECISION, ACC,
                )  # fmt: skip
                top, total = add_to_statistics(block_logits, top, total, ACC)
            inverse = tl.where(live, 1.0 / total, 0.0)
            if NEEDS_MAPS:
                for j0 in tl.range(0, keys, BLOCK):
                    jd = j0 + tl.arange(0, BLOCK)
                    _, logits_d = load_logits(
                        z_rows, jd, live, keys, padded_keys, pre, pre_shift, head, together, HAS_PRE,
                        RELOAD, H, DOT, PRECISION, ACC,
                    )  # fmt: skip
                    exponential_d, _, _ = softmax_terms(logits_d, top, total, used, False, ACC)
                    maps_d, _, _, _, _, _, dmaps_d, nan_d = maps_gradient(
                        exponential_d, inverse, dy_rows, jd, live, keys, padded_keys, mean, weight,
                        weight_t, shift, gain, offset, couple, used, head, together, HAS_DOUT,
                        HAS_COUPLING, LAYER, False, True, EPS, H, T, SHARE, RELOAD, DOT, PRECISION, BOOST,
                        ACC,
                    )  # fmt: skip
                    row_dot += tl.sum(maps_d * dmaps_d, 1) + nan_d
        for j0 in tl.range(0, BLOCK if ONE_BLOCK else keys, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            raw, logits = load_logits(
                z_rows, j, live, keys, padded_keys, pre, pre_shift, head, together, HAS_PRE, RELOAD, H, DOT,
                PRECISION, ACC,
            )  # fmt: skip
            exponential, top, total = softmax_terms(logits, top, total, used, ONE_BLOCK, ACC)
            inverse = tl.where(live, 1.0 / total, 0.0)
            maps, centred, y, dy_block, normalised, dmixed, dmaps, nan = maps_gradient(
                exponential, inverse, dy_rows, j, live, keys, padded_keys, mean, weight, weight_t, shift,
                gain, offset, couple, used, head, together, HAS_DOUT, HAS_COUPLING, LAYER, NEEDS_DV,
                NEEDS_MAPS, EPS, H, T, SHARE, RELOAD, DOT, PRECISION, BOOST, ACC,
            )  # fmt: skip
            if NEEDS_DMIX:
                dmix = add_products(dmix, dmixed, centred, SPLIT, T, BLOCK, DOT, PRECISION, ACC)
                dbias += tl.sum(tl.reshape(dmixed, (T, BLOCK // 8, 8)), 2)
            if NEEDS_DNORM:
                dnorm_weight += tl.sum(dy_block * normalised, 1)
                dnorm_bias += tl.sum(dy_block, 1)
            stored = live[:, None] & (j < padded_keys)[None, :]
            # barriers: others of this program may still be reading what is overwritten
            if STORES_DM:
                tl.debug_barrier()
                tl.store(dy_rows[:, None] + j[None, :], dmixed.to(z.dtype.element_ty), mask=stored)
            if NEEDS_DV:
                tl.debug_barrier()
                tl.store(z_rows[:, None] + j[None, :], y.to(z.dtype.element_ty), mask=stored)
            if NEEDS_MAPS:
                if ONE_BLOCK:
                    row_dot = tl.sum(maps * dmaps, 1) + nan
                dlogits = maps * (dmaps - row_dot[:, None])
                if NEEDS_DPRE:
                    dpre = add_products(dpre, dlogits, raw, SPLIT, T, BLOCK, DOT, PRECISION, ACC)
                if NEEDS_DZ:
                    if HAS_PRE:
                        dlogits = mix_heads(
                            pre_t, dlogits, head, together, True, RELOAD, H, DOT, PRECISION, ACC
                        )
                    if not NEEDS_DV:
                        tl.debug_barrier()
                    tl.store(
                        dy_rows[:, None] + j[None, :],
                        dlogits.to(z.dtype.element_ty),
                        mask=stored,
                    )

    r = tl.arange(0, T)
    square = r[:, None] * T + r[None, :]
    matrix_sums += image.to(tl.int64) * matrix_stride + program * (2 * T * T)
    vector_sums += image.to(tl.int64) * vector_stride + program * (3 * T)
    if NEEDS_DMIX:
        tl.store(matrix_sums + square, all_products(dmix, SPLIT) * (1.0 / BOOST))
        tl.store(vector_sums + r, tl.sum(dbias, 1))
    if NEEDS_DPRE:
        tl.store(matrix_sums + T * T + square, all_products(dpre, SPLIT))
    if NEEDS_DNORM:
        tl.store(vector_sums + T + r, dnorm_weight)
        tl.store(vector_sums + 2 * T + r, dnorm_bias)
