"""Declares the operators, each once for the compiled kernels and once for the Triton kernels.

With them stands what torch's tools ask of an operator: a fake kernel (torch.compile, export), the derivative,
rules for vmap and DTensor, the number of floating-point operations. The compiled library defines the schemas
of its namespace itself (csrc/operators), so that a C++ program has only to load it; without the library they
are defined here.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from .._autograd import refuse_forward_mode, transformed
from .._imports import when_imported
from . import _sharding
from ._vmap import vmap_rule

NAMESPACES = {"native": "vitdiv", "triton": "vitdiv_triton"}
_AFTER_AUTOGRAD = torch._C._after_autograd_keyset
_below_autograd = torch._C._AutoDispatchBelowAutograd


class Operator(NamedTuple):
    """What is declared of an operator, whichever kernels run it.

    fakes: the fake kernels, by backend. setup(ctx, inputs, outputs) saves what backward(ctx, operator, needs,
    *gradients) takes, which returns a gradient or None for each of the leading inputs; `operator` gives the
    operator of a name in the same namespace. Without them a derivative raises. folds, shards: see
    `_vmap.vmap_rule` and `_sharding.register`. flops takes the arguments, shapes for tensors.
    """

    name: str
    schema: str
    fakes: dict
    setup: Callable | None
    backward: Callable | None
    folds: Callable | None
    shards: Callable | None
    flops: Callable


DECLARED: dict[
    str, tuple[Operator, dict[str, Callable]]
] = {}  # by name: an Operator and the table of its callables, by backend


def define(
    name,
    schema,
    fake,
    *,
    flops,
    triton_fake=None,
    plain=None,
    setup=None,
    backward=None,
    folds=None,
    shards=None,
):
    """Declare `vitdiv::name` and `vitdiv_triton::name`, with one schema; returns callables, by backend.

    The first is implemented by the compiled library, when it is loaded. The second calls the function `name`
    of the module `triton_kernels` beside that of `fake`, which is imported, and Triton with it, at the first
    call; torch.compile does not look inside. `fake` is the fake kernel of both, unless the Triton kernels
    save something else for the backward. An operator that is a `plain` function of torch's, on devices for
    which there is no kernel, is declared once.
    """
    fakes = {"native": fake, "triton": triton_fake or fake}
    operator, table = Operator(name, schema, fakes, setup, backward, folds, shards, flops), {}
    DECLARED[name] = operator, table
    if plain is not None:
        table["native"] = declare(NAMESPACES["native"], operator, "native")
        _library(NAMESPACES["native"]).impl(name, plain, "CompositeExplicitAutograd")
        return table
    for backend, namespace in NAMESPACES.items():
        table[backend] = declare(namespace, operator, backend)
    module = f"{fake.__module__.rpartition('.')[0]}.triton_kernels"

    def run(*arguments):
        return getattr(importlib.import_module(module), name)(*arguments)

    # The CPU key is for Triton's interpreter.
    for key in ("CPU", "CUDA"):
        _library(NAMESPACES["triton"]).impl(name, run, key)
    return table


@functools.cache
def _library(namespace):
    return torch.library.Library(namespace, "FRAGMENT")


def declare(namespace, operator, backend):
    """Define `namespace::name`, where the library has not, with everything but its kernels. Returns a
    callable, which in eager mode takes a shorter way than the dispatcher."""
    library = _library(namespace)
    if not hasattr(getattr(torch.ops, namespace), operator.name):
        library.define(operator.name + operator.schema)
    packet = getattr(getattr(torch.ops, namespace), operator.name)
    op = packet.default
    torch.library.register_fake(op, operator.fakes[backend], lib=library)
    torch.library.register_vmap(op, vmap_rule(op, operator.folds), lib=library)
    when_imported("torch.utils.flop_counter", functools.partial(_count, packet, operator.flops))
    _sharding.register(op, operator.shards)
    function = _function(operator, backend)

    # torch.library.register_autograd gives a Function that torch.func refuses.
    def autograd(keyset, *arguments):
        refuse_forward_mode(*arguments)
        below = functools.partial(op.redispatch, keyset & _AFTER_AUTOGRAD)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
            with _below_autograd():
                return below(*arguments)
        if not transformed():
            return function.apply(below, *arguments)
        with enable_single_level_autograd_function():  # the Function of this level of torch.func
            return super(torch.autograd.Function, function).apply(below, *arguments)

    library.impl(operator.name, autograd, "Autograd", with_keyset=True)

    def call(*arguments):
        if torch.compiler.is_compiling() or transformed():
            return op(*arguments)
        refuse_forward_mode(*arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return function.apply(op, *arguments)
        with _below_autograd():
            return op(*arguments)

    call.op = op
    return call


def _count(packet, flops):
    from torch.utils.flop_counter import register_flop_formula  # it imports Triton

    register_flop_formula(packet)(flops)


@contextlib.contextmanager
def _levels_below():
    """What the levels of torch.func below this one need: a forward is called without grad modes."""
    if transformed():
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            yield
    else:
        yield


def _function(operator, backend):
    """The autograd.Function that an Autograd kernel puts around the operator."""

    def others(name):
        return DECLARED[name][1][backend]

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, run, *inputs):
            ctx.set_materialize_grads(False)
            with _levels_below(), _below_autograd():
                outputs = run(*inputs)
            if operator.setup is not None:
                operator.setup(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx, *gradients):
            if operator.backward is None:
                raise RuntimeError(
                    "vitdiv_kernels is differentiable once: for second derivatives use "
                    "backend='reference', if the function has a backend"
                )
            needs = ctx.needs_input_grad[1:]
            if all(gradient is None for gradient in gradients):  # nothing flows back
                return (None,) * (1 + len(needs))
            found = operator.backward(ctx, others, needs, *gradients)
            return None, *found, *(None,) * (len(needs) - len(found))

    Function.__name__ = Function.__qualname__ = f"{operator.name}_of_{backend}"
    return Function
