"""attention_gram, attention_cosine and attention_diversity, on every backend."""

import functools

import formulas
import operation_checks as checks
import pytest
import torch
from comparing import assert_within_budget, gradients, largest_error
from hypothesis import given, settings
from hypothesis import strategies as st

from vitdiv_kernels import _dispatch, attention_cosine, attention_diversity, attention_gram

# B, H, N, M, d
SHAPES = [
    (1, 1, 1, 1, 16),
    (2, 3, 2, 2, 33),
    (1, 6, 3, 3, 128),
    (3, 1, 17, 17, 80),
    (2, 12, 17, 65, 32),
    (1, 3, 65, 1, 64),
    (2, 16, 65, 65, 35),
    (1, 24, 17, 3, 16),
    (1, 12, 197, 197, 64),
    (2, 6, 197, 17, 33),
    (1, 3, 2, 197, 35),
    (5, 3, 17, 17, 64),
]


@pytest.fixture(params=SHAPES, ids=str)
def shape(request, interpreted, emulated):
    """Shorter rows where kernels run slowly; those of tests/triton and tests/cuda are longer."""
    batch, heads, *tokens, width = request.param
    return batch, heads, *(min(n, 65) if interpreted or emulated else n for n in tokens), width


def draw(shape, dtype=torch.float64, layers=1):
    """q and k of each layer, with logits of spread about 1.5."""
    batch, heads, queries, keys, width = shape
    tensors = []
    for _ in range(layers):
        tensors += [torch.randn(batch, heads, n, width, dtype=torch.float64) for n in (queries, keys)]
    return [(1.2 * t).to(dtype) for t in tensors]


