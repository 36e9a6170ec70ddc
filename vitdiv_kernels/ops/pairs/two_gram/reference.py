"""The specification of penalties on two Gram matrices, in plain PyTorch: any float dtype, any device, plain
autograd.

    S = x_hat x_hat^T,   T = y_hat y_hat^T, or I without y,   sum over all pairs of penalty(S, T)

float16 and bfloat16 are computed in float32. Holds several [*leading, N, N] maps.
"""

import torch

from ...._vectors import normalise as unit_vectors

PENALTIES = {
    "square": lambda s, t, margin: (s - t).square(),
    "relu_square": lambda s, t, margin: (s.relu() - t.relu()).square(),
    "relu_teacher_square": lambda s, t, margin: (s.masked_fill((s < 0) & (t < 0), 0) - t.relu()).square(),
    "clamped_teacher_square": lambda s, t, margin: (s - t.relu()).square(),
    "hinge": lambda s, t, margin: ((s - t).abs() - margin).relu(),
    "product": lambda s, t, margin: s * t,
}


def two_gram_sums(x, y, *, penalty, margin, normalise, eps):
    """Sum of the penalty over the N^2 pairs of each leading index: [*leading], float32 or float64."""
    compute_dtype = torch.promote_types(x.dtype, torch.float32)

    def gram(x):
        x = x.to(compute_dtype)
        x = unit_vectors(x, eps) if normalise else x
        return x @ x.mT

    t = torch.eye(x.shape[-2], dtype=compute_dtype, device=x.device) if y is None else gram(y)
    return PENALTIES[penalty](gram(x), t, margin).sum((-2, -1))
