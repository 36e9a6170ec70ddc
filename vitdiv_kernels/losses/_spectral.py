"""Spectral measures of the Gram matrices x x^T [n, n] of vectors x [..., n, D], with gradients by hand:
autograd differentiates product by product, and makes a matrix as large as x or the Gram matrix for each."""

import torch

from ..ops import _checks
from ..ops._autograd import once_differentiable


class GramGap(torch.autograd.Function):
    """`_common.spectral_gap` of x x^T, start vectors [..., 2, n]: [...]. The Gram matrix is only multiplied
    with vectors, and the gradient is a matrix of rank 6, made at once.

    With s = G a, top = s . G s / |s|^2, G' = G - top, p = G' b and r = p . G' p / |p|^2 the smallest
    eigenvalue is top + r, and the squared gap r^2.
    """

    @staticmethod
    def forward(ctx, x, start, eps):
        start = start.mT  # [..., n, 2]
        u = x.mT @ start
        s, gb = (x @ u).split(1, -1)
        us = x.mT @ s
        t = x @ us
        top = _dot(s, t) / (_dot(s, s) + eps)
        p = gb - top * start[..., 1:]
        up = x.mT @ p
        q = x @ up - top * p
        rest = _dot(p, q) / (_dot(p, p) + eps)
        ctx.save_for_backward(x, start, u, s, us, t, top, p, up, q, rest)
        ctx.eps = eps
        return rest.square().reshape(x.shape[:-2])

    @staticmethod
    @once_differentiable
    def backward(ctx, dgap):
        x, start, u, s, us, t, top, p, up, q, rest = ctx.saved_tensors
        with _checks.autocast_off(x):
            drest = 2 * dgap[..., None, None] * rest / (_dot(p, p) + ctx.eps)
            dp = 2 * drest * (q - rest * p)
            dtop = -drest * _dot(p, p) - _dot(dp, start[..., 1:])
            dtop = dtop / (_dot(s, s) + ctx.eps)
            ds = 2 * dtop * (t - top * s)
            pair = torch.cat([ds, dp], -1)
            # of y = G v: dy (x^T v)^T + v (x^T dy)^T
            left = torch.cat([2 * dtop * s, 2 * drest * p, pair, start], -1)
            right = torch.cat([us, up, u, x.mT @ pair], -1)
            return left @ right.mT, None, None


def _dot(a, b):
    return (a * b).sum(-2, keepdim=True)


class GramDeterminant(torch.autograd.Function):
    """`_common.gram_determinant` of x x^T: [...]. The gradient needs the inverse of the kernel matrix only, a
    third of the operations of the derivative of the Cholesky factor."""

    @staticmethod
    def forward(ctx, x, ridge):
        kernel = (2 * (x @ x.mT).double() - 2).exp_()
        regular = kernel.clone()
        regular.diagonal(dim1=-2, dim2=-1).add_(ridge)
        factor, _ = torch.linalg.cholesky_ex(regular)
        ctx.save_for_backward(x, kernel, factor)
        return -2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dvalue):
        x, kernel, factor = ctx.saved_tensors
        with _checks.autocast_off(x):
            slope = torch.cholesky_inverse(factor).mul_(kernel).to(x.dtype)
            return (slope @ x).mul_(-4 * dvalue[..., None, None]), None
