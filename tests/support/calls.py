"""Calls of every operation, as functions (x [B, N, 3 H d], matrices [2, H, H], backend) -> a number, for the
tests of what torch's tools make of them."""

import torch

import vitdiv_kernels as vd
from vitdiv_kernels import losses
from vitdiv_kernels.ops.pairs.pairwise_rows import pairwise_logsumexp, pairwise_nearest
from vitdiv_kernels.ops.pairs.two_gram import two_gram

B, H, N, D = 2, 4, 17, 8


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


# By operation.
CALLS = {
    "pairwise_cosine": {
        "cosine abs": lambda x, _, backend: vd.pairwise_cosine(x, backend=backend),
        "cosine signed": lambda x, _, backend: vd.pairwise_cosine(x, penalty="signed", backend=backend),
        "cosine square": lambda x, _, backend: vd.pairwise_cosine(x, penalty="square", backend=backend),
        "cosine of two sets": lambda x, _, backend: vd.pairwise_cosine(
            x[:, 1:], x[:, :9] * 2, backend=backend
        ),
    },
    "pairwise_rows": {
        "logsumexp": lambda x, _, backend: pairwise_logsumexp(x, scale=3.0, backend=backend).square().mean(),
        "logsumexp of two sets": lambda x, _, backend: pairwise_logsumexp(
            x[:, 1:], x[:, :9] * 2, scale=3.0, backend=backend
        ).mean(),
        "nearest": distance_to_nearest,
    },
    "two_gram": {
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
    },
    "attention_gram": {
        "gram": lambda x, _, backend: vd.attention_gram(*qkv_views(x)[:2], backend=backend).square().sum(),
        "diversity": lambda x, _, backend: vd.attention_diversity(*qkv_views(x)[:2], backend=backend),
        "two layers": lambda x, _, backend: (
            vd.attention_cosine(*qkv_views(x)[:2], *qkv_views(x)[1:], backend=backend).square().sum()
        ),
    },
    "reattention": {
        "reattention": reattention_with("none"),
        "reattention batch": reattention_with("batch"),
        "reattention layer": reattention_with("layer"),
        "talking heads": reattention_with("none", pre=True),
    },
}
OPERATIONS = {name: call for calls in CALLS.values() for name, call in calls.items()}
CLOSED_FORMS = ("cosine signed",)  # which make fewer operations than the plain formula
OPERATION_OF = {name: operation for operation, calls in CALLS.items() for name in calls}


def arguments(batch=B, tokens=N):
    x = torch.randn(batch, tokens, 3 * H * D, requires_grad=True)
    return x, torch.randn(2, H, H, requires_grad=True)


# of x [..., N, D]: losses with more than operators in them
LOSSES = {
    "patch_contrast": lambda x: losses.patch_contrast(x, 2 * x.flip(-1)),
    "koleo": losses.koleo,
    "info_nce": lambda x: losses.info_nce(x, x.roll(1, -1)),
    "vf_loss": lambda x: losses.vf_loss(x, x.roll(1, -1)),
    "patch_mgd": losses.patch_mgd,
    "patch_mhs": losses.patch_mhs,
    "patch_condition_orthogonality": lambda x: losses.patch_condition_orthogonality(
        x, start=torch.linspace(-1, 1, 2 * x.shape[-2]).view(2, -1)
    ),
    "weight_condition_orthogonality": lambda x: losses.weight_condition_orthogonality(
        x, start=torch.linspace(-1, 1, 2 * x.shape[-2]).view(2, -1)
    ),
    "linear_cka": lambda x: losses.linear_cka(x, x.roll(1, -1).square()),
    "gram_anchoring": lambda x: losses.gram_anchoring(x, x.detach().roll(1, -1)),
    "uniformity": losses.uniformity,
    "patch_soft_orthogonality": losses.patch_soft_orthogonality,
    "gradient_diversity": losses.gradient_diversity,
    "neighbourhood_contrast": lambda x: losses.neighbourhood_contrast(x, x.roll(1, -1), grid=(2, 3)),
}
