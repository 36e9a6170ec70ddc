"""torch.compile(fullgraph=True) passes through every operation, with the gradients of eager; the operators'
schemas and fake kernels agree with what they do."""

import pytest
import torch
import torch._dynamo.testing
from torch.utils._python_dispatch import TorchDispatchMode

import vitdiv_kernels as vd
from vitdiv_kernels.ops.pairwise_rows import pairwise_logsumexp, pairwise_nearest
from vitdiv_kernels.ops.two_gram import two_gram

B, H, N, D = 2, 4, 17, 16


def qkv_views(x):
    return x.reshape(x.shape[0], x.shape[1], 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)


def reattention_with(norm, pre=False, training=True):
    def operation(x, matrices, backend):
        q, k, v = qkv_views(x)
        out, gram = vd.reattention(
            q, k, v, matrices[0], mix_bias=matrices[1, 0], pre_mix=matrices[1] if pre else None, norm=norm,
            training=training, return_gram=True, backend=backend,
        )  # fmt: skip
        return out.square().sum() + gram.square().sum()

    return operation


def distance_to_nearest(x, _, backend):
    return (x - x.take_along_dim(pairwise_nearest(x, backend=backend).unsqueeze(-1), -2)).square().mean()


OPERATIONS = {
    "cosine abs": lambda x, _, backend: vd.pairwise_cosine(x, backend=backend),
    "cosine signed": lambda x, _, backend: vd.pairwise_cosine(x, penalty="signed", backend=backend),
    "cosine square": lambda x, _, backend: vd.pairwise_cosine(x, penalty="square", backend=backend),
    "cosine of two sets": lambda x, _, backend: vd.pairwise_cosine(x[:, 1:], x[:, :9] * 2, backend=backend),
    "logsumexp": lambda x, _, backend: pairwise_logsumexp(x, scale=3.0, backend=backend).square().mean(),
    "logsumexp of two sets": lambda x, _, backend: pairwise_logsumexp(
        x[:, 1:], x[:, :9] * 2, scale=3.0, backend=backend
    ).mean(),
    "nearest": distance_to_nearest,
    "two grams": lambda x, _, backend: two_gram(
        x, 2 * x[..., 3:], penalty="hinge", margin=0.1, backend=backend
    ),
    "two grams, identity": lambda x, _, backend: (
        two_gram(x, normalise=False, reduction="none", backend=backend).square().sum()
    ),
    "two grams, the first's gradient": lambda x, _, backend: two_gram(
        x, x.detach()[..., 5:], backend=backend
    ),
    "two grams, the second's gradient": lambda x, _, backend: two_gram(
        x.detach()[..., 5:], x, backend=backend
    ),
    "gram": lambda x, _, backend: vd.attention_gram(*qkv_views(x)[:2], backend=backend).square().sum(),
    "diversity": lambda x, _, backend: vd.attention_diversity(*qkv_views(x)[:2], backend=backend),
    "two layers": lambda x, _, backend: (
        vd.attention_cosine(*qkv_views(x)[:2], *qkv_views(x)[1:], backend=backend).square().sum()
    ),
    "reattention": reattention_with("none"),
    "reattention batch": reattention_with("batch"),
    "reattention layer": reattention_with("layer"),
    "talking heads": reattention_with("none", pre=True),
}


def arguments(batch=B, tokens=N):
    x = torch.randn(batch, tokens, 3 * H * D, requires_grad=True)
    return x, torch.randn(2, H, H, requires_grad=True)


def assert_like_eager(compiled, operation, x, matrices, backend):
    for compute in (compiled, operation):
        x.grad = matrices.grad = None
        loss = compute(x, matrices, backend)
        loss.backward()
        found = loss.detach(), x.grad, matrices.grad
        if compute is compiled:
            first = found
    for got, expected in zip(first, found, strict=True):
        if expected is None:
            assert got is None
        else:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.fixture
def tokens(interpreted):
    return 5 if interpreted else N


@pytest.mark.parametrize("name", OPERATIONS)
def test_fullgraph(backend, tokens, name):
    """One graph, forward and backward, without generating code."""
    torch.compiler.reset()
    compiled = torch.compile(OPERATIONS[name], fullgraph=True, backend="aot_eager")
    assert_like_eager(compiled, OPERATIONS[name], *arguments(tokens=tokens), backend)


@pytest.mark.parametrize("name", ["cosine abs", "two layers", "reattention batch"])
def test_inductor(backend, tokens, name):
    torch.compiler.reset()
    compiled = torch.compile(OPERATIONS[name], fullgraph=True)
    assert_like_eager(compiled, OPERATIONS[name], *arguments(tokens=tokens), backend)


@pytest.mark.parametrize("name", ["cosine abs", "gram", "reattention batch", "talking heads"])
def test_dynamic_shapes(backend, interpreted, name):
    """Other batch and token counts run through the same graph."""
    first, *others = [(3, 5), (2, 7)] if interpreted else [(3, 41), (5, 45), (7, 53)]
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(OPERATIONS[name], fullgraph=True, dynamic=True, backend=counter)
    assert_like_eager(compiled, OPERATIONS[name], *arguments(*first), backend)
    graphs = counter.frame_count
    for batch, tokens in others:
        assert_like_eager(compiled, OPERATIONS[name], *arguments(batch, tokens), backend)
    assert counter.frame_count == graphs


def test_under_autocast_and_use_backend():
    torch.compiler.reset()
    operation = OPERATIONS["reattention batch"]
    compiled = torch.compile(operation, fullgraph=True, backend="aot_eager")
    x, matrices = arguments()
    with vd.use_backend("reference"):
        torch.testing.assert_close(compiled(x, matrices, "auto"), operation(x, matrices, "reference"))
    torch.testing.assert_close(compiled(x, matrices, "auto"), operation(x, matrices, "auto"))
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(x, matrices, "auto"), operation(x, matrices, "auto"))


def test_module_with_running_statistics(backend):
    torch.compiler.reset()
    modules = [vd.nn.ReAttention(32, 4, backend=backend) for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    compiled = torch.compile(modules[0], fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(2, 9, 32)
        torch.testing.assert_close(compiled(x), modules[1](x))
    for (name, got), expected in zip(
        modules[0].state_dict().items(), modules[1].state_dict().values(), strict=True
    ):
        torch.testing.assert_close(got, expected, msg=name)


class Recorder(TorchDispatchMode):
    """The calls of our operators, with copies of their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace in ("vitdiv", "vitdiv_triton"):
            copies = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), args)
            self.calls.setdefault(operator, []).append((copies, dict(kwargs or {})))
        return operator(*args, **(kwargs or {}))


def test_operators_pass_opcheck(backend, interpreted, tokens):
    if backend == "reference":
        pytest.skip("the reference has no operators")
    recorder = Recorder()
    with recorder:
        for operation in OPERATIONS.values():
            operation(*arguments(tokens=tokens), backend).backward()
    names = {operator.name() for operator in recorder.calls}
    assert len(names) >= 15, f"each operation has a forward and a backward operator, found {sorted(names)}"
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for operator, calls in recorder.calls.items():
        for args, kwargs in calls[: 1 if interpreted else 4]:
            torch.library.opcheck(operator, args, kwargs, test_utils=checks)
