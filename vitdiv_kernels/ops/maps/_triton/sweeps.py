"""Launches of the kernels of maps.py."""

import torch
import triton
import triton.language as tl

from ...._layout import accumulation_dtype
from ..._launch import (
    INTERPRETED,
    OPERANDS,
    accumulator,
    input_precision,
    launch,
    split,
)
from ..._tables import options
from .heads import (
    LOG2_E,
    aligned,
    aligned_empty,
    deliver,
    padded_heads,
    uncouple,
)
from .maps import key_gradient, query_gradient, softmax_sweep
from .tiles import tile

# Precision of the pre-mix, see `logits` of maps.py.
LOGITS = {torch.float16: "rounded tf32", torch.bfloat16: "tf32"}


class Maps:
    """The softmax maps of scale q k^T, perhaps pre-mixed; heads past `first_heads` have a scale2."""

    def __init__(self, q, k, scale, pre_mix=None, pre_bias=None, first_heads=None, scale2=None):
        self.q_given, self.k_given = q, k
        self.q, self.k = aligned(q), aligned(k)
        self.pre_mix, self.pre_bias = pre_mix, pre_bias
        self.images, self.heads, self.queries, self.width = self.q.shape
        self.keys = k.shape[2]
        self.padded = padded_heads(self.heads)
        self.dtype, self.accumulation = q.dtype, accumulation_dtype(q)
        self.factors = *split(scale * LOG2_E), *split((scale if scale2 is None else scale2) * LOG2_E)
        self.first_heads = self.heads if first_heads is None else first_heads
        self.row_stride = triton.cdiv(self.queries, 16) * 16

    def empty(self, *shape):
        return self.q.new_empty(shape, dtype=self.accumulation)

    def rows(self):
        """A number for each head and query row."""
        return self.empty(self.images, self.padded, self.row_stride)

    def tile(self, kernel, more=False):
        """v and its gradient are as wide as q; layer norm and pre-mix hold more at a time."""
        extras = more or self.pre_mix is not None
        return tile(kernel, self.padded, self.width, self.dtype, extras, INTERPRETED)

    def numbers(self):
        """Constants of the arithmetic."""
        compute = OPERANDS[self.dtype]
        narrow = self.dtype.itemsize == 2
        precision = input_precision(self.dtype)
        return dict(
            # keeps the digits of maps near 1/M in float16's range
            PS=1024.0 if self.dtype == torch.float16 else 1.0,
            DT=compute,
            PREC=precision,
            # logits are mixed with more digits than the inputs have, or as many, rounded, as float16
            ZT=tl.float32 if narrow else compute,
            ZPREC=LOGITS.get(self.dtype, precision),
            ACC=accumulator(self.dtype),
        )

    def softmax(self, coupling=None, gram=False, statistics=True):
        """(row_max, row_scale, row_dot, gram) as softmax_sweep says; None for what is not asked for."""
        needs_row_dot = coupling is not None
        t = self.tile("softmax_gram" if gram or needs_row_dot else "softmax")
        tiles = triton.cdiv(self.queries, t.rows)
        needed = statistics, statistics, needs_row_dot
        row_max, row_scale, row_dot = (self.rows() if x else self.q for x in needed)
        partial = self.empty(self.images, tiles, self.padded, self.padded) if gram else self.q
        launch(
            softmax_sweep, (tiles * self.images,), *located(self.q), *located(self.k),
            or_else(self.pre_mix, self.q), or_else(self.pre_bias, self.q),
            *with_image_stride(coupling, self.q), row_max, row_scale, row_dot, partial, tiles, 0,
            self.queries, self.keys, self.row_stride, *self.factors, **options(t), H=self.heads,
            H1=self.first_heads, HP=self.padded, D=self.width, DB=t.width, BR=t.rows, BC=t.columns,
            PRE=self.pre_mix is not None, PRE_BIAS=self.pre_bias is not None, STATISTICS=statistics,
            GRAM=gram, ROW_DOT=needs_row_dot, HOLD=t.hold, RELOAD=t.reload, **self.numbers(),
        )  # fmt: skip
        if gram:
            total = partial.sum(1, dtype=torch.float64)[:, : self.heads, : self.heads]
            partial = total.to(self.accumulation)
        return row_max, row_scale, row_dot if needs_row_dot else None, partial if gram else None

    def gradients(self, statistics, row_dot, coupling, mixed, needs_dq, needs_dk, needs_dpre_mix):
        """(dq, dk, dpre_mix), None for what is not needed. `mixed` is a Mixed, or None when only the Gram
        matrix has a gradient."""
        dq = self._query_gradient(statistics, row_dot, coupling, mixed, needs_dq, needs_dpre_mix)
        dk = self._key_gradient(statistics, row_dot, coupling, mixed) if needs_dk else None
        return dq[0], dk, dq[1]

    def _query_gradient(self, statistics, row_dot, coupling, mixed, needs_dq, needs_dpre_mix):
        if not (needs_dq or needs_dpre_mix):
            return None, None
        t = self.tile("query_gradient", mixed is not None)
        tiles = triton.cdiv(self.queries, t.rows)
        kron = max(16, self.padded)
        dq, written = aligned_empty(self.q_given) if needs_dq else (None, self.q)
        partial = self.empty(self.images, tiles, kron, kron) if needs_dpre_mix else self.q
        for does_dq, does_dpre_mix in parts(t, needs_dq, needs_dpre_mix):
            launch(
                query_gradient, (tiles * self.images, triton.cdiv(self.width, t.width) if does_dq else 1),
                *self._gradient_arguments(written, mixed, coupling, statistics, row_dot), partial,
                tiles, 0, *self._sizes(mixed),
                **options(t),
                NEED_DQ=does_dq, NEED_DPRE=does_dpre_mix, W=warp_split(self.padded, t),
                **self._gradient_constants(t, mixed, coupling),
            )  # fmt: skip
        # the kernel takes logits to the base of 2
        dpre_mix = uncouple(partial, self.heads).sum(0) / LOG2_E if needs_dpre_mix else None
        return deliver(dq, written) if needs_dq else None, dpre_mix

    def _key_gradient(self, statistics, row_dot, coupling, mixed):
        t = self.tile("key_gradient", mixed is not None)
        tiles = triton.cdiv(self.keys, t.rows)
        dk, written = aligned_empty(self.k_given)
        launch(
            key_gradient, (tiles * self.images, triton.cdiv(self.width, t.width)),
            *self._gradient_arguments(written, mixed, coupling, statistics, row_dot), tiles, 0,
            *self._sizes(mixed), **options(t),
            **self._gradient_constants(t, mixed, coupling),
        )  # fmt: skip
        return deliver(dk, written)

    def _gradient_arguments(self, written, mixed, coupling, statistics, row_dot):
        tensors = (
            (self.q,) * 5
            if mixed is None
            else (mixed.v, mixed.dout, mixed.mix, mixed.bias, mixed.norm_weight)
        )
        v, dout, mix, bias, norm_weight = (or_else(x, self.q) for x in tensors)
        return (
            *located(self.q), *located(self.k), *located(v), *located(dout), *located(written),
            or_else(self.pre_mix, self.q), mix, bias, norm_weight, *with_image_stride(coupling, self.q),
            *statistics, row_dot,
        )  # fmt: skip

    def _sizes(self, mixed):
        eps = (0.0, 0.0) if mixed is None else mixed.eps
        return self.queries, self.keys, self.row_stride, *self.factors, *eps

    def _gradient_constants(self, t, mixed, coupling):
        width = self.width if mixed is None else mixed.width
        return dict(
            H=self.heads, H1=self.first_heads, HP=self.padded, D=self.width, DB=t.width, DV=width,
            DVB=t.width, BR=t.rows, BC=t.columns, PRE=self.pre_mix is not None,
            CENTRED=mixed is None or mixed.centred, BIAS=mixed is not None and mixed.bias is not None,
            DOUT=mixed is not None, LAYER=mixed is not None and mixed.norm_weight is not None,
            COUPLING=coupling is not None, HOLD=t.hold, RELOAD=t.reload, **self.numbers(),
        )  # fmt: skip


def located(x):
    """The arguments of a kernel for x [B, H, N, d]; anything else stands for a tensor that is not read."""
    return x, *(x.stride()[:3] if x.dim() == 4 else (0, 0, 0))


def or_else(tensor, other):
    return other if tensor is None else tensor


def with_image_stride(coupling, other):
    """coupling [B or 1, H, H] and its stride over images."""
    if coupling is None:
        return other, 0
    coupling = coupling.contiguous()
    return coupling, coupling.stride(0) if coupling.shape[0] > 1 else 0


def parts(t, *needs):
    """`needs`, or where the tile has its results made apart, one of them at a time."""
    if not t.apart:
        return [needs]
    return [tuple(i == j for j in range(len(needs))) for i, need in enumerate(needs) if need]


def warp_split(heads, t):
    """Parts that the contraction of `couple` is split into: each a product of 16 at least."""
    positions = t.rows * t.columns * min(16, heads) // 16
    return min(t.warps, positions // 16)
