"""The operators `attention_gram_{fwd,bwd}` and their autograd.Function; the maths is in README.md."""

import torch

from .._autograd import once_differentiable
from .._layout import accumulation_dtype, heads_like, nothing, when
from .._operators import define


def _fwd_fake(q, k, scale, q2, k2, scale2):
    heads = q.shape[1] + (0 if q2 is None else q2.shape[1])
    return q.new_empty((q.shape[0], heads, heads), dtype=accumulation_dtype(q))


def _bwd_fake(coupling, q, k, scale, q2, k2, scale2, needs):
    inputs = q, k, q2, k2
    return tuple(heads_like(x) if need else nothing(q) for x, need in zip(inputs, needs, strict=True))


_fwd = define(
    "attention_gram_fwd",
    "(Tensor q, Tensor k, float scale, Tensor? q2, Tensor? k2, float scale2) -> Tensor",
    _fwd_fake,
)
_bwd = define(
    "attention_gram_bwd",
    "(Tensor coupling, Tensor q, Tensor k, float scale, Tensor? q2, Tensor? k2, float scale2, bool[] needs)"
    " -> (Tensor dq, Tensor dk, Tensor dq2, Tensor dk2)",
    _bwd_fake,
)


class AttentionGramFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, q2, k2, scale, scale2, backend):
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(q, k, q2, k2)
            ctx.options = scale, scale2, backend
        return _fwd[backend](q, k, scale, q2, k2, scale2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dgram):
        q, k, q2, k2 = ctx.saved_tensors
        scale, scale2, backend = ctx.options
        needs = list(ctx.needs_input_grad[:4])
        coupling = dgram + dgram.mT
        gradients = _bwd[backend](coupling, q, k, scale, q2, k2, scale2, needs)
        return *(when(need, gradient) for need, gradient in zip(needs, gradients, strict=True)), *(None,) * 3


def head_gram(q, k, q2=None, k2=None, *, scale, scale2=None, backend):
    """Centred Gram matrix of all heads' maps, both layers' in a row: [B, H (+ H2), H (+ H2)]."""
    return AttentionGramFunction.apply(q, k, q2, k2, scale, scale if scale2 is None else scale2, backend)
