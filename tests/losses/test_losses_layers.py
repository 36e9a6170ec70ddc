"""How alike layers are, against the formulas on whole maps, in float64."""

import pytest
import torch
from formulas import softmax_maps
from loss_checks import assert_finite, assert_is_its_formula, bad_input, value_and_gradients
from torch.nn.functional import cosine_similarity

from vitdiv_kernels import losses

B, H, N, M, d = 2, 3, 7, 5, 3
GENERATOR = torch.Generator().manual_seed(13)
Q = torch.randn(3, B, H, N, d, generator=GENERATOR)
K = torch.randn(3, B, H, M, d, generator=GENERATOR)
MIX = torch.randn(3, H, H, generator=GENERATOR)
BIAS = torch.randn(3, H, generator=GENERATOR)
TENSORS = [*Q, *K, *MIX, *BIAS]


def layers_of(*tensors):
    """A plain layer, a mixed one, and one with a bias."""
    (q0, q1, q2), (k0, k1, k2), (_, m1, m2), (_, _, b2) = (tensors[i : i + 3] for i in range(0, 12, 3))
    return [(q0, k0), (q1, k1, m1), (q2, k2, m2, b2)]


def maps(q, k, mix=None, bias=None):
    a = softmax_maps(q, k)
    if mix is not None:
        a = torch.einsum("gh,bhij->bgij", mix, a)
    return a if bias is None else a + bias.view(-1, 1, 1)


def similarity(p, q, along):
    if along == "columns":
        return cosine_similarity(p, q, dim=-2)
    if along == "rows":
        return cosine_similarity(p, q, dim=-1)
    if along == "maps":
        return cosine_similarity(p.flatten(2), q.flatten(2), dim=-1)
    return cosine_similarity(p, q, dim=1).mean((-2, -1))


ALONG = pytest.mark.parametrize("along", ["columns", "rows", "maps", "heads"])
SHAPES = {"columns": (B, H, M), "rows": (B, H, N), "maps": (B, H), "heads": (B,)}


@ALONG
@pytest.mark.parametrize("rows", [2, 64])
def test_similarity(along, rows):
    layers = [tuple(t.double() for t in layer) for layer in layers_of(*TENSORS)]
    got = losses.layer_similarity(layers, along=along, rows=rows)
    assert got.shape == (3, 3, *SHAPES[along])
    full = [maps(*layer) for layer in layers]
    for p in range(3):
        for q in range(3):
            torch.testing.assert_close(got[p, q], similarity(full[p], full[q], along), rtol=1e-9, atol=1e-9)
    mean = losses.layer_similarity(layers, along=along, rows=rows, reduction="mean")
    torch.testing.assert_close(mean, got.flatten(2).mean(-1))


@ALONG
def test_cos_reg(along):
    def loss(*tensors):
        return losses.cos_reg(layers_of(*tensors), along=along, rows=3)

    def formula(*tensors):
        full = [maps(*layer) for layer in layers_of(*tensors)]
        return (similarity(*full[:2], along).mean() + similarity(*full[1:], along).mean()) / 2

    assert_is_its_formula(loss, formula, *TENSORS)


def test_cos_reg_is_the_released_code():
    """Its axis 1 is that of the heads; n pairs, divided by n."""
    layers = layers_of(*TENSORS)
    full = [maps(*layer) for layer in layers]
    total = sum(cosine_similarity(full[i], full[i + 1], dim=1) for i in range(2))
    torch.testing.assert_close(losses.cos_reg(layers), total.mean() / 2)


def test_columns_are_compared_unless_asked_otherwise():
    layers = layers_of(*TENSORS)
    assert torch.equal(losses.layer_similarity(layers), losses.layer_similarity(layers, along="columns"))


def test_a_gradient_of_similarity_reaches_one_layer_only():
    def loss(*tensors):
        return losses.layer_similarity(layers_of(*tensors), rows=2)[0, 1]

    _, grads = value_and_gradients(loss, TENSORS)
    reached = [bool(g.abs().max() > 1e-9) for g in grads]
    assert reached == [True, True, False, True, True, False, False, True, False, False, False, False]


