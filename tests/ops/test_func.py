"""torch.func transforms the operations: gradients of functions, vmap, gradients of each sample, ensembles."""

import copy

import pytest
import torch
import torch._dynamo.compiled_autograd
from calls import LOSSES, OPERATIONS, D, H, N
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    functionalize,
    grad,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vmap,
)
from torch.fx.experimental.proxy_tensor import make_fx

import vitdiv_kernels as vd
from vitdiv_kernels import _vectors as _range


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("views", [True, False])
def test_powers_of_two_under_vmap(dtype, views, monkeypatch):
    """Also where vmap takes no view(dtype): before torch 2.13."""
    if not views:
        monkeypatch.setattr(_range, "_VIEWS_IN_VMAP", False)
    elif not _range._VIEWS_IN_VMAP:
        pytest.skip("vmap of this torch takes no view(dtype)")
    least = torch.finfo(dtype).tiny
    sizes = torch.tensor([[1.0, 5.9, 4.0], [0.7, least, torch.inf]], dtype=dtype)
    powers = torch.tensor([[1.0, 4.0, 4.0], [0.5, least, 1.0]], dtype=dtype)
    assert torch.equal(_range.power_of_two(sizes), powers)
    assert torch.equal(vmap(_range.power_of_two)(sizes), powers)


BATCHES = {
    "x": (0, None),
    "x, last axis": (3, None),
    "matrices": (None, 0),
    "both": (1, 2),
}


@pytest.fixture
def tokens(interpreted):
    return 3 if interpreted else N


@pytest.fixture
def size(interpreted):
    """Of the axis that vmap takes."""
    return 2 if interpreted else 3


def inputs(dims, tokens, size=3):
    """x and matrices with a batch axis where dims says so."""
    shapes = (2, tokens, 3 * H * D), (2, H, H)
    return [
        torch.randn(shape if dim is None else (size, *shape), dtype=torch.float64).movedim(0, dim or 0)
        for shape, dim in zip(shapes, dims, strict=True)
    ]


