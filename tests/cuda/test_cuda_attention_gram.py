"""The CUDA kernels of attention_gram, emulated, against the plain formula in float64."""

import formulas
import pytest
import torch
from comparing import assert_within_budget

from vitdiv_kernels._layout import accumulation_dtype

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# B, H, N, d
SIZES = [(1, 3, 2, 16), (2, 6, 3, 32), (1, 12, 17, 33), (2, 3, 65, 35), (1, 16, 37, 64), (1, 3, 40, 128)]
TWO_LAYERS = pytest.mark.parametrize(
    ("H", "H2", "d", "d2"), [(3, 6, 16, 33), (12, 12, 64, 64), (1, 40, 8, 16)]
)


def packed(B, H, N, d, dtype, parts=3):
    """Views of a packed projection, as a model has them: [B, H, N, d] each, not contiguous."""
    return torch.randn(B, N, parts, H, d, dtype=torch.float64).to(dtype).permute(2, 0, 3, 1, 4).unbind()


def check_forward(emulator, q, k, scale=None, q2=None, k2=None, scale2=None):
    def scale_of(x, given):
        return x.shape[-1] ** -0.5 if given is None else given

    layers = [(q, k, scale_of(q, scale))] + ([] if q2 is None else [(q2, k2, scale_of(q2, scale2))])
    got = emulator.attention_gram_fwd(*(x for layer in layers for x in layer))

    def plain(dtype):
        maps = [formulas.softmax_maps(q.to(dtype), k.to(dtype), scale) for q, k, scale in layers]
        maps = torch.cat(maps, 1)
        centred = maps - 1 / k.shape[2]
        return torch.einsum("bgij,bhij->bgh", centred, centred)

    truth = plain(torch.float64)
    # rounding of the maps is seen in the Gram matrix of uncentred ones
    scale = max(truth.abs().max().item(), 1e-6 * q.shape[2] / k.shape[2])
    assert_within_budget(got, plain(q.dtype), truth, q.dtype, "gram", scale=scale)
    return got


def check_backward(emulator, q, k, scale=0.3, q2=None, k2=None, scale2=0.0, needs=None):
    needs = needs or [True, True, q2 is not None, q2 is not None]
    inputs = [x for x in (q, k, q2, k2) if x is not None]
    H = q.shape[1] + (0 if q2 is None else q2.shape[1])
    dgram = torch.randn(q.shape[0], H, H, dtype=torch.float64).to(accumulation_dtype(q))
    got = emulator.attention_gram_bwd(dgram + dgram.mT, q, k, scale, q2, k2, scale2, needs)

    def plain(dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        maps = [
            formulas.softmax_maps(*leaves[i : i + 2], (scale, scale2)[i // 2])
            for i in range(0, len(leaves), 2)
        ]
        maps = torch.cat(maps, 1)
        gram = torch.einsum("bgij,bhij->bgh", maps, maps)
        return torch.autograd.grad(gram, leaves, dgram.to(dtype))

    truths = plain(torch.float64)
    for name, gradient, rough, truth, need in zip(
        ("dq", "dk", "dq2", "dk2"), got, plain(q.dtype), truths, needs, strict=False
    ):
        if need:
            scale = max(truth.abs().max().item(), 1e-9)
            assert_within_budget(gradient, rough, truth, q.dtype, name, scale=scale)
        else:
            assert gradient.shape == (0,)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "H", "N", "d"), [(1, 1, 1, 1), *SIZES])
def test_forward(emulator, B, H, N, d, dtype):
    q, k, _ = packed(B, H, N, d, dtype)
    check_forward(emulator, q, k)


@pytest.mark.parametrize(
    ("H", "dtype"), [(12, torch.float16), (6, torch.bfloat16), (3, torch.float32), (1, torch.float64)]
)
def test_forward_at_the_length_of_an_image_of_224_pixels(emulator, H, dtype):
    q, k, _ = packed(1, H, 197, 64, dtype)
    check_forward(emulator, q, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "M"), [(5, 70), (65, 17), (3, 1), (1, 1025)])