def check(backend, operation, formula, tensors, dtype=torch.float64, formula_options=None, **options):
    """Value and every gradient against the plain formula in float64."""
    names = ["q", "k", "q2", "k2"][: len(tensors)]
    inputs = {name: t.detach().requires_grad_() for name, t in zip(names, tensors, strict=True)}
    formula_options = options if formula_options is None else formula_options

    def value_and_gradients(compute, kind):
        cast = {name: t.detach().to(kind).requires_grad_() if kind else t for name, t in inputs.items()}
        value = compute(*cast.values())
        generator = torch.Generator(value.device).manual_seed(1)
        cotangent = torch.randn(value.shape, generator=generator, device=value.device, dtype=torch.float64)
        return {"value": value.detach(), **gradients(value, cotangent.to(value.dtype), cast)}

    truth = value_and_gradients(lambda *t: formula(*t, **formula_options), torch.float64)
    plain = value_and_gradients(lambda *t: formula(*t, **formula_options), None)
    got = value_and_gradients(lambda *t: operation(*t, backend=backend, **options), None)
    for name, expected in truth.items():
        if expected.abs().max() < 1e-12:  # one key: every map is 1
            assert got[name].abs().max() < 1e-5
        else:
            assert_within_budget(got[name], plain[name], expected, dtype, name)
    assert got["value"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


# For test_plain_formulas.py: formulas, and their inputs.
FORMULAS = {
    "gram": (formulas.attention_gram, lambda: formulas.heads("q", "k")),
    "cosine": (formulas.attention_cosine, lambda: formulas.heads("q", "k")),
}


def check_instructions(dtype):
    """For test_capabilities.py: the kernels on odd sizes, so that vectors, register blocks and tiles have
    remainders, and on a width that is no multiple of eight."""
    one, two = (draw((2, 7, 33, 19, 20), dtype, layers) for layers in (1, 2))
    check("native", attention_gram, formulas.attention_gram, one, dtype)
    check("native", attention_cosine, formulas.attention_cosine, two, dtype)


@pytest.mark.usefixtures("threads_in_turn")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("centered", [False, True])
def test_gram(backend, shape, centered, dtype):
    check(backend, attention_gram, formulas.attention_gram, draw(shape, dtype), dtype, centered=centered)


@pytest.mark.usefixtures("threads_in_turn")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_cosine_between_heads(backend, shape, dtype):
    check(backend, attention_cosine, formulas.attention_cosine, draw(shape, dtype), dtype)


@pytest.mark.usefixtures("threads_in_turn")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_cosine_between_layers(backend, shape, dtype):
    if backend == "triton" and 2 * shape[1] > _dispatch.TRITON_HEADS:
        pytest.skip("more heads than the Triton kernels take, which test_bad_input checks")
    check(backend, attention_cosine, formulas.attention_cosine, draw(shape, dtype, layers=2), dtype)


def test_cosine_between_unlike_layers(backend):
    """The layers may differ in heads and head width; the maps have one size."""
    tensors = draw((2, 3, 17, 19, 24)) + draw((2, 5, 17, 19, 40))
    check(backend, attention_cosine, formulas.attention_cosine, tensors)
    assert attention_cosine(*tensors, backend=backend).shape == (2, 3, 5)
    check(backend, attention_cosine, formulas.attention_cosine, tensors, scale=0.3)


@pytest.mark.parametrize("penalty", ["signed", "abs", "square", "relu"])
@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_diversity(backend, penalty, include_self, reduction):
    options = dict(penalty=penalty, include_self=include_self, reduction=reduction)
    check(backend, attention_diversity, formulas.attention_diversity, draw((3, 6, 17, 13, 16)), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operation", ["gram", "cosine", "diversity"])
def test_low_precision(backend, operation, dtype):
    functions = {
        "gram": (attention_gram, formulas.attention_gram),
        "cosine": (attention_cosine, formulas.attention_cosine),
        "diversity": (attention_diversity, formulas.attention_diversity),
    }
    check(backend, *functions[operation], draw((2, 6, 65, 65, 32), dtype), dtype)


@pytest.mark.parametrize("threads", [2], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_whole_images_beside_a_part_of_one(backend, threads, dtype):
    """Three images on two threads: two are done whole, the rows of the third are shared."""
    check(backend, attention_gram, formulas.attention_gram, draw((3, 4, 77, 65, 20), dtype), dtype)
    tensors = draw((3, 4, 77, 65, 20), dtype, layers=2)
    check(backend, attention_cosine, formulas.attention_cosine, tensors, dtype)


@pytest.mark.parametrize("shape", [(1, 3, 3, 2, 2), (2, 1, 2, 3, 2)], ids=str)
def test_gradcheck(backend, interpreted, shape):
    check_gradients = functools.partial(torch.autograd.gradcheck, fast_mode=interpreted)
    q, k, q2, k2 = (t.requires_grad_() for t in draw(shape, layers=2))
    check_gradients(lambda q, k: attention_gram(q, k, backend=backend), (q, k))
    check_gradients(lambda q, k: attention_gram(q, k, centered=True, backend=backend), (q, k))
    check_gradients(lambda q, k: attention_diversity(q, k, backend=backend), (q, k))
    check_gradients(lambda *t: attention_cosine(*t, backend=backend), (q, k, q2, k2))


def test_the_gram_of_nearly_uniform_attention_keeps_its_digits(backend):
    """Logits of 1e-4: the plain float32 sum N/M + G~ has lost G~, which is 1e-8 of it."""
    q, k = (1e-2 * t for t in draw((2, 4, 50, 60, 32), torch.float32))
    truth = formulas.attention_gram(q.double(), k.double(), centered=True)
    got = attention_gram(q, k, centered=True, backend=backend)
    assert largest_error(got, truth) < 5e-3 * truth.abs().max().item()


def test_the_gradient_of_nearly_uniform_attention_keeps_its_digits(backend):
    q, k = (1e-2 * t for t in draw((2, 4, 50, 60, 32), torch.float32))
    exact = [t.double().requires_grad_() for t in (q, k)]
    formulas.attention_diversity(*exact).backward()
    leaves = [t.clone().requires_grad_() for t in (q, k)]
    attention_diversity(*leaves, backend=backend).backward()
    for leaf, truth in zip(leaves, exact, strict=True):
        assert largest_error(leaf.grad, truth.grad) < 1e-2 * truth.grad.abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_extreme_logits(backend, dtype):
    """Logits of 1e4 in both directions: one-hot maps, no overflow."""
    q, k = draw((2, 3, 17, 19, 16), dtype)
    q = q * 1e4
    truth = formulas.attention_gram(q.double(), k.double())
    got = attention_gram(q, k, backend=backend)
    assert got.isfinite().all()
    # A rounding of the logits is 1e-3 in float32, and moves a map where two keys tie.
    tolerance = 1e-2 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(got.double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_propagate(backend, poison):
    q, k = draw((2, 3, 9, 9, 16), torch.float32)
    q[0, 1, 4, 5] = poison
    expected = formulas.attention_gram(q, k)
    got = attention_gram(q, k, backend=backend)
    assert torch.equal(got.isnan(), expected.isnan())
    leaf = q.clone().requires_grad_()
    attention_gram(leaf, k, backend=backend).sum().backward()
    assert leaf.grad[0, 1].isnan().any()
    assert leaf.grad[1].isfinite().all()


def test_empty_batch(backend):
    q, k = (t.requires_grad_() for t in draw((0, 3, 5, 5, 8), torch.float32))
    assert attention_gram(q, k, backend=backend).shape == (0, 3, 3)
    assert attention_cosine(q, k, q, k, backend=backend).shape == (0, 3, 3)
    assert attention_diversity(q, k, backend=backend).isnan()
    total = attention_diversity(q, k, reduction="sum", backend=backend)
    assert total.item() == 0
    total.backward()
    assert q.grad.shape == q.shape


def packed(q, k):
    """Views into a packed projection [B, N, 3, H, d]."""
    qkv = torch.stack([q, k, k], 0).permute(1, 3, 0, 2, 4).contiguous()
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)[:2]


LAYOUTS = {
    "packed qkv": packed,
    "sliced tokens": lambda q, k: [torch.cat([t * float("nan"), t, t], 2)[:, :, 17:34] for t in (q, k)],
    "sliced heads": lambda q, k: [torch.cat([t, t * float("nan")], 1)[:, : t.shape[1]] for t in (q, k)],
    "batch inside": lambda q, k: [t.transpose(0, 2).contiguous().transpose(0, 2) for t in (q, k)],
    "last stride 2": lambda q, k: [t.repeat_interleave(2, 3)[..., ::2] for t in (q, k)],
    "transposed": lambda q, k: [t.mT.contiguous().mT for t in (q, k)],
    "expanded": lambda q, k: [t[:1].expand_as(t) for t in (q, k)],
    "k transposed only": lambda q, k: [q, k.mT.contiguous().mT],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    q, k = LAYOUTS[layout](*draw((3, 4, 17, 17, 20)))
    check(backend, attention_gram, formulas.attention_gram, (q, k))


def test_items_more_than_2_to_31_elements_apart(backend, far_apart):
    near = dict(zip("qk", draw((2, 3, 5, 7, 16), torch.float16), strict=True))
    checks.assert_far_apart(functools.partial(attention_gram, backend=backend), near, far_apart)


@pytest.mark.parametrize("wanted", ["q", "k", "q2", "k2"])
def test_only_the_gradients_asked_for(backend, wanted):
    inputs = dict(zip(("q", "k", "q2", "k2"), draw((2, 3, 9, 11, 16), layers=2), strict=True))
    checks.assert_only_one_gradient(
        lambda **t: attention_cosine(**t, backend=backend).square().sum(), inputs, wanted
    )


def test_backward_twice_and_inputs_untouched(backend):
    q, k = (t.requires_grad_() for t in draw((2, 3, 33, 33, 16), torch.float32))
    checks.assert_backward_twice(
        lambda q, k: attention_diversity(q, k, penalty="square", backend=backend), q, k
    )


def test_autocast_casts_like_scaled_dot_product_attention(backend):
    q, k = draw((2, 3, 17, 17, 16), torch.float32)
    expected = attention_gram(q.bfloat16(), k.bfloat16(), backend=backend)
    exact = attention_gram(q.double(), k.double(), backend=backend)
    with torch.autocast(q.device.type, dtype=torch.bfloat16):
        assert torch.equal(attention_gram(q, k, backend=backend), expected)
        assert torch.equal(attention_gram(q.bfloat16(), k, backend=backend), expected)
        assert torch.equal(attention_gram(q.double(), k.double(), backend=backend), exact)


def test_any_shape_and_layout(backend, interpreted):
    @settings(max_examples=8 if interpreted else 30, deadline=None, derandomize=True, database=None)
    @given(data=st.data())
    def holds(data):
        sizes = [
            st.integers(1, 3),
            st.integers(1, 7),
            st.integers(1, 40),
            st.integers(2, 40),
            st.integers(1, 70),
        ]
        shape = [data.draw(s, name) for s, name in zip(sizes, ("B", "H", "N", "M", "d"), strict=True)]
        torch.manual_seed(data.draw(st.integers(0, 10**6), "seed"))
        order = data.draw(st.permutations(range(4)), "order of the axes in memory")
        back = [order.index(axis) for axis in range(4)]
        q, k = (t.permute(order).contiguous().permute(back) for t in draw(shape))
        centered = data.draw(st.booleans(), "centered")
        scale = data.draw(st.none() | st.floats(0.01, 2), "scale, in units of the usual")
        scale = scale and scale * shape[-1] ** -0.5  # larger ones saturate: gradients are then rounding
        check(backend, attention_gram, formulas.attention_gram, (q, k), centered=centered, scale=scale)

    holds()


def test_gradient_of_a_transposed_gram(backend):
    q, k = torch.randn(2, 2, 3, 9, 8).unbind()
    w = torch.randn(2, 3, 3)

    def gradients(order):
        leaves = [x.clone().requires_grad_() for x in (q, k)]
        gram = attention_gram(*leaves, backend=backend)
        weight = w if order == "as it is" else w.mT
        ((gram if order == "as it is" else gram.mT) * weight).sum().backward()
        return [x.grad for x in leaves]

    for one, other in zip(gradients("as it is"), gradients("transposed"), strict=True):
        torch.testing.assert_close(one, other)


def test_second_derivative_raises(backend):
    if backend == "reference":
        pytest.skip("the reference is differentiable as often as one likes")
    q, k = torch.randn(2, 2, 3, 9, 8).requires_grad_().unbind()
    loss = attention_diversity(q, k, backend=backend)
    (gradient,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.square().sum().backward()
