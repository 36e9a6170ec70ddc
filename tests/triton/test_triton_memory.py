"""What the Triton kernels hold beside inputs and results: nothing that grows as the N x N maps do.

The workspace schedule is in test_triton_workspace.py.
"""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from allocations import Allocations, beyond_results

from vitdiv_kernels.ops import _launch as _triton
from vitdiv_kernels.ops.maps.attention_gram import triton_kernels as gram
from vitdiv_kernels.ops.maps.reattention.triton_kernels import streaming
from vitdiv_kernels.ops.pairs.pairwise_cosine import triton_kernels as cosine
from vitdiv_kernels.ops.pairs.pairwise_rows import triton_kernels as rows
from vitdiv_kernels.ops.pairs.two_gram import triton_kernels as grams

IMAGES, HEADS, WIDTH = 8, 8, 64


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def heads_of(tokens):
    """q, k and v as a packed projection leaves them."""
    return meta(IMAGES, tokens, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)


def matrix(*images):
    return meta(*images, HEADS, HEADS, dtype=torch.float32)


def reattention_forward(tokens):
    q, k, v = heads_of(tokens)
    vector = matrix()[0]
    return beyond_results(
        streaming.forward, q, k, v, 0.1, None, None, matrix(), vector, False, vector, vector, 1e-5, True, True
    )


def reattention_backward(tokens):
    q, k, v = heads_of(tokens)
    dout, vector = meta(IMAGES, HEADS, tokens, WIDTH), matrix()[0]
    mixed = q, k, v, 0.1, matrix(), vector, matrix(), vector, False, vector, vector, 1e-5
    return beyond_results(streaming.backward, dout, matrix(IMAGES), *mixed, [True] * 6)


def gram_forward(tokens):
    q, k, _ = heads_of(tokens)
    return beyond_results(gram.attention_gram_fwd, q, k, 0.1, None, None, 0.1)


def gram_backward(tokens):
    q, k, _ = heads_of(tokens)
    needs = [True, True, False, False]
    return beyond_results(gram.attention_gram_bwd, matrix(IMAGES), q, k, 0.1, None, None, 0.1, needs)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
@pytest.mark.parametrize(
    "held", [reattention_forward, reattention_backward, gram_forward, gram_backward], ids=lambda f: f.__name__
)
def test_nothing_grows_as_the_maps(held, capability):
    with _triton.recording(capability):
        few, many = held(1024), held(2048)
    assert many <= 2.1 * few + 2**16
    assert many <= IMAGES * HEADS * 2048 * 2048 * 2 / 16  # of the maps in bfloat16


@pytest.mark.parametrize(("penalty", "bits"), [("abs", 2.5), ("relu", 1.5), ("square", 0), ("signed", 0)])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_bits_a_pair_of_patches(penalty, bits, capability):
    """Signs of S, which are saved, and half a bit: a float32 sum for each row of a tile of 64 columns."""

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
    return sums, *rows.pairwise_logsumexp_bwd(sums, sums, x, y, saved, 10.0, 1e-8, True, True)


def nearest(x, y):
    return rows.pairwise_nearest(x, y, 1e-8)


def two_gram(x, y):
    options = "hinge", 0.1, True, 1e-8, True, True
    sums, saved = grams.two_gram_fwd(x, y, *options)
    return sums, *grams.two_gram_bwd(sums, x, y, saved, *options)


@pytest.mark.parametrize(("operation", "bits"), [(logsumexp, 0.5), (nearest, 1), (two_gram, 0.01)])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_partial_results_of_tiles(operation, bits, capability):
    """A float32, and an index of nearest, for each row of a tile of 64 columns; of two_gram for each tile."""
    held = []
    for tokens in (1024, 2048):
        with _triton.recording(capability):
            held.append(beyond_results(operation, meta(IMAGES, tokens, 384), meta(IMAGES, tokens, 384)))
    assert held[1] - 2 * held[0] <= IMAGES * bits / 8 * (2048**2 - 2 * 1024**2)
