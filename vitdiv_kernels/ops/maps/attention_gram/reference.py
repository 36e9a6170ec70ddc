"""The specification of the head Gram matrix, in plain PyTorch: any float dtype, any device, plain autograd.

    A_h = softmax(scale Q_h K_h^T),   G~[g, h] = sum_ij (A_g[i, j] - 1/M) (A_h[i, j] - 1/M)

Rows of a softmax sum to 1, so the plain Gram matrix is G = G~ + N/M exactly. When attention is nearly
uniform, which is the collapsed case, G~ is far smaller than N/M and only the centred sum keeps its digits.
float16 and bfloat16 are computed in float32. Holds several [B, H, N, M] maps.
"""

import torch


def attention_maps(q, k, scale):
    """softmax(scale q k^T), [B, H, N, M], float32 or float64."""
    compute_dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.softmax(scale * q.to(compute_dtype) @ k.to(compute_dtype).mT, dim=-1)


def centered_gram(maps):
    """G~ [B, H, H] of the maps [B, H, N, M], whose rows sum to 1."""
    centered = (maps - 1 / maps.shape[-1]).flatten(2)
    return centered @ centered.mT


def head_gram(q, k, q2=None, k2=None, *, scale, scale2=None):
    """Centred Gram matrix of the heads of one layer, or of the heads of two layers one after the other.

    q [B, H, N, d], k [B, H, M, d]; q2 [B, H2, N, d2], k2 [B, H2, M, d2]. Returns [B, H (+ H2), H (+ H2)],
    float32 (float64 for float64).
    """
    maps = attention_maps(q, k, scale)
    if q2 is not None:
        maps = torch.cat([maps, attention_maps(q2, k2, scale2)], dim=1)
    return centered_gram(maps)
