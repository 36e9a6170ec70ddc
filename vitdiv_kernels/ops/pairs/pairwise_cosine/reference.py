"""The specification of pairwise cosine penalties, in plain PyTorch: any float dtype, any device, plain
autograd.

    x_hat = x / max(|x|, eps),   S = x_hat y_hat^T,   sum over pairs of penalty(S)

float16 and bfloat16 are computed in float32. Holds several [*leading, N, M] maps, but for the closed forms of
signed and, where D is less than N and M, of square.
"""

import torch

from ...._vectors import PENALTIES, normalise


def pairwise_cosine_sums(x, y, *, penalty, include_self, eps):
    """Sum of the penalty over the ordered pairs of each leading index.

    x [*leading, N, D], y [*leading, M, D] or None for pairs within x, of which the self-pairs count only with
    include_self. Returns [*leading], float32 (float64 for float64).
    """
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    x_hat = normalise(x.to(compute_dtype), eps)
    y_hat = x_hat if y is None else normalise(y.to(compute_dtype), eps)
    if penalty == "signed":
        sums = (x_hat.sum(-2) * y_hat.sum(-2)).sum(-1)
        return sums if y is not None or include_self else sums - x_hat.square().sum((-2, -1))
    if penalty == "square" and x.shape[-1] < min(x_hat.shape[-2], y_hat.shape[-2]):
        sums = ((x_hat.mT @ x_hat) * (y_hat.mT @ y_hat)).sum((-2, -1))
        return sums if y is not None or include_self else sums - x_hat.square().sum(-1).square().sum(-1)
    penalties = PENALTIES[penalty](x_hat @ y_hat.mT)  # [*leading, N, M]
    if y is None and not include_self:
        self_pairs = torch.eye(x.shape[-2], dtype=torch.bool, device=x.device)
        penalties = penalties.masked_fill(self_pairs, 0)
    return penalties.sum((-2, -1))
