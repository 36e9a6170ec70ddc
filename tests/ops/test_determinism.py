"""The same bits twice, at one thread and at two, also when there are fewer images than threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import vitdiv_kernels as vd

SIZES = [(1, 3, 197, 64), (5, 4, 65, 32), (3, 12, 33, 16)]  # B, H, N, d


def bits_of(operation, inputs):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = operation(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # of its own: threads share torch's generator
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]


def assert_same_bits(operation, inputs, times=4):
    first = bits_of(operation, inputs)
    for _ in range(times):
        for a, b in zip(first, bits_of(operation, inputs), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    ("norm", "pre"), [("none", False), ("batch", False), ("layer", False), ("batch", True)]
)
def test_reattention(backend, interpreted, threads, sizes, norm, pre, dtype):
    batch, heads, tokens, width = sizes
    if interpreted:
        batch, heads, tokens = 2, 3, min(tokens, 33)
    q, k, v = torch.randn(3, batch, heads, tokens, width, dtype=dtype)
    matrices = torch.randn(1 + pre, heads, heads)

    def operation(q, k, v, matrices):
        pre_mix = matrices[1] if pre else None
        return vd.reattention(
            q, k, v, matrices[0], pre_mix=pre_mix, norm=norm, training=True, return_gram=True, backend=backend
        )

    assert_same_bits(operation, [q, k, v, matrices], 1 if interpreted else 4)


def test_calls_at_the_same_time(library, one_thread):
    """Of several sizes, from several Python threads: each has scratch memory of its own."""
    cases = [torch.randn(3, batch, 6, tokens, 32) for batch, tokens in [(1, 33), (2, 197), (3, 65), (1, 500)]]
    mix = torch.randn(6, 6)

    def operation(qkv):
        return vd.reattention(*qkv, mix, norm="batch", training=True, backend="native")

    alone = [bits_of(lambda *qkv: operation(qkv), case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda case: bits_of(lambda *qkv: operation(qkv), case), cases * 5))
    for i, got in enumerate(together):
        for a, b in zip(alone[i % 4], got, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_attention_gram(backend, interpreted, threads, sizes):
    batch, heads, tokens, width = sizes
    if interpreted:
        batch, heads, tokens = 2, 3, min(tokens, 33)
    q, k, q2, k2 = torch.randn(4, batch, heads, tokens, width)
    assert_same_bits(
        lambda *t: vd.attention_cosine(*t, backend=backend), [q, k, q2, k2], 1 if interpreted else 4
    )


@pytest.mark.parametrize("penalty", ["signed", "abs", "square", "relu"])
@pytest.mark.parametrize("shape", [(1, 197, 48), (5, 65, 80), (3, 400, 16)], ids=str)
def test_pairwise_cosine(backend, interpreted, threads, shape, penalty):
    batch, rows, width = shape
    if interpreted:
        rows = min(rows, 65)
    x, y = torch.randn(2, batch, rows, width)
    options = dict(penalty=penalty, backend=backend)
    times = 1 if interpreted else 4
    assert_same_bits(lambda x: vd.pairwise_cosine(x, **options), [x], times)
    assert_same_bits(lambda x, y: vd.pairwise_cosine(x, y, **options), [x, y], times)
