"""What the operators are to torch: schemas, derivatives, checkpoints, operations counted."""

import subprocess

import pytest
import torch
from calls import CLOSED_FORMS, OPERATIONS, N, arguments
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import vitdiv_kernels as vd
from vitdiv_kernels import _native
from vitdiv_kernels.ops import _operators


def schema(namespace, name):
    return str(getattr(getattr(torch.ops, namespace), name).default._schema).partition(f"{namespace}::")[2]


@pytest.mark.usefixtures("library")
def test_the_library_defines_what_python_declares():
    for name, (operator, table) in _operators.DECLARED.items():
        declared = torch._C.parse_schema(f"x::{name}{operator.schema}")
        assert schema("vitdiv", name) == str(declared).partition("x::")[2]
        if "triton" in table:
            assert schema("vitdiv_triton", name) == schema("vitdiv", name)


@pytest.mark.usefixtures("library")
def test_the_library_needs_no_python():
    command = ["nm", "--dynamic", "--undefined-only", _native.OPERATORS]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert any("c10" in symbol for symbol in symbols)
    assert not [symbol for symbol in symbols if symbol.startswith(("Py", "_Py"))]


@pytest.fixture
def tokens(interpreted):
    return 3 if interpreted else N


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_second_derivative_raises(backend, tokens, name, checkpointed):
    """And the first one is right with create_graph, under checkpointing too."""
    if backend == "reference":
        pytest.skip("the reference is differentiable twice")
    x, matrices = arguments(tokens=tokens)
    operation = OPERATIONS[name]

    def call(x, matrices):
        return operation(x, matrices, backend)

    loss = checkpoint(call, x, matrices, use_reentrant=False) if checkpointed else call(x, matrices)
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    (expected,) = torch.autograd.grad(call(x, matrices), x)
    torch.testing.assert_close(dx, expected)
    if name == "nearest":
        return  # plain torch beside an index
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(dx.sum(), x)


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_selective_checkpointing(backend, tokens, norm):
    """The attention is kept, all else made again."""
    if backend == "reference":
        pytest.skip("the reference has no operators")
    module = vd.nn.ReAttention(32, 4, norm=norm, backend=backend)
    x = torch.randn(3, tokens, 32, requires_grad=True)
    kept = [_operators.DECLARED["reattention_fwd"][1][backend].op]
    gradients = []
    for checkpointed in (True, False):
        if checkpointed:
            out = checkpoint(
                module, x, use_reentrant=False,
                context_fn=lambda: create_selective_checkpoint_contexts(kept),
            )  # fmt: skip
        else:
            out = module(x)
        gradients.append(
            torch.autograd.grad(out.square().sum(), [x, *module.parameters()], allow_unused=True)
        )
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in CLOSED_FORMS])
def test_the_forward_counts_as_the_plain_formula(backend, tokens, name):
    if backend == "reference":
        pytest.skip("it is what the others are compared with")
    x, matrices = arguments(tokens=max(tokens, 9))  # or the H x H products count
    with torch.no_grad():
        counted = [flops(lambda b=b: OPERATIONS[name](x, matrices, b)) for b in (backend, "reference")]
    assert counted[0] == pytest.approx(counted[1], rel=0.02), "H x H products may differ"
    assert counted[0] > 0


def test_the_backward_counts_its_products():
    """Re-attention: logits again, dY, dV, dQ, dK; the maps mixed again, dY mixed back, and dmix."""
    batch, heads, n, width = 2, 4, 17, 16
    q, k, v = torch.randn(3, batch, heads, n, width, requires_grad=True).unbind()
    mix = torch.randn(heads, heads, requires_grad=True)
    product, mixing = 2 * batch * heads * n * n * width, 2 * batch * heads * heads * n * n
    assert flops(vd.reattention(q, k, v, mix).sum().backward) == 5 * product + 3 * mixing
    constants = (x.detach() for x in (q, k, v))
    assert flops(vd.reattention(*constants, mix).sum().backward) == 2 * product + mixing
    gram = vd.attention_gram(q, k).sum()
    assert flops(gram.backward) == 3 * product + mixing


def test_inductors_memory_budget_sees_the_operators():
    """An operator that counts nothing would be the first one made again."""
    assert all(
        getattr(torch.ops.vitdiv, name) in torch.utils.flop_counter.flop_registry
        for name in _operators.DECLARED
    )