def one_by_one(function, dims, size, x, matrices):
    def item(t, dim, i):
        return t if dim is None else t.select(dim, i)

    calls = [function(item(x, dims[0], i), item(matrices, dims[1], i)) for i in range(size)]
    if isinstance(calls[0], torch.Tensor):
        return torch.stack(calls)
    return tuple(map(torch.stack, zip(*calls, strict=True)))


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dims", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_vmap_of_values_and_gradients(backend, tokens, size, name, dims):
    if dims[0] is None and name not in (
        "reattention",
        "reattention batch",
        "reattention layer",
        "talking heads",
    ):
        pytest.skip("the operation takes no matrices")

    def call(x, matrices):
        return OPERATIONS[name](x, matrices, backend)

    both = inputs(dims, tokens, size)
    assert_close(vmap(call, dims)(*both), one_by_one(call, dims, size, *both))
    gradients = vmap(grad(call, argnums=(0, 1)), dims)(*both)

    def by_autograd(x, matrices):
        x, matrices = x.detach().requires_grad_(), matrices.detach().requires_grad_()
        return torch.autograd.grad(
            call(x, matrices), (x, matrices), allow_unused=True, materialize_grads=True
        )

    for got, expected in zip(gradients, one_by_one(by_autograd, dims, size, *both), strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize(
    "name", ["cosine abs", "logsumexp of two sets", "two grams", "gram", "reattention batch"]
)
def test_grad_of_vmap_and_nested(backend, tokens, name):
    def call(x, matrices):
        return OPERATIONS[name](x, matrices, backend)

    x, matrices = inputs((0, None), tokens, size=2)
    found = grad(lambda x: vmap(call, (0, None))(x, matrices).sum())(x)
    expected = torch.stack([grad(call)(item, matrices) for item in x])
    assert_close(found, expected)
    twice = torch.stack([x, 2 * x])  # two levels
    assert_close(
        vmap(vmap(grad(call), (0, None)), (0, None))(twice, matrices),
        torch.stack([torch.stack([grad(call)(item, matrices) for item in row]) for row in twice]),
    )


def test_cotangents_one_by_one(backend):
    """jacrev batches what flows back, and not what went in."""
    x = torch.randn(3, 5, 8)
    found = jacrev(lambda x: vd.pairwise_cosine(x, reduction="none", backend=backend))(x)
    expected = jacrev(lambda x: vd.pairwise_cosine(x, reduction="none", backend="reference"))(x)
    assert_close(found, expected)
    q, k = torch.randn(2, 1, 2, 5, 8).unbind()
    found = jacrev(lambda q: vd.attention_gram(q, k, backend=backend))(q)
    assert_close(found, jacrev(lambda q: vd.attention_gram(q, k, backend="reference"))(q))


def test_gradients_of_each_sample_and_ensembles(backend, tokens, size):
    models = [vd.nn.ReAttention(24, 3, norm="layer", backend=backend) for _ in range(size)]
    parameters, _ = stack_module_state(models)
    bare, x = copy.deepcopy(models[0]).to("meta"), torch.randn(size, 2, tokens, 24)

    def loss(parameters, x):
        return functional_call(bare, parameters, (x,)).square().sum()

    ensemble = vmap(grad(loss))(parameters, x)
    for i, model in enumerate(models):
        model(x[i]).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(ensemble[name][i], parameter.grad, rtol=1e-4, atol=1e-4)
    own = dict(models[0].named_parameters())
    samples = vmap(grad(loss), (None, 0))(own, x)
    for i in range(size):
        expected = torch.autograd.grad(models[0](x[i]).square().sum(), own.values())
        for name, gradient in zip(own, expected, strict=True):
            torch.testing.assert_close(samples[name][i], gradient, rtol=1e-4, atol=1e-4)


def test_compiled():
    torch.compiler.reset()
    x = torch.randn(3, 2, 7, 8)
    transformed = vmap(grad(vd.pairwise_cosine))
    assert_close(torch.compile(transformed, fullgraph=True, backend="aot_eager")(x), transformed(x))


@pytest.mark.parametrize("name", OPERATIONS)
def test_forward_mode_raises(name):
    """It would be 0."""

    def call(x):
        return OPERATIONS[name](x, torch.ones(2, H, H, dtype=x.dtype), "native")

    x, _ = inputs((None, None), 5)
    with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        jvp(call, (x,), (torch.ones_like(x),))
    with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        jacfwd(grad(call))(x[:1, :2])
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        call(forward_ad.make_dual(x, torch.ones_like(x)))


def test_a_second_derivative_raises():
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad(lambda x: grad(vd.pairwise_cosine)(x).sum())(torch.randn(2, 5, 8))
    x = torch.randn(2, 5, 8)
    found = grad(lambda x: grad(lambda t: vd.pairwise_cosine(t, backend="reference"))(x).square().sum())(x)
    assert found.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    x = torch.randn(3, 2, 6, 8)
    found = vmap(grad(LOSSES[name]))(x)
    for i, item in enumerate(x):
        leaf = item.clone().requires_grad_()
        LOSSES[name](leaf).backward()
        assert_close(found[i], leaf.grad)


@pytest.mark.parametrize("name", ["cosine abs", "two grams", "gram", "reattention batch", "talking heads"])
def test_functionalize_and_compiled_autograd(name, pytestconfig):
    x, matrices = inputs((None, None), 7)

    def call(x, matrices):
        return OPERATIONS[name](x, matrices, "native")

    expected = grad(call)(x, matrices)
    traced = make_fx(functionalize(grad(call)))(x, matrices)
    assert_close(traced(x, matrices), expected)
    if name not in ("cosine abs", "reattention batch") and not pytestconfig.getoption("--every-case"):
        return  # one operator and one that calls several: compiled autograd takes each operator alike
    torch.compiler.reset()
    leaf = x.clone().requires_grad_()
    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        call(leaf, matrices).backward()
    assert_close(leaf.grad, expected)
