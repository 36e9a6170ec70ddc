"""A trial call before an attention is replaced: copies of the original and of what would take its place, with
the same random weights, have to give the same outputs, gradients and statistics.

A name and a list of parameters do not tell what a forward does: research code is changed in place. Random
weights tell a transposed mix, which an identity would hide. The copies are in float64 on the CPU and have no
hooks; neither the model nor the global random numbers change.
"""

import torch
from torch import nn

from ._fused import INTERNAL

# Some originals take their softmax in float32.
RTOL, ATOL = 1e-4, 1e-6
SEED = 3


class Refused(Exception):
    """The sentence why an original stays."""


def rest_of(family, original, above):
    """What the original returns after its output, None where it returns the output alone.

    Raises Refused where what the family makes of it does not do the same.
    """
    root, shapes = family.trial(original, above)
    path = next(name for name, module in root.named_modules() if module is original)
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        first, second = _copied(root), _copied(root)
        expected = _results(first, shapes, "a trial call of it failed")
        rest = _rest(family, expected.pop("rest")) if root is original else None
        second = _with_fused(family, second, path, rest)
        ours = _results(second, shapes, "what would take its place failed in a trial call")
    for name, value in expected.items():
        if not _equal(ours.get(name), value):
            raise Refused(f"{name} would not be those of its own forward, which must be another one")
    return rest


def _copied(root):
    try:
        return _copy(root, torch.Generator().manual_seed(SEED), {})
    except Exception as error:
        raise Refused(f"it can't be copied for a trial call: {type(error).__name__}: {error}") from error


def _copy(module, generator, copies):
    """A copy with random weights, in evaluation, its dropouts off."""
    if id(module) in copies:
        return copies[id(module)]
    copies[id(module)] = copy = object.__new__(type(module))
    copy.__dict__.update(vars(nn.Module()))
    copy.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    for name, value in vars(module).items():
        if name not in INTERNAL:
            tensor = isinstance(value, torch.Tensor)
            copy.__dict__[name] = _random(value, generator, copies) if tensor else value
    for name, value in module._parameters.items():
        copy._parameters[name] = None if value is None else _random(value, generator, copies)
    for name, value in module._buffers.items():
        copy._buffers[name] = None if value is None else _random(value, generator, copies)
    for name, value in module._modules.items():
        copy._modules[name] = None if value is None else _copy(value, generator, copies)
    if isinstance(copy, nn.modules.dropout._DropoutNd):
        copy.p = 0.0
    return copy


def _random(tensor, generator, copies):
    if id(tensor) in copies:
        return copies[id(tensor)]
    if not tensor.is_floating_point():
        made = torch.zeros(tensor.shape, dtype=tensor.dtype)
    elif isinstance(tensor, nn.Parameter):
        made = nn.Parameter(0.5 * torch.randn(tensor.shape, dtype=torch.float64, generator=generator))
    else:  # variances among them
        made = 0.5 + torch.rand(tensor.shape, dtype=torch.float64, generator=generator)
    copies[id(tensor)] = made
    return made


def _with_fused(family, root, path, rest):
    fused = family(root.get_submodule(path), "reference", rest)
    if not path:
        return fused
    holder, _, name = path.rpartition(".")
    root.get_submodule(holder)._modules[name] = fused
    return root


def _results(root, shapes, failed):
    """Outputs, gradients and buffers, in training and evaluation."""
    generator = torch.Generator().manual_seed(SEED)
    inputs = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    results = {}
    for tensor in inputs:
        tensor.requires_grad_()
    try:
        for mode in ("training", "evaluation"):
            root.train(mode == "training")
            out = root(*inputs)
            out, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
            results[f"outputs in {mode}"] = out.detach()
            if mode == "training":
                out.backward(torch.randn(out.shape, dtype=out.dtype, generator=generator))
    except Exception as error:
        lines = str(error).splitlines() or [""]
        raise Refused(f"{failed}: {type(error).__name__}: {lines[0]}") from error
    for number, tensor in enumerate(inputs):
        results[f"gradients of input {number}"] = tensor.grad
    for name, parameter in root.named_parameters():
        results[f"gradients of {name}"] = parameter.grad
    results.update((f"values of {name}", buffer) for name, buffer in root.named_buffers())
    return results | {"rest": rest}


def _rest(family, rest):
    if rest is None or not any(isinstance(value, torch.Tensor) for value in rest):
        return rest
    if family.gives_maps and len(rest) == 1 and rest[0].dim() == 4:
        return (None,)
    raise Refused("it returns more than its output, which the operation does not make")


def _equal(ours, theirs):
    if ours is None or theirs is None:
        return ours is None and theirs is None
    size = theirs.abs().max().item() if theirs.numel() else 0.0
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=RTOL, atol=ATOL * max(size, 1.0))
