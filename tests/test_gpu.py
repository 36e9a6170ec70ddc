"""What only a GPU shows: no call waits for the device, and a CUDA graph can capture every operation."""

import os

import pytest
import torch
from test_compile import OPERATIONS, arguments

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled for a GPU"),
]


def step(name, x, matrices):
    loss = OPERATIONS[name](x, matrices, "triton")
    return [loss, *torch.autograd.grad(loss, [x, matrices], allow_unused=True)]


@pytest.fixture(params=OPERATIONS)
def name(request):
    return request.param


@pytest.fixture
def inputs():
    with torch.device("cuda"):
        return arguments()


def test_nothing_waits_for_the_device(name, inputs):
    step(name, *inputs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(name, *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph(name, inputs):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(name, *inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(name, *inputs)
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.randn_like(x))
    graph.replay()
    for got, expected in zip(results, step(name, *inputs), strict=True):
        assert (got is None and expected is None) or torch.equal(got, expected)
