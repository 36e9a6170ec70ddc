"""Calls of every operation, as functions (x [B, N, 3 H d], matrices [2, H, H], backend) -> a number, for the
tests of what torch's tools make of them."""

import torch

import vitdiv_kernels as vd
from vitdiv_kernels.ops.pairwise_rows import pairwise_logsumexp, pairwise_nearest
from vitdiv_kernels.ops.two_gram import two_gram

B, H, N, D = 2, 4, 17, 16


def qkv_views(x):
    packed = x.reshape(x.shape[0], x.shape[1], 3, H, D).permute(2, 0, 3, 1, 4)
    return [packed[i] for i in range(3)]  # with unbind, DTensor wants a gradient of all three


def reattention_with(norm, pre=False, training=True):
    def operation(x, matrices, backend):
        q, k, v = qkv_views(x)
        out, gram = vd.reattention(
            q, k, v, matrices[0], mix_bias=matrices[1, 0], pre_mix=matrices[1] if pre else None, norm=norm,
            training=training, return_gram=True, backend=backend,
        )  # fmt: skip
        return out.square().sum() + gram.square().sum()

    return operation


def distance_to_nearest(x, _, backend):
    return (x - x.take_along_dim(pairwise_nearest(x, backend=backend).unsqueeze(-1), -2)).square().mean()


OPERATIONS = {
    "cosine abs": lambda x, _, backend: vd.pairwise_cosine(x, backend=backend),
    "cosine signed": lambda x, _, backend: vd.pairwise_cosine(x, penalty="signed", backend=backend),
    "cosine square": lambda x, _, backend: vd.pairwise_cosine(x, penalty="square", backend=backend),
    "cosine of two sets": lambda x, _, backend: vd.pairwise_cosine(x[:, 1:], x[:, :9] * 2, backend=backend),
    "logsumexp": lambda x, _, backend: pairwise_logsumexp(x, scale=3.0, backend=backend).square().mean(),
    "logsumexp of two sets": lambda x, _, backend: pairwise_logsumexp(
        x[:, 1:], x[:, :9] * 2, scale=3.0, backend=backend
    ).mean(),
    "nearest": distance_to_nearest,
    "two grams": lambda x, _, backend: two_gram(
        x, 2 * x[..., 3:], penalty="hinge", margin=0.1, backend=backend
    ),
    "two grams, identity": lambda x, _, backend: (
        two_gram(x, normalise=False, reduction="none", backend=backend).square().sum()
    ),
    "two grams, the first's gradient": lambda x, _, backend: two_gram(
        x, x.detach()[..., 5:], backend=backend
    ),
    "two grams, the second's gradient": lambda x, _, backend: two_gram(
        x.detach()[..., 5:], x, backend=backend
    ),
    "gram": lambda x, _, backend: vd.attention_gram(*qkv_views(x)[:2], backend=backend).square().sum(),
    "diversity": lambda x, _, backend: vd.attention_diversity(*qkv_views(x)[:2], backend=backend),
    "two layers": lambda x, _, backend: (
        vd.attention_cosine(*qkv_views(x)[:2], *qkv_views(x)[1:], backend=backend).square().sum()
    ),
    "reattention": reattention_with("none"),
    "reattention batch": reattention_with("batch"),
    "reattention layer": reattention_with("layer"),
    "talking heads": reattention_with("none", pre=True),
}


def arguments(batch=B, tokens=N):
    x = torch.randn(batch, tokens, 3 * H * D, requires_grad=True)
    return x, torch.randn(2, H, H, requires_grad=True)
