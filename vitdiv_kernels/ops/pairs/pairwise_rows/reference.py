"""The specification of the reductions along rows of cosines, in plain PyTorch: any float dtype, any device,
plain autograd.

    x_hat = x / max(|x|, eps),   S = x_hat y_hat^T

float16 and bfloat16 are computed in float32. Holds [*leading, N, M] maps.
"""

import torch

from ...._vectors import normalise


def _cosines(x, y, eps, self_pairs):
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    x_hat = normalise(x.to(compute_dtype), eps)
    if y is not None:
        return x_hat @ normalise(y.to(compute_dtype), eps).mT
    diagonal = torch.eye(x.shape[-2], dtype=torch.bool, device=x.device)
    return (x_hat @ x_hat.mT).masked_fill(diagonal, self_pairs)


def logsumexp(x, y, *, scale, eps):
    """log sum_j exp(scale S_ij), [*leading, N]; without j = i when y is None."""
    return (scale * _cosines(x, y, eps, float("-inf"))).logsumexp(-1)


@torch.no_grad()
def nearest(x, y, *, eps):
    """argmax_j S_ij, [*leading, N]; without j = i when y is None."""
    return _cosines(x, y, eps, float("-inf")).argmax(-1)
