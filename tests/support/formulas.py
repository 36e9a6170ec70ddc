"""The plain formulas that a user would write, in the dtype of their inputs: in float64 they are the truth
that every backend is compared with, in other dtypes they give the error that a backend may make."""

import torch
import torch.nn.functional as F

B, H, N, D = 2, 4, 65, 32


def vectors(count=1):
    """Inputs of a formula, in float64: x, and y of two sets."""
    return dict(zip("xy", torch.randn(count, B, N, D, dtype=torch.float64).unbind(), strict=False))


def heads(*names):
    return {name: torch.randn(B, H, N, D, dtype=torch.float64) for name in names}


PENALTIES = {"signed": lambda s: s, "abs": abs, "square": lambda s: s * s, "relu": F.relu}


def pairwise_cosine(x, y=None, *, penalty="abs", include_self=False, reduction="mean", eps=1e-8):
    similarity = F.normalize(x, dim=-1, eps=eps) @ F.normalize(x if y is None else y, dim=-1, eps=eps).mT
    counted = torch.ones(similarity.shape[-2:], dtype=torch.bool)
    if y is None and not include_self:
        counted.fill_diagonal_(False)
    penalties = PENALTIES[penalty](similarity[..., counted])  # [*leading, pairs]
    if reduction == "none":
        return penalties.mean(-1)
    return penalties.mean() if reduction == "mean" else penalties.sum()


def softmax_maps(q, k, scale=None):
    return F.softmax(q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale), dim=-1)


def attention_gram(q, k, scale=None, centered=False):
    maps = softmax_maps(q, k, scale)
    if centered:
        maps = maps - maps.mean(-1, keepdim=True)
    return torch.einsum("bgij,bhij->bgh", maps, maps)


def attention_cosine(q, k, q2=None, k2=None, scale=None):
    first = F.normalize(softmax_maps(q, k, scale).flatten(2), dim=-1)
    second = first if q2 is None else F.normalize(softmax_maps(q2, k2, scale).flatten(2), dim=-1)
    return first @ second.mT


def attention_diversity(q, k, *, penalty="signed", include_self=True, reduction="mean", scale=None):
    cosine = attention_cosine(q, k, scale=scale)
    counted = torch.ones(cosine.shape[-2:], dtype=torch.bool)
    if not include_self:
        counted.fill_diagonal_(False)
    penalties = PENALTIES[penalty](cosine[:, counted])
    if reduction == "none":
        return penalties.mean(-1)
    return penalties.mean() if reduction == "mean" else penalties.sum()


def reattention(
    q, k, v, mix, *, mix_bias=None, pre_mix=None, pre_bias=None, norm="none", norm_weight=None,
    norm_bias=None, running_mean=None, running_var=None, training=False, momentum=0.1, eps=1e-5,
    out_scale=1.0, scale=None,
):  # fmt: skip
    """Output and Gram matrix; the mixes as the published code has them, a 1x1 convolution over the heads."""
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if pre_mix is not None:
        logits = F.conv2d(logits, pre_mix.to(q.dtype)[:, :, None, None], _to(pre_bias, q))
    maps = logits.softmax(-1)
    mixed = F.conv2d(maps, mix.to(q.dtype)[:, :, None, None], _to(mix_bias, q))
    if norm == "batch":
        mixed = F.batch_norm(
            mixed, running_mean, running_var, _to(norm_weight, q), _to(norm_bias, q), training, momentum, eps
        )
    elif norm == "layer":
        weight, bias = _to(norm_weight, q), _to(norm_bias, q)
        mixed = F.layer_norm(mixed.permute(0, 2, 3, 1), mix.shape[:1], weight, bias, eps).permute(0, 3, 1, 2)
    return mixed @ v * out_scale, torch.einsum("bgij,bhij->bgh", maps, maps)


def _to(parameter, like):
    return None if parameter is None else parameter.to(like.dtype)


def pairwise_logsumexp(x, y=None, *, scale=1.0, eps=1e-8):
    similarity = F.normalize(x, dim=-1, eps=eps) @ F.normalize(x if y is None else y, dim=-1, eps=eps).mT
    if y is None:
        n = x.shape[-2]
        similarity = similarity[..., ~torch.eye(n, dtype=torch.bool)].unflatten(-1, (n, n - 1))
    return (scale * similarity).logsumexp(-1)


def _relu_teacher(s, t):
    return torch.where((s < 0) & (t < 0), 0, s) - F.relu(t)


GRAM_PENALTIES = {
    "square": lambda s, t, margin: (s - t) ** 2,
    "relu_square": lambda s, t, margin: (F.relu(s) - F.relu(t)) ** 2,
    "relu_teacher_square": lambda s, t, margin: _relu_teacher(s, t) ** 2,
    "clamped_teacher_square": lambda s, t, margin: (s - F.relu(t)) ** 2,
    "hinge": lambda s, t, margin: F.relu((s - t).abs() - margin),
    "product": lambda s, t, margin: s * t,
}


def two_gram(x, y=None, *, penalty="square", margin=0.0, normalise=True, reduction="mean", eps=1e-8):
    def gram(x):
        x = F.normalize(x, dim=-1, eps=eps) if normalise else x
        return x @ x.mT

    s = gram(x)
    t = torch.eye(s.shape[-1], dtype=s.dtype).expand_as(s) if y is None else gram(y)
    penalties = GRAM_PENALTIES[penalty](s, t, margin)
    if reduction == "none":
        return penalties.mean((-2, -1))
    return penalties.mean() if reduction == "mean" else penalties.sum()
