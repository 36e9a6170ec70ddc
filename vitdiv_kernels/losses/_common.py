"""What the losses share: reductions, the spectral and hyperspherical measures of all levels."""

import torch

from .. import _checks
from .._layout import accumulation_dtype
from .._vectors import full_precision, normalise, unit
from ..ops.pairs.pairwise_rows import pairwise_nearest
from ._spectral import GramDeterminant, evaluate, log_determinant

MHS_VARIANTS = ("paper", "released")


def reduced(values, reduction):
    """Values, one per leading index, as the public `reduction` says."""
    return {"mean": torch.mean, "sum": torch.sum, "none": lambda x: x}[reduction](values)


def without_diagonal(matrices, value):
    diagonal = torch.eye(matrices.shape[-1], dtype=torch.bool, device=matrices.device)
    return matrices.masked_fill(diagonal, value)


def contrast(own, others):
    """-log(exp(own) / (exp(own) + exp(others))), without overflow."""
    return torch.nn.functional.softplus(others - own)


def minimum_separation(cosine, variant):
    """MHS of the cosines [..., n, n], n > 1, of one set: [...]."""
    if variant == "paper":
        return 2 * without_diagonal(cosine, -torch.inf).amax((-2, -1)) - 2
    distance = (2 - 2 * cosine).tril(-1)
    chosen = distance.detach()
    smallest = chosen.masked_fill(chosen == 0, torch.inf).amin((-2, -1), keepdim=True)
    return -(distance * (chosen == smallest)).sum((-2, -1))


def separation(x, variant, eps, backend="auto"):
    """MHS of the cosines of each set of vectors x [..., n, D], n > 1: [...]. "paper" makes tiles of them."""
    if variant == "released":
        x_hat = unit(x, eps)
        return minimum_separation(x_hat @ x_hat.mT, variant)
    nearest = pairwise_nearest(x, eps=eps, backend=backend)
    (x,) = full_precision(x)
    with torch.no_grad():
        x_hat = normalise(x, eps)
        cosines = torch.linalg.vecdot(x_hat, rows(x_hat, nearest))
        one = cosines.argmax(-1, keepdim=True)
        pair = torch.cat([one, nearest.gather(-1, one)], -1)
    a, b = normalise(rows(x, pair), eps).unbind(-2)
    return 2 * torch.linalg.vecdot(a, b) - 2


def rows(x, index):
    """x [..., n, D], index [..., m] to [..., m, D]: whole rows, 10 times as fast as a gather of elements."""
    sets = torch.arange(index[..., 0].numel(), device=x.device).view(*index.shape[:-1], 1)
    chosen = (index + x.shape[-2] * sets).flatten()
    return x.flatten(0, -2).index_select(0, chosen).view(*index.shape, x.shape[-1])


def gram_determinant(cosine, ridge):
    """MGD of the cosines [..., n, n]: [...]. In float64: with equal vectors only the ridge keeps the matrix
    regular."""
    return log_determinant(cosine.double(), ridge)[0].to(cosine.dtype)


def determinant(x, ridge, eps):
    """MGD of the cosines of each set of vectors x [..., n, D]: [...]."""
    return evaluate(GramDeterminant, unit(x.double(), eps), ridge).to(accumulation_dtype(x))


def starts(x, start, generator, draw):
    """Start vectors [..., 2, n] of the two power iterations on the n x n Gram matrices of x [..., n, D]."""
    shape = (*x.shape[:-2], 2, x.shape[-2])
    if start is None:
        return draw(shape, generator=generator, device=x.device, dtype=accumulation_dtype(x))
    if generator is not None:
        raise ValueError(
            "start and generator must not be given together: start vectors leave nothing to draw"
        )
    _checks.floating_tensor("start", start)
    _checks.same_device("start", start, "the input", x)
    # shapes of other lengths are not compared: that of a dynamic batch would become part of a program
    if start.shape != (shape if start.dim() == len(shape) else shape[-2:]):
        expected = f"{_checks.sizes(*shape)} or [2, {shape[-1]}]"
        raise ValueError(f"start must have shape {expected}, got {_checks.shape_of(start)}")
    return start.to(accumulation_dtype(x)).expand(shape)


def spectral_gap(product, start, eps):
    """(largest - smallest)^2 of the eigenvalues of a symmetric matrix, each by one step of power iteration
    and a Rayleigh quotient; the smallest from the matrix minus `largest` times the identity.

    product: takes [..., n] to the matrix times it; start: [..., 2, n]; eps is added to the quotients'
    denominators. Returns [...].
    """

    def rayleigh(apply, v):
        v = apply(v)
        return (v * apply(v)).sum(-1) / (v.square().sum(-1) + eps)

    largest = rayleigh(product, start[..., 0, :])
    shift = largest.unsqueeze(-1)
    smallest = largest + rayleigh(lambda v: product(v) - shift * v, start[..., 1, :])
    return (largest - smallest).square()


def grid_of(grid, n):
    """Rows and columns of n patches; `grid` is both, or None for a square."""
    side = round(n**0.5)
    sizes = (side, side) if grid is None else grid
    if isinstance(sizes, (tuple, list)):
        sizes = [_checks.integral(size) for size in sizes]
    sized = isinstance(sizes, (tuple, list)) and all(isinstance(size, int) and size > 0 for size in sizes)
    if not sized or len(sizes) != 2 or sizes[0] * sizes[1] != n:
        given = "a square" if grid is None else f"{grid!r}"
        raise ValueError(f"grid must be rows and columns of N = {n} patches, got {given}")
    return sizes


def numbers_below(name, value, stop, what):
    """Raises ValueError for an index below 0 or not below `stop`, where the host may read it; on a GPU, or in
    a program, torch's own gather fails."""
    if stop is None or not _checks.values_at_hand(value) or not value.numel():
        return
    low, high = value.aminmax()
    if low < 0 or high >= stop:
        wrong = int(low if low < 0 else high)
        raise ValueError(f"{name} must be {what} from 0 to {stop - 1}, got {wrong}")


def not_negative(name, value):
    """Raises ValueError for a negative number, where the host may read it."""
    if _checks.values_at_hand(value) and value.numel() and value.min() < 0:
        raise ValueError(f"{name} must not be negative, got {value.min().item():.4g}")


def pair(name, value):
    """Two positive integers, given as both or as one for a square."""
    value = _checks.integral(value)
    pair = (value, value) if isinstance(value, int) else tuple(map(_checks.integral, value))
    if len(pair) != 2 or not all(isinstance(size, int) and size > 0 for size in pair):
        raise ValueError(f"{name} must be one or two positive integers, got {value!r}")
    return pair
