"""Re-attention in Triton: maps of a chunk of images, or of query rows of one image, in a workspace.

A product writes the chunk's logits, one row kernel makes of them what the next products need, in place.
docs/kernels/reattention.md describes both directions and counts their bytes.
"""

import math
from typing import NamedTuple

import torch
import triton

from ...._layout import accumulation_dtype, heads_like, nothing
from ..._launch import (
    INTERPRETED,
    OPERANDS,
    accumulator,
    capability,
    input_precision,
    launch,
)
from ..._tables import options
from ..._workspace import chunks, padded, plan, workspace_bytes
from .products import maps_by_rows, padding_of, rows_by_rows
from .row_tiles import row_config
from .rows import backward_rows, forward_rows

# The interpreter's time goes with the number of steps, hardly with their size.
INTERPRETED_BLOCK = 256


def _plan(q, heads, keys, maps):
    """The plan for a call with so many sets of maps."""
    limit = workspace_bytes(capability(q))
    return plan(q.shape[0], heads, q.shape[2], keys, q.element_size(), maps, limit)


class _Workspace:
    """The maps [images, H, rows, padded keys] of one chunk."""

    def __init__(self, like, size, heads, keys):
        self.heads, self.padded_keys = heads, padded(keys)
        self.memory = like.new_empty(size.images * heads * size.rows * self.padded_keys)

    def maps(self, chunk):
        shape = (
            chunk.last - chunk.first, self.heads, chunk.bottom - chunk.top, self.padded_keys
        )  # fmt: skip
        return self.memory[: math.prod(shape)].view(shape)


def _rows_of(tensor, chunk):
    """Those of a chunk, of q or what has as many rows."""
    return tensor[chunk.first : chunk.last, :, chunk.top : chunk.bottom]


def _images_of(tensor, chunk):
    return tensor[chunk.first : chunk.last]


class _Layer(NamedTuple):
    """Heads of the maps and what they are made of, `scale q k^T`."""

    heads: slice
    q: torch.Tensor  # [B, H, N, d]
    k: torch.Tensor  # [B, H, M, d]
    scale: float
    needs_dq: bool = False
    needs_dk: bool = False


def _layers(*given):
    """(_Layer of each, number of heads): the heads of each follow those of the one before."""
    layers, heads = [], 0
    for q, *others in given:
        layers.append(_Layer(slice(heads, heads + q.shape[1]), q, *others))
        heads += q.shape[1]
    return layers, heads


def _write_logits(z, layers, chunk, padding):
    for layer in layers:
        q, k = _rows_of(layer.q, chunk), _images_of(layer.k, chunk)
        rows_by_rows(z[:, layer.heads], q, k, layer.scale, padding)


