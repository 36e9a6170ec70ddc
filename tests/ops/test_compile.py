"""torch.compile(fullgraph=True) passes through every operation, with the gradients of eager; the operators'
schemas and fake kernels agree with what they do."""

import pytest
import torch
import torch._dynamo.testing
from calls import OPERATIONS, N, arguments
from torch.utils._python_dispatch import TorchDispatchMode

import vitdiv_kernels as vd


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


# Of the plain formulas, which are torch's own code: one in which a choice of ours is compiled, of each kind.
PLAIN = ("cosine signed", "nearest", "two grams", "two layers", "reattention batch")


@pytest.mark.parametrize("name", OPERATIONS)
def test_fullgraph(backend, tokens, name, pytestconfig):
    """One graph, forward and backward, without generating code."""
    if backend == "reference" and name not in PLAIN and not pytestconfig.getoption("--every-case"):
        pytest.skip("a plain formula: one of each operation is compiled")
    torch.compiler.reset()
    compiled = torch.compile(OPERATIONS[name], fullgraph=True, backend="aot_eager")
    assert_like_eager(compiled, OPERATIONS[name], *arguments(tokens=tokens), backend)


@pytest.mark.parametrize("name", ["cosine abs", "two layers", "reattention batch"])
def test_inductor(backend, interpreted, tokens, name, pytestconfig):
    if backend == "reference" and not pytestconfig.getoption("--every-case"):
        pytest.skip("the code of plain formulas is torch's own")
    if name != "reattention batch" and (backend == "reference" or interpreted):
        pytest.skip("the code around operators is that of native, the code of plain formulas torch's own")
    torch.compiler.reset()
    compiled = torch.compile(OPERATIONS[name], fullgraph=True)
    assert_like_eager(compiled, OPERATIONS[name], *arguments(tokens=tokens), backend)


@pytest.mark.parametrize("name", ["cosine abs", "gram", "reattention batch", "talking heads"])
def test_dynamic_shapes(backend, interpreted, name, pytestconfig):
    """Other batch and token counts run through the same graph."""
    if backend == "reference" and name not in PLAIN and not pytestconfig.getoption("--every-case"):
        pytest.skip("a plain formula: one of each operation is compiled")
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