def test_scale_and_autocast():
    layers = [(Q[0], K[0]), (Q[1], K[1])]
    p, q = (softmax_maps(*layer, scale=2.0) for layer in layers)
    torch.testing.assert_close(losses.cos_reg(layers, scale=2.0), cosine_similarity(p, q, dim=1).mean())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = losses.cos_reg(layers)
    assert got.dtype == torch.float32
    assert torch.equal(got, losses.cos_reg([(q.bfloat16(), k.bfloat16()) for q, k in layers]))


@ALONG
def test_equal_layers_and_columns_that_nobody_reads(along):
    same = losses.layer_similarity([(Q[0], K[0])] * 2, along=along)
    torch.testing.assert_close(same, torch.ones_like(same))

    def sharp(q, k):
        return losses.layer_similarity([(1e4 * q, k), (1e4 * k[:, :, :1] + 0 * q, k)], along=along)

    value, _ = assert_finite(sharp, Q[0], K[0])
    assert value.min() >= 0
    assert value.max() <= 1 + 1e-6


def test_similar_blocks():
    # block 1 is block 0 in 3 of 4 heads and tokens, block 2 is block 1 in all, block 3 in none
    near = torch.tensor([[0.95, 0.99, 0.91, 0.2], [0.95] * 4, [0.89] * 4])
    similarity = torch.ones(4, 4, 1, 2, 2)
    for p in range(3):
        similarity[p, p + 1] = near[p].view(1, 2, 2)
    ratio, shares = losses.similar_block_ratio(similarity)
    assert shares.tolist() == [0.75, 1.0, 0.0]
    assert ratio.item() == 0.25
    assert losses.similar_block_ratio(similarity, token_ratio=0.7)[0].item() == 0.5
    assert losses.similar_block_ratio(similarity, threshold=0.8, token_ratio=0.7)[0].item() == 0.75
    assert losses.similar_block_ratio(torch.full((2, 2), 0.8))[0].item() == 0
    # larger, not as large
    half = torch.full((2, 2), 0.5)
    assert losses.similar_block_ratio(half, threshold=0.5)[1].item() == 0
    assert losses.similar_block_ratio(half, threshold=0.4, token_ratio=1.0)[0].item() == 0


LAYERS = [(Q[0], K[0]), (Q[1], K[1])]
BAD = [
    (lambda: losses.layer_similarity([]), ValueError, ["layers"]),
    (lambda: losses.layer_similarity(5), TypeError, ["layers must be a list of tuples", "int"]),
    (lambda: losses.cos_reg([LAYERS[0], None]), TypeError, ["layers[1] must be a tuple", "NoneType"]),
    (lambda: losses.layer_similarity([(Q[0],)]), ValueError, ["layers", "(q, k, mix)", "[1] tensors"]),
    (lambda: losses.layer_similarity([LAYERS[0], (Q[1], 2)]), TypeError, ["k of layers[1]", "int"]),
    (
        lambda: losses.layer_similarity([LAYERS[0], (Q[1], K[1][:, :, 1:])]),
        ValueError,
        ["layers[1]", "[2, 3, 5, d]", "[2, 3, 4, 3]"],
    ),
    (
        lambda: losses.layer_similarity([(Q[0], K[0], MIX[0, :2])]),
        ValueError,
        ["mix of layers[0]", "[3, 3]", "[2, 3]"],
    ),
    (lambda: losses.layer_similarity([(Q[0].double(), K[0])]), TypeError, ["k of layers[0]", "float64"]),
    (lambda: losses.layer_similarity(LAYERS, along="tokens"), ValueError, ["along", "'columns'", "'tokens'"]),
    (lambda: losses.layer_similarity(LAYERS, rows=0), ValueError, ["rows", "0"]),
    (lambda: losses.layer_similarity(LAYERS, reduction="sum"), ValueError, ["reduction", "'sum'"]),
    (lambda: losses.cos_reg(LAYERS[:1]), ValueError, ["layers", "two", "1"]),
    (lambda: losses.cos_reg(LAYERS, scale="d"), TypeError, ["scale", "str"]),
    (
        lambda: losses.similar_block_ratio(torch.ones(1, 1)),
        ValueError,
        ["similarity", "[L, L, ...]", "[1, 1]"],
    ),
    (lambda: losses.similar_block_ratio(torch.ones(2, 2), threshold="x"), TypeError, ["threshold", "str"]),
]


test_bad_input_gets_a_sentence = bad_input(BAD)
