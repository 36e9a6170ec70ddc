"""Comparison with the plain formula in float64, by budget: at most twice the error of the plain formula in
the tested dtype, or the floor below, whichever is more."""

import torch

# Relative to the largest element of the tensor. A plain formula on few numbers can be exact by luck.
# A float32 sum of 64 products is off by some units of its last place, each 4e-6 in a logit of 60, and so is
# the map.
FLOOR = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def largest_error(got, truth):
    return (got.double() - truth.double()).abs().max().item() if truth.numel() else 0.0


def assert_within_budget(got, plain, truth, dtype, name, scale=None):
    """`got` has an error, against the float64 `truth`, of at most twice that of `plain` or the floor.

    `scale` stands for the largest element where the truth is a sum whose terms cancel.
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    assert bool(got.isfinite().all()), f"{name} has values that are not finite"
    error = largest_error(got, truth)
    if scale is None:
        scale = truth.abs().max().item() if truth.numel() else 0.0
    plain_error = largest_error(plain, truth)
    budget = max(2 * plain_error if plain_error == plain_error else 0, FLOOR[dtype] * scale)
    assert error <= budget, f"{name}: error {error:.3g}, budget {budget:.3g}, scale {scale:.3g}"


def gradients(outputs, cotangents, inputs):
    """Gradients of the inputs that ask for one, by name."""
    wanted = {name: t for name, t in inputs.items() if t is not None and t.requires_grad}
    grads = torch.autograd.grad(outputs, list(wanted.values()), cotangents, allow_unused=True)
    return {
        name: torch.zeros_like(t) if g is None else g
        for (name, t), g in zip(wanted.items(), grads, strict=True)
    }
