"""What the Triton kernels of pairs of vectors hold beside inputs and results, and that results do not depend
on the size of their workspace; the maps' is in test_triton_workspace.py."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from allocations import Allocations, beyond_results

from vitdiv_kernels.ops import _launch as _triton
from vitdiv_kernels.ops.pairs import _weighted
from vitdiv_kernels.ops.pairs.pairwise_cosine import triton_kernels as cosine
from vitdiv_kernels.ops.pairs.pairwise_rows import triton_kernels as rows
from vitdiv_kernels.ops.pairs.two_gram import triton_kernels as grams

IMAGES = 8


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(("penalty", "bits"), [("abs", 2.5), ("relu", 1.5), ("square", 0), ("signed", 0)])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_bits_a_pair_of_patches(penalty, bits, capability):
    """Signs of S, which are saved, and half a bit: a float32 sum for each row of a tile of 64 columns, or
    less of wider tiles."""

    def forward_and_backward(tokens):
        x = meta(IMAGES, tokens, 384)
        with _triton.recording(capability), Allocations() as made:
            sums, saved = cosine.pairwise_cosine_fwd(x, None, penalty, False, 1e-8, True)
            dx, _ = cosine.pairwise_cosine_bwd(sums, x, None, saved, penalty, False, 1e-8, True, False)
        return made.bytes - dx.nbytes

    few, many = forward_and_backward(1024), forward_and_backward(2048)
    assert many - 2 * few <= IMAGES * bits / 8 * (2048**2 - 2 * 1024**2)


def logsumexp(x, y):
    sums, saved = rows.pairwise_logsumexp_fwd(x, y, 10.0, 1e-8, True)
    return sums, *rows.pairwise_logsumexp_bwd(sums, sums, x, y, saved, 10.0, 1e-8, True, y is not None)


def nearest(x, y):
    return rows.pairwise_nearest(x, y, 1e-8)


def two_gram(x, y):
    options = "hinge", 0.1, True, 1e-8, True, y is not None
    sums, saved = grams.two_gram_fwd(x, y, *options)
    return sums, *grams.two_gram_bwd(sums, x, y, saved, *options)


@pytest.mark.parametrize(("operation", "bits"), [(logsumexp, 1), (nearest, 1), (two_gram, 0.55)])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_partial_results_of_tiles(operation, bits, capability, monkeypatch):
    """A float32, and an index of nearest, for each row of a tile of 128 columns, once forward and once for
    each gradient; of two_gram's forward for each tile. The workspace does not grow."""
    monkeypatch.setattr(_weighted, "workspace_bytes", lambda capability: 1 << 20)
    held = []
    for tokens in (1024, 2048):
        with _triton.recording(capability):
            held.append(beyond_results(operation, meta(IMAGES, tokens, 384), meta(IMAGES, tokens, 384)))
    assert held[1] - 2 * held[0] <= IMAGES * bits / 8 * (2048**2 - 2 * 1024**2)


def squares(x, y):
    sums, saved = cosine.pairwise_cosine_fwd(x, y, "square", False, 1e-8, True)
    return cosine.pairwise_cosine_bwd(sums, x, y, saved, "square", False, 1e-8, True, y is not None)


@pytest.mark.skipif(not _triton.INTERPRETED, reason="needs TRITON_INTERPRET=1 before Triton is imported")
@pytest.mark.parametrize("of", [squares, logsumexp, two_gram])
@pytest.mark.parametrize("two_sets", [False, True])
@pytest.mark.parametrize("limit", [40 * 48 * 8, 20 * 48 * 8])  # of an item, and of 16 rows of one
def test_any_size_of_the_workspace(of, two_sets, limit, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    y = torch.randn(2, 40, 16, dtype=torch.float64) if two_sets else None
    expected = of(x, y)
    monkeypatch.setattr(_weighted, "workspace_bytes", lambda capability: limit)
    for found, of_one_chunk in zip(of(x, y), expected, strict=True):
        torch.testing.assert_close(found, of_one_chunk, rtol=1e-12, atol=1e-12)