class _Rows:
    """What the row kernels of one call share: how they run, and the constants that they are compiled for."""

    def __init__(self, direction, q, heads, keys, eps, centred, extras, size):
        self.heads, self.rows, self.queries = heads, size.rows, q.shape[2]
        config = row_config(direction, heads, keys, q.dtype, extras)
        if INTERPRETED:
            config = config.in_blocks(INTERPRETED_BLOCK, keys)
        self.share, self.tile = config.share, config.tile_rows
        self.tiles = config.tiles
        self.program_rows = config.share * config.tiles
        # Which launch makes what. Forward the Gram matrix, the mixed maps; backward the parameters' sums, the
        # gradient of the pre-mix, that of the products, the mixed maps. These take the logits' place: last.
        results = 2 if direction == "forward" else 4
        self.steps = [(True,) * results]
        if config.apart:
            self.steps = [tuple(i == j for j in range(results)) for i in range(results)]
        self.options = dict(
            EPS=eps, CENTRED=centred, H=heads, SHARE=config.share, T=config.tile_rows, BLOCK=config.block,
            ONE_BLOCK=config.one_block, SPLIT=config.split, RELOAD=config.reload, DOT=OPERANDS[q.dtype],
            PRECISION=input_precision(q.dtype),
            # lifts centred maps, which are small where attention is nearly uniform, into float16's range
            BOOST=4096 if q.dtype == torch.float16 else 1, ACC=accumulator(q.dtype),
            **options(config),
        )  # fmt: skip

    def programs(self, rows):
        return triton.cdiv(rows, self.program_rows)

    def total_programs(self):
        whole = (self.queries - 1) // self.rows
        return whole * self.programs(self.rows) + self.programs(self.queries - whole * self.rows)

    def partial_sums(self, like, images, needed, *shape):
        """One [*shape] per image and program, in the order of the rows."""
        programs = (images, self.total_programs()) if needed else (0, 0)
        return like.new_empty(*programs, *shape, dtype=accumulation_dtype(like))

    def part(self, sums, chunk):
        """The chunk's partial sums: a pointer to the first, images a stride apart."""
        return sums[chunk.first : chunk.last, self.programs(self.rows) * (chunk.top // self.rows) :]

    def grid(self, chunk):
        return ((chunk.last - chunk.first) * self.programs(chunk.bottom - chunk.top),)

    def matrix(self, sums):
        """[..., T, T] -> [..., H, H]: the sum of the diagonal blocks, one per query row of a tile."""
        used = self.share * self.heads
        blocks = sums[..., :used, :used].unflatten(-1, (self.share, -1)).unflatten(-3, (self.share, -1))
        return blocks.diagonal(dim1=-4, dim2=-2).sum(-1)

    def vector(self, sums):
        return sums[..., : self.share * self.heads].unflatten(-1, (self.share, -1)).sum(-2)


def forward(
    q, k, v, scale, pre_mix, pre_bias, mix, bias, centred, norm_weight, norm_bias, eps, needs_out, needs_gram,
    second=None,
):  # fmt: skip
    """As `vitdiv::reattention_fwd`: (out, centred Gram); `nothing` for what is not needed.

    With `second`, (q, k, scale) of another layer, the Gram matrix is of the heads of both.
    """
    layers, heads = _layers((q, k, scale), *([second] if second else []))
    images, queries, keys, dtype = q.shape[0], q.shape[2], k.shape[2], accumulation_dtype(q)
    size = _plan(q, heads, keys, 1)
    extras = pre_mix is not None or norm_weight is not None
    rows = _Rows("forward", q, heads, keys, eps, centred, extras, size)
    out = heads_like(q) if needs_out else nothing(q)
    grams = rows.partial_sums(q, images, needs_gram, rows.tile, rows.tile)
    workspace = _Workspace(q, size, heads, keys)
    padding = padding_of(pre_mix)

    for chunk in chunks(size, images, queries):
        z = workspace.maps(chunk)
        _write_logits(z, layers, chunk, padding)
        gram_part = rows.part(grams, chunk)
        for of_maps, mixed_maps in rows.steps:
            does = dict(NEEDS_GRAM=needs_gram and of_maps, NEEDS_OUT=needs_out and mixed_maps)
            if not any(does.values()):
                continue
            launch(
                forward_rows, rows.grid(chunk), z, pre_mix, pre_bias, mix, bias, norm_weight, norm_bias,
                gram_part, z.shape[2], keys, z.shape[3], rows.tiles, rows.programs(z.shape[2]),
                gram_part.stride(0), **does, **rows.options,
            )  # fmt: skip
        if needs_out:
            maps_by_rows(_rows_of(out, chunk), z, _images_of(v, chunk))

    gram = rows.matrix(grams.sum(1, dtype=torch.float64)).to(dtype) if needs_gram else nothing(q)
    return out, gram


class _Gradient:
    """dk or dv: over the chunks of rows of an image it grows in float32, in their order."""

    def __init__(self, tensor, size, queries):
        self.tensor, self.queries = tensor, queries
        self.sums = None
        if size.rows < queries:
            self.sums = tensor.new_empty((1, *tensor.shape[1:]), dtype=accumulation_dtype(tensor))

    def add(self, chunk, maps, rows, alpha=1.0):
        whole = _images_of(self.tensor, chunk)
        into = whole if self.sums is None else self.sums
        maps_by_rows(into, maps, rows, alpha, transposed=True, add=chunk.top > 0)
        if into is not whole and chunk.bottom == self.queries:
            whole.copy_(into)


def backward(
    dout, coupling, q, k, v, scale, pre_mix, pre_bias, mix, bias, centred, norm_weight, norm_bias, eps, needs,
    second=None,
):  # fmt: skip
    """As `vitdiv::reattention_bwd`: dq, dk, dv, dpre_mix, dmix, dbias, dnorm_weight, dnorm_bias.

    With `second`, (q, k, scale, whether dq, whether dk) of another layer, its dq and dk follow.
    """
    needs_dq, needs_dk, needs_dv, needs_dpre_mix, needs_dmix, needs_dnorm = needs
    layers, heads = _layers((q, k, scale, needs_dq, needs_dk), *([second] if second else []))
    images, queries, keys, dtype = q.shape[0], q.shape[2], k.shape[2], accumulation_dtype(q)
    needs_dz = any(layer.needs_dq or layer.needs_dk for layer in layers)
    # dv alone does not need the gradient of the mixed maps
    has_dy = dout is not None and (needs_dz or needs_dpre_mix or needs_dmix or needs_dnorm)
    size = _plan(q, heads, keys, 2 if has_dy else 1)
    extras = pre_mix is not None or norm_weight is not None
    rows = _Rows("backward", q, heads, keys, eps, centred, extras, size)
    dqs = [heads_like(layer.q) if layer.needs_dq else nothing(q) for layer in layers]
    dks = [heads_like(layer.k) if layer.needs_dk else nothing(q) for layer in layers]
    dv = heads_like(v) if needs_dv else nothing(q)
    matrices = rows.partial_sums(q, images, needs_dpre_mix or needs_dmix, 2, rows.tile, rows.tile)
    vectors = rows.partial_sums(q, images, needs_dmix or needs_dnorm, 3, rows.tile)
    if coupling is not None:
        coupling = coupling.reshape(-1, heads, heads).contiguous()
    shared_coupling = coupling is None or coupling.shape[0] < images

    z_space, padding = _Workspace(q, size, heads, keys), padding_of(pre_mix)
    if has_dy:
        dy_space = _Workspace(q, size, heads, keys)
    dks_of = [
        _Gradient(dk, size, queries) if layer.needs_dk else None
        for layer, dk in zip(layers, dks, strict=True)
    ]
    dv_of = _Gradient(dv, size, queries) if needs_dv else None

    # results apart: the layer norm's gradient is stored by the first launch, not made again in the next two
    norm_first = len(rows.steps) > 1 and norm_weight is not None and has_dy and (needs_dz or needs_dpre_mix)

    for chunk in chunks(size, images, queries):
        z, dy = z_space.maps(chunk), None
        _write_logits(z, layers, chunk, padding)
        if has_dy:
            dy = dy_space.maps(chunk)
            rows_by_rows(dy, _rows_of(dout, chunk), _images_of(v, chunk))
        matrix_part, vector_part = rows.part(matrices, chunk), rows.part(vectors, chunk)
        for sums, of_pre_mix, of_products, values in rows.steps:
            does = dict(
                NEEDS_DMIX=needs_dmix and sums, NEEDS_DNORM=needs_dnorm and sums,
                NEEDS_DPRE=needs_dpre_mix and of_pre_mix, NEEDS_DZ=needs_dz and of_products,
                NEEDS_DV=needs_dv and values, STORES_DM=norm_first and sums,
            )  # fmt: skip
            if not any(does.values()):
                continue
            norm = norm_weight, norm_bias
            if norm_first and (of_pre_mix or of_products):
                norm = None, None
            launch(
                backward_rows, rows.grid(chunk), z, dy if sums or of_pre_mix or of_products else None,
                coupling if shared_coupling else coupling[chunk.first : chunk.last],
                pre_mix, pre_bias, mix, bias, *norm, matrix_part, vector_part, z.shape[2],
                keys, z.shape[3], rows.tiles, rows.programs(z.shape[2]),
                0 if shared_coupling else heads * heads, matrix_part.stride(0), vector_part.stride(0),
                **does, **rows.options,
            )  # fmt: skip
        if needs_dv:
            dv_of.add(chunk, z, _rows_of(dout, chunk))
        dz = dy if has_dy else z
        for layer, dq, dk_of in zip(layers, dqs, dks_of, strict=True):
            of_layer = dz[:, layer.heads]
            if layer.needs_dq:
                maps_by_rows(_rows_of(dq, chunk), of_layer, _images_of(layer.k, chunk), layer.scale)
            if layer.needs_dk:
                dk_of.add(chunk, of_layer, _rows_of(layer.q, chunk), layer.scale)

    dpre_mix, dmix, dbias, dnorm_weight, dnorm_bias = (nothing(q) for _ in range(5))
    if needs_dpre_mix or needs_dmix:
        from_centred, from_logits = rows.matrix(matrices.sum((0, 1), dtype=torch.float64))
    if needs_dmix or needs_dnorm:
        bias_sums, weight_sums, norm_bias_sums = rows.vector(vectors.sum((0, 1), dtype=torch.float64))
    if needs_dpre_mix:
        dpre_mix = from_logits.to(dtype)
    if needs_dmix:
        if not centred:
            from_centred = from_centred + bias_sums[:, None] / keys
        dmix, dbias = from_centred.to(dtype), bias_sums.to(dtype)
    if needs_dnorm:
        dnorm_weight, dnorm_bias = weight_sums.to(dtype), norm_bias_sums.to(dtype)
    of_second = (dqs[1], dks[1]) if second else ()
    return dqs[0], dks[0], dv, dpre_mix, dmix, dbias, dnorm_weight, dnorm_bias, *of_second
