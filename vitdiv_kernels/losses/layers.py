"""How alike the attention maps of different layers are, without holding the maps of any layer.

A layer is a tuple (q, k) of queries [B, H, N, d] and keys [B, H, M, d], whose maps are softmax(scale q k^T);
or (q, k, mix) or (q, k, mix, bias) where its heads are mixed afterwards, map g being
sum_h mix[g, h] A_h + bias[g] (re-attention; of batch norm the folded mix). B, H, N and M are those of all
layers.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import _checks, _vectors
from .._layout import accumulation_dtype
from .._vectors import power_of_two

ALONG = ("columns", "rows", "maps", "heads")
EPS = 1e-8  # stands for smaller norms, as in torch.nn.CosineSimilarity


def layer_similarity(
    layers: Sequence[Sequence[Tensor]],
    *,
    along: Literal["columns", "rows", "maps", "heads"] = "columns",
    reduction: Literal["none", "mean"] = "none",
    scale: float | None = None,
    rows: int = 64,
) -> Tensor:
    """Cosine similarity of the attention maps of all pairs of layers p, q, per head.

    Args:
        layers: L layers, see above.
        along: what is compared, of A^p and A^q: "columns" A[:, t], how much token t gives to all others, as
            in the paper's figure; "rows" A[i, :], what token i takes; "maps" the whole map; "heads", as
            `cos_reg` does it, the vector of all heads at each (i, j), of which the mean over (i, j) is
            given.
        reduction: "none", or "mean" over images, heads and tokens.
        scale: the factor of the logits; None is d^-1/2 of each layer.
        rows: queries whose maps are held at a time.

    Returns:
        float32 (float64 for float64 input), [L, L, B, H, M] for columns, [L, L, B, H, N] for rows,
        [L, L, B, H] for maps, [L, L, B] for heads; [L, L] with reduction "mean". A column of zeros has the
        similarity 0.

    Under autocast q and k are cast to autocast's dtype, as scaled_dot_product_attention does; the maps are
    float32 at least.

    Cost: rows in turn, maps of L B H `rows` M numbers at a time, made again in the backward; nothing N x M.
    O(L B H N M (d + L)).

    Source: Zhou et al. 2021 (arXiv 2103.11886), the cross-layer similarity of attention maps.

    Example:
        >>> layers = [torch.randn(2, 4, 6, 49, 16).unbind() for _ in range(3)]  # q, k of each
        >>> losses.layer_similarity(layers, along="maps", reduction="mean").shape
        torch.Size([3, 3])
    """
    layers, scale, rows = _checked(layers, scale, rows)
    _checks.one_of("along", along, ALONG)
    _checks.one_of("reduction", reduction, ("none", "mean"))
    pairs = [(p, q) for p in range(len(layers)) for q in range(p, len(layers))]
    values = _similarities(layers, pairs, along, scale, rows)
    matrix: list[list[Any]] = [[None] * len(layers) for _ in layers]
    for (p, q), value in zip(pairs, values, strict=True):
        matrix[p][q] = matrix[q][p] = value.mean() if reduction == "mean" else value
    return torch.stack([torch.stack(row) for row in matrix])


def similar_block_ratio(
    similarity: Tensor, *, threshold: float = 0.9, token_ratio: float = 0.9
) -> tuple[Tensor, Tensor]:
    """The share of blocks whose attention maps are those of the block before.

    Args:
        similarity: [L, L, ...] from `layer_similarity`, L > 1.
        threshold: a head and token is similar to that of the block before where its cosine is larger.
        token_ratio: a block is similar where the share of its similar heads and tokens is larger.

    Returns:
        the ratio, a float32 scalar in [0, 1] of all L blocks; and the shares of similar heads and tokens of
        blocks 1 ... L - 1, float64 [L - 1]. No gradient.

    Source: Zhou et al. 2021 (arXiv 2103.11886), the ratio of similar blocks.

    Example:
        >>> layers = [torch.randn(2, 4, 6, 49, 16).unbind() for _ in range(3)]
        >>> ratio = losses.similar_block_ratio(losses.layer_similarity(layers))
    """
    _checks.floating_tensor("similarity", similarity)
    if similarity.dim() < 2 or similarity.shape[0] != similarity.shape[1] or len(similarity) < 2:
        raise ValueError(f"similarity must have shape [L, L, ...], L > 1, got {_checks.shape_of(similarity)}")
    threshold = _checks.number("threshold", threshold)
    token_ratio = _checks.number("token_ratio", token_ratio)
    before = similarity.detach().diagonal(1).movedim(-1, 0)  # block p + 1 with block p
    shares = (before > threshold).reshape(len(before), -1).double().mean(-1)
    return (shares > token_ratio).sum().float() / len(similarity), shares


def cos_reg(
    layers: Sequence[Sequence[Tensor]],
    *,
    along: Literal["columns", "rows", "maps", "heads"] = "heads",
    scale: float | None = None,
    rows: int = 64,
) -> Tensor:
    """The mean cosine of the attention maps of layers next to each other.

    Args:
        layers: L > 1 layers, see above. The released code takes the first n + 1 of the model, n = 2 by
            default, with the mixed maps.
        along: "heads" compares at each (i, j) the vectors of all heads, as the released code does (its axis 1
            is that of the heads); "columns", "rows" or "maps" as in `layer_similarity`.
        scale, rows: as for `layer_similarity`.

    Returns:
        a scalar, float32 (float64 for float64 input): the mean over pairs p, p + 1, images, and what is left
        of heads and tokens. The released code weighs it with 0.1.

    Cost: that of `layer_similarity`.

    Source: the released code of Zhou et al. 2021 (arXiv 2103.11886), `SoftTargetCrossEntropyCosReg`.

    Example:
        >>> layers = [torch.randn(2, 4, 6, 49, 16).requires_grad_().unbind() for _ in range(3)]
        >>> losses.cos_reg(layers).backward()
    """
    layers, scale, rows = _checked(layers, scale, rows)
    _checks.one_of("along", along, ALONG)
    if len(layers) < 2:
        raise ValueError(f"layers must hold at least two layers, got {len(layers)}")
    pairs = [(p, p + 1) for p in range(len(layers) - 1)]
    return torch.stack([value.mean() for value in _similarities(layers, pairs, along, scale, rows)]).mean()


def _checked(layers, scale, rows):
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers must be a list of tuples (q, k, ...), got {type(layers).__name__}")
    layers = list(layers)
    for i, layer in enumerate(layers):
        if not isinstance(layer, Iterable):
            raise TypeError(f"layers[{i}] must be a tuple (q, k, ...), got {type(layer).__name__}")
    layers = [tuple(layer) for layer in layers]
    if not layers or not all(2 <= len(layer) <= 4 for layer in layers):
        raise ValueError(
            "layers must be a list of (q, k), (q, k, mix) or (q, k, mix, bias), "
            f"got {len(layers)} layers of {[len(layer) for layer in layers]} tensors"
        )
    cast = []
    for i, (q, k, *mixing) in enumerate(layers):
        name = f"layers[{i}]"
        if _checks.autocast_enabled(q):
            q, k = _checks.autocast_to(q, k)
        _checks.queries_and_keys(q, k, f"q of {name}", f"k of {name}")
        first_q, first_k = cast[0][:2] if cast else (q, k)
        _checks.same_kind(f"q of {name}", q, "q of layers[0]", first_q)
        if q.shape[:3] != first_q.shape[:3] or k.shape[2] != first_k.shape[2]:
            (b, h, n), m = first_q.shape[:3], first_k.shape[2]
            raise ValueError(
                f"q and k of {name} must have shapes [{b}, {h}, {n}, d] and [{b}, {h}, {m}, d] to match "
                f"layers[0], got {_checks.shape_of(q)} and {_checks.shape_of(k)}"
            )
        heads = q.shape[1]
        for what, tensor, shape in zip(("mix", "bias"), mixing, ((heads, heads), (heads,)), strict=False):
            _checks.floating_tensor(f"{what} of {name}", tensor)
            _checks.shaped(f"{what} of {name}", tensor, shape)
        cast.append((q, k, *mixing))
    if scale is not None:
        scale = _checks.number("scale", scale)
    return cast, scale, _checks.count("rows", rows, at_least=1)


def _similarities(layers, pairs, along, scale, rows):
    """Per pair: [B, H, M] for columns, [B, H, N] for rows, [B, H] for maps, [B] for heads."""
    first = layers[0][0]
    n, m = first.shape[2], layers[0][1].shape[2]
    if along != "heads":
        layers, divisors = zip(*map(_near_one, layers), strict=True)
        shape = (len(layers), 1, -1) + (() if along == "maps" else (1,))
        least = (EPS / torch.stack(divisors)).view(shape)
    sizes = [len(layer) for layer in layers]
    tensors = [tensor for layer in layers for tensor in layer]
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    def sums(start, *tensors):
        maps, rest = [], list(tensors)
        for size in sizes:
            maps.append(_maps(rest[:size], start, start + rows, scale))
            rest = rest[size:]
        return _sums(maps, pairs, along)

    with _checks.autocast_off(first):
        parts = [
            checkpoint(sums, start, *tensors, use_reentrant=False, preserve_rng_state=False)
            if differentiated
            else sums(start, *tensors)
            for start in range(0, n, rows)
        ]
        if along == "heads":
            return sum(parts) / (n * m)
        totals = torch.cat(parts, -1) if along == "rows" else sum(parts)
        squares, products = totals[: len(layers)], totals[len(layers) :]
        inverse_norms = squares.clamp_min(least.square().clamp_min(torch.finfo(squares.dtype).tiny)).rsqrt()
        p, q = zip(*pairs, strict=True)
        return products * inverse_norms[list(p)] * inverse_norms[list(q)]


def _near_one(layer):
    """The layer with mixes divided by powers of two, one for each head, where they are larger than 1; and
    these, [H]: squares of the mixed maps stay within range."""
    q, k, *mixing = layer
    mixing = _vectors.full_precision(*mixing)
    size = q.new_ones(q.shape[1], dtype=accumulation_dtype(q))
    for tensor in mixing:
        size = torch.maximum(size, tensor.detach().abs().reshape(len(size), -1).amax(-1).to(size.dtype))
    size = power_of_two(size)
    mixing = [tensor / size.view(-1, *(1,) * (tensor.dim() - 1)) for tensor in mixing]
    return (q, k, *mixing), size


def _maps(layer, start, stop, scale):
    """Rows start ... stop of a layer's maps, [B, H, rows, M]."""
    q, k, *mixing = layer
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = _vectors.full_precision(q[:, :, start:stop], k)
    maps = (scale * q @ k.mT).softmax(-1)
    if mixing:
        maps = torch.einsum("gh,bhij->bgij", mixing[0].to(maps.dtype), maps)
    if len(mixing) > 1:
        maps = maps + mixing[1].to(maps.dtype).view(-1, 1, 1)
    return maps


def _sums(maps, pairs, along):
    """What these rows add: for "heads" cosines [pairs, B], else squares of layers, then products of pairs."""
    if along == "heads":
        units = [_vectors.unit(layer.movedim(1, -1), EPS) for layer in maps]
        return torch.stack([torch.einsum("bijh,bijh->b", units[p], units[q]) for p, q in pairs])
    axes = {"columns": -2, "rows": -1, "maps": (-2, -1)}[along]
    both = [(p, p) for p in range(len(maps))] + list(pairs)
    return torch.stack([(maps[p] * maps[q]).sum(axes) for p, q in both])
