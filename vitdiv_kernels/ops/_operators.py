"""Declares the operators, each once for the compiled kernels and once for the Triton kernels."""

import importlib

import torch

NAMESPACES = {"native": "vitdiv", "triton": "vitdiv_triton"}


def define(name, schema, fake, triton_fake=None):
    """Declare `vitdiv::name` and `vitdiv_triton::name`, with one schema; returns both, by backend.

    The first is implemented by the compiled extension, when it is loaded. The second calls the function
    `name` of the module `triton_kernels` beside that of `fake`, which is imported, and Triton with it, at the
    first call; torch.compile does not look inside. `fake` is the fake kernel of both, unless the Triton
    kernels save something else for the backward.
    """
    fakes = {"native": fake, "triton": triton_fake or fake}
    for backend, namespace in NAMESPACES.items():
        torch.library.define(f"{namespace}::{name}", schema)
        torch.library.register_fake(f"{namespace}::{name}", fakes[backend])
    module = f"{fake.__module__.rpartition('.')[0]}.triton_kernels"

    def run(*arguments):
        return getattr(importlib.import_module(module), name)(*arguments)

    # The CPU key is for Triton's interpreter.
    torch.library.impl(f"{NAMESPACES['triton']}::{name}", ("cpu", "cuda"), run)
    return {
        backend: getattr(getattr(torch.ops, namespace), name).default
        for backend, namespace in NAMESPACES.items()
    }
