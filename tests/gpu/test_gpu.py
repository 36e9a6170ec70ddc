"""What only a GPU shows: no call waits for the device, and a CUDA graph can capture every operation."""

import os

import pytest
import torch
from calls import OPERATION_OF, OPERATIONS, arguments

import vitdiv_kernels
from vitdiv_kernels import _dispatch

# In the backward of take_along_dim torch adds in any order, outside of deterministic mode.
ADDS_IN_ANY_ORDER = ("nearest",)
BACKENDS = {"triton-gpu": "triton", "native-cuda": "native"}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Not in this file: in deterministic mode torch's own operations may wait for the device, and fill what
    they allocate."""


def test_outside_of_deterministic_mode():
    assert not torch.are_deterministic_algorithms_enabled()


def test_every_operation_is_called():
    assert set(OPERATION_OF.values()) == set(_dispatch.OPERATIONS)


def step(name, backend, x, matrices):
    loss = OPERATIONS[name](x, matrices, backend)
    return [loss, *torch.autograd.grad(loss, [x, matrices], allow_unused=True)]


@pytest.fixture(params=OPERATIONS)
def name(request):
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request, name):
    if request.param == "triton-gpu" and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("nothing is compiled for a GPU")
    why_not = _dispatch.missing(BACKENDS[request.param], "cuda", operation=OPERATION_OF[name])
    if why_not is not None:
        pytest.skip(why_not)
    return BACKENDS[request.param]


@pytest.fixture
def inputs():
    with torch.device("cuda"):
        return arguments()


def test_nothing_waits_for_the_device(name, backend, inputs):
    step(name, backend, *inputs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(name, backend, *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["reattention batch"])
def test_nor_for_the_counts_of_other_processes(name, backend, monkeypatch):
    """Batch norm over a process group, whose reduction has nothing to add here."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: None)
    q, k, v = torch.randn(3, 2, 4, 9, 16, device="cuda").requires_grad_().unbind()
    mix = torch.eye(4, device="cuda").requires_grad_()

    def call():
        options = dict(norm="batch", training=True, process_group="any", backend=backend)
        vitdiv_kernels.reattention(q, k, v, mix, **options).sum().backward()

    call()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph(name, backend, inputs):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(name, backend, *inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(name, backend, *inputs)
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.randn_like(x))
    graph.replay()
    for got, expected in zip(results, step(name, backend, *inputs), strict=True):
        if got is None or expected is None:
            assert got is expected
        elif name in ADDS_IN_ANY_ORDER:
            torch.testing.assert_close(got, expected)
        else:
            assert torch.equal(got, expected)