def test_keys_may_be_more_or_fewer_than_queries(emulator, N, M, dtype):
    q, k = torch.randn(1, 3, N, 24, dtype=torch.float64).to(dtype), torch.randn(1, 3, M, 24).to(dtype)
    check_forward(emulator, q, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@TWO_LAYERS
def test_two_layers(emulator, H, H2, d, d2, dtype):
    q, k, _ = packed(2, H, 33, d, dtype)
    q2, k2, _ = packed(2, H2, 33, d2, dtype)
    check_forward(emulator, q, k, None, q2, k2, 0.7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("order", ["reverse", *range(6)])
def test_any_schedule_gives_the_same_bits(emulator, order, dtype):
    q, k, _ = packed(2, 6, 40, 33, dtype)
    expected = emulator.attention_gram_fwd(q, k, 0.2)
    emulator.configure(*((order,) if order == "reverse" else ("random", order)))
    assert torch.equal(emulator.attention_gram_fwd(q, k, 0.2), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", [80, 89])
def test_gpus_with_less_shared_memory(emulator, architecture, dtype):
    emulator.configure(architecture=architecture)
    H = 8 if dtype == torch.float64 and architecture == 89 else 32
    q, k, _ = packed(1, H, 33, 128, dtype)
    check_forward(emulator, q, k)


def test_what_does_not_fit_is_refused(emulator):
    emulator.configure(architecture=89)
    q, k, _ = packed(1, 32, 3, 128, torch.float64)
    with pytest.raises(
        ValueError, match="32 heads of width 128 do not fit the shared memory of this GPU, 101376"
    ):
        emulator.attention_gram_fwd(q, k, 1.0)
    q, k, _ = packed(1, 65, 3, 8, torch.float16)
    with pytest.raises(ValueError, match="at most 64 heads, of both layers together, got 65"):
        emulator.attention_gram_fwd(q, k, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_and_uniform_maps(emulator, dtype):
    q, k, _ = packed(1, 3, 33, 16, dtype)
    check_forward(emulator, q * 100, k * 100, scale=-1.0)
    check_forward(emulator, q, k, scale=1e-3)
    assert not emulator.attention_gram_fwd(torch.zeros_like(q), k, 1.0).abs().max() > 1e-12


def test_not_a_number_stays_one(emulator):
    q, k, _ = packed(1, 2, 20, 16, torch.float16)
    q[0, 1, 3, 5] = float("nan")
    gram = emulator.attention_gram_fwd(q, k, 0.25)
    assert gram[0, 0, 0].isfinite()
    assert gram[0, 1].isnan().all()
    assert gram[0, :, 1].isnan().all()


def test_an_empty_batch_launches_nothing(emulator):
    q = torch.ones(0, 2, 3, 8)
    with emulator.counting() as counts:
        assert emulator.attention_gram_fwd(q, q, 1.0).shape == (0, 2, 2)
    assert counts["launches"] == 0


def test_shared_memory_is_read_without_bank_conflicts(emulator):
    q, k, _ = packed(1, 12, 197, 64, torch.float16)
    with emulator.counting() as counts:
        emulator.attention_gram_fwd(q, k, 0.125)
    # four matrices each; the zeros that stand for absent heads meet the banks of one present head
    assert counts["ldmatrix_rounds"] < 4.2 * counts["ldmatrix"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "H", "N", "d"), [(1, 1, 2, 1), *SIZES])
def test_backward(emulator, B, H, N, d, dtype):
    q, k, _ = packed(B, H, N, d, dtype)
    check_backward(emulator, q, k, d**-0.5)


@pytest.mark.parametrize(("H", "dtype"), [(12, torch.float16), (3, torch.float64)])
def test_backward_at_the_length_of_an_image_of_224_pixels(emulator, H, dtype):
    q, k, _ = packed(1, H, 197, 64, dtype)
    check_backward(emulator, q, k, 0.125)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "M"), [(5, 70), (65, 17), (3, 1)])
def test_backward_with_more_or_fewer_keys(emulator, N, M, dtype):
    q, k = torch.randn(1, 3, N, 24, dtype=torch.float64).to(dtype), torch.randn(1, 3, M, 24).to(dtype)
    check_backward(emulator, q, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@TWO_LAYERS
def test_backward_of_two_layers(emulator, H, H2, d, d2, dtype):
    q, k, _ = packed(1, H, 33, d, dtype)
    q2, k2, _ = packed(1, H2, 33, d2, dtype)
    check_backward(emulator, q, k, 0.3, q2, k2, 0.4)


@pytest.mark.parametrize("needs", [[True, False, False, True], [False, True, True, False], [False] * 4])
def test_only_gradients_that_are_needed(emulator, needs):
    q, k, _ = packed(2, 3, 33, 16, torch.float32)
    q2, k2, _ = packed(2, 2, 33, 16, torch.float32)
    check_backward(emulator, q, k, 0.3, q2, k2, 0.4, needs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("order", ["reverse", *range(4)])
def test_backward_gives_the_same_bits_in_any_schedule(emulator, order, dtype):
    q, k, _ = packed(2, 6, 40, 33, dtype)
    coupling = torch.randn(2, 6, 6)
    expected = emulator.attention_gram_bwd(coupling + coupling.mT, q, k, 0.2)
    emulator.configure(*((order,) if order == "reverse" else ("random", order)))
    got = emulator.attention_gram_bwd(coupling + coupling.mT, q, k, 0.2)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", [80, 89])
def test_backward_on_gpus_with_less_shared_memory(emulator, architecture, dtype):
    emulator.configure(architecture=architecture)
    H = 6 if dtype == torch.float64 and architecture == 89 else 24
    q, k, _ = packed(1, H, 33, 128, dtype)
    check_backward(emulator, q, k, 0.1)
