"""torch.export keeps the gradients of every operation, strict or not; programs can be saved, and run where
only the library of operators is loaded."""

import io
import subprocess
import sys

import pytest
import torch
from calls import LOSSES, OPERATIONS, D, H, N, arguments
from torch.distributed.pipelining import SplitPoint, pipeline

import vitdiv_kernels as vd
from vitdiv_kernels import _native
from vitdiv_kernels._exporting import exporting


class Scaled(torch.nn.Module):
    """An operation on x times a parameter."""

    def __init__(self, operation, backend):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 2, 3 * H * D))
        self.matrices = torch.nn.Parameter(torch.randn(2, H, H))
        self.operation, self.backend = operation, backend

    def forward(self, x):
        return self.operation(x * self.weight, self.matrices, self.backend)


class Tells(torch.nn.Module):
    def forward(self, x):
        return x + 1 if exporting() else x


def test_what_is_compiled_is_not_exported():
    """torch.compiler.is_exporting() is True for both before torch 2.13."""
    torch.compiler.reset()
    x, module = torch.zeros(2), Tells()
    assert torch.equal(module(x), x)
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x), x)
    for strict in (False, True):
        assert torch.equal(torch.export.export(module, (x,), strict=strict).module()(x), x + 1)
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x), x)


def results(module, x):
    module.zero_grad()
    loss = module(x)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return [
        loss.detach(),
        gradients["weight"],
        gradients.get("matrices"),
    ]  # strict export leaves out what is not used


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.fixture
def tokens(interpreted):
    return 3 if interpreted else N


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients(backend, tokens, name, strict, pytestconfig):
    every_other = (list(OPERATIONS).index(name) + strict) % 2
    if backend == "reference" and every_other and not pytestconfig.getoption("--every-case"):
        pytest.skip("a plain formula: exported the other way")
    x = arguments(tokens=tokens)[0].detach()
    module = Scaled(OPERATIONS[name], backend)
    program = torch.export.export(module, (x,), strict=strict)
    assert_same(results(program.module(), x), results(module, x))


@pytest.mark.parametrize("name", [name for name in OPERATIONS if "reattention" not in name])
def test_gradients_that_nobody_asked_for_when_it_was_exported(backend, tokens, name):
    """What the forward saves for them is then made in the backward."""
    x, matrices = arguments(tokens=tokens)

    class Plain(torch.nn.Module):
        def forward(self, x, matrices):
            return OPERATIONS[name](x, matrices, backend)

    with torch.no_grad():
        program = torch.export.export(Plain(), (x.detach(), matrices.detach()))
    found = []
    for function in (program.module(), Plain()):
        loss = function(x, matrices)
        found.append([loss.detach(), *torch.autograd.grad(loss, (x, matrices), allow_unused=True)])
    assert_same(*found)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, strict):
    """Their gradients by hand are not part of a program; the number of sets is free."""

    class Loss(torch.nn.Module):
        def forward(self, x):
            return LOSSES[name](x)

    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        Loss(), (torch.randn(3, 6, 8),), dynamic_shapes={"x": {0: batch}}, strict=strict
    )
    found, x = [], torch.randn(5, 6, 8)
    for function in (program.module(), Loss()):
        leaf = x.clone().requires_grad_()
        loss = function(leaf)
        found.append([loss.detach(), *torch.autograd.grad(loss, leaf)])
    assert_same(*found)


def test_a_training_program_is_saved_with_its_statistics(backend, tokens):
    x = torch.randn(2, tokens, 32)
    module = vd.nn.ReAttention(32, 4, backend=backend)
    program = torch.export.export(module, (x,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for _ in range(2):
        for m in (loaded, module):
            m.zero_grad()
            m(x).square().sum().backward()
    expected = dict(module.named_parameters())
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-4, msg=name)
    expected = dict(module.named_buffers())
    for name, buffer in loaded.named_buffers():
        torch.testing.assert_close(buffer, expected[name], msg=name)


def test_stages_of_a_pipeline(backend, tokens):
    """torch.distributed.pipelining cuts the exported program."""
    blocks = torch.nn.Sequential(*(vd.nn.ReAttention(32, 4, backend=backend) for _ in range(2)))
    x = torch.randn(2, tokens, 32)
    pipe = pipeline(blocks, mb_args=(x,), split_spec={"1": SplitPoint.BEGINNING})
    stages = [pipe.get_stage_module(i) for i in range(2)]
    out = stages[1](stages[0](x))
    out.square().mean().backward()
    expected = blocks(x)
    expected.square().mean().backward()
    torch.testing.assert_close(out, expected)
    gradients = {name: p.grad for stage in stages for name, p in stage.named_parameters()}
    for name, parameter in blocks.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.usefixtures("library")
def test_a_compiled_package_runs_with_the_library_alone(tmp_path):
    """AOTInductor; the process that runs the package does not import vitdiv_kernels."""
    module, x = vd.nn.ReAttention(32, 4).eval(), torch.randn(2, 9, 32)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(module, (x,), dynamic_shapes={"x": {0: batch}})
        quickly = {"aot_inductor.compile_wrapper_opt_level": "O0"}
        torch._inductor.aoti_compile_and_package(
            program, package_path=f"{tmp_path}/package.pt2", inductor_configs=quickly
        )
    x = torch.randn(3, 9, 32)
    torch.save(x, tmp_path / "x")
    code = (
        f"import sys, torch; torch.ops.load_library({str(_native.OPERATORS)!r});"
        f"run = torch._inductor.aoti_load_package('{tmp_path}/package.pt2');"
        f"torch.save(run(torch.load('{tmp_path}/x')), '{tmp_path}/out');"
        "assert 'vitdiv_kernels' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "out"), module(x).detach())
