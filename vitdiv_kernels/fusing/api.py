"""`fuse` and `unfuse`."""

import collections
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import _checks, _dispatch
from .._types import Backend
from ..nn import ReAttention, TalkingHeadsAttention
from . import _trial
from ._fused import Fused, hook_of
from .families import FAMILIES
from .report import FuseReport, Left, Swapped

# Attentions of this package that are not fused: its own ViT is built with what its config says.
NOT_FUSED = {
    ("vitdiv_kernels.vit.parts", "Attention"): (
        "it mixes no heads: list its block in reattention of the ViTConfig, and load the weights by vit.load "
        "with strict=False"
    ),
    ("vitdiv_kernels.vit.parts", "ClassAttention"): "its class token alone attends: there are no maps to mix",
}


class _Found(NamedTuple):
    """An attention in a model. family: None where it is none of `FAMILIES`; known: whether it is counted."""

    module: nn.Module
    names: list[str]
    above: list[nn.Module]
    family: type[Fused] | None
    known: bool

    @property
    def what(self):
        return type(self.module).__name__ if self.family is None else self.family.title

    @property
    def why_unknown(self):
        kind = type(self.module)
        return NOT_FUSED.get((kind.__module__, kind.__name__), "fuse does not know it")


def fuse(
    model: nn.Module, *, blocks: Iterable[int] | None = None, plain: bool = False, backend: Backend = "auto"
) -> FuseReport:
    """Gives the attentions of a model, in place, this package's kernels: the same outputs and gradients
    within rounding, without N x N maps in main memory.

    It knows timm's Attention (with `plain`), TalkingHeadAttn of timm's CaiT, the released ReAttention of
    DeepViT, Gong et al.'s talking heads, the attentions of vit-pytorch's DeepViT and CaiT, and
    x-transformers' talking heads. What takes their place holds their own parts under their own names: state
    dicts of the original are saved and loaded as before, optimisers keep their parameters, tied weights stay
    tied, and mode, requires_grad, dtype and device are as they were.

    Before it replaces an attention it compares, on small random tokens and weights, what the original's own
    forward gives. What has another forward, hooks, a subclass, or an option that the operation has not, is
    left, and the report says why.

    Args:
        model: of any class. Fuse before you wrap it for FSDP; `plain` also before DistributedDataParallel and
            the optimiser, since it adds parameters.
        blocks: which attentions, by their number among those it knows, in the order of the model's modules;
            negative ones from the end. In ViTs of one kind that is the number of the block.
        plain: also timm's plain Attention, which becomes a ReAttention without norm whose mix starts as the
            identity and can be trained. `reatten_matrix` is new in the state dict, frozen where the whole
            attention is; a state dict of the original loads, and makes it the identity again.
        backend: of the operation, as `vitdiv_kernels.reattention`.

    Returns a report to print: what was replaced where, what was left and why. The maps that DeepViT's
    ReAttention returns, and those in the intermediates of x-transformers, are None afterwards; masks, biases
    of positions and caches raise ValueError when they are given.

    Raises:
        TypeError: a model without an attention that `fuse` knows, blocks that are no numbers.
        ValueError: blocks that are not there; a model that is itself an attention, or is wrapped for FSDP, or
            for DistributedDataParallel with plain; an unknown backend.

    Example:
        >>> import timm
        >>> model = timm.create_model("cait_xxs24_224", depth=2)
        >>> print(fuse(model))
        fused 2 of 2 attentions, backend "auto"
           0  blocks.0.attn: TalkingHeadAttn of timm's CaiT
           1  blocks.1.attn: TalkingHeadAttn of timm's CaiT
        left as they are:
              blocks_token_only.0.attn: ClassAttn; fuse does not know it
              blocks_token_only.1.attn: ClassAttn; fuse does not know it
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _checks.one_of("backend", backend, ("auto", *_dispatch.BACKENDS))
    _check_wrappers(model, plain)
    found = _attentions(model)
    known = [each for each in found if each.known]
    if not known:
        others = collections.Counter(each.what for each in found)
        has = f"its attentions are {', '.join(others)}" if others else "it has no attention"
        ours = next((each for each in found if each.why_unknown in NOT_FUSED.values()), None)
        if ours is not None:
            has = f"of this package's {ours.what} at {ours.names[0]}: {ours.why_unknown}"
        titles = ", ".join(family.title for family in FAMILIES)
        raise TypeError(f"model must have an attention that fuse knows, {titles}; {has}")
    if known[0].module is model:
        raise ValueError("model must hold its attentions, got an attention: put it into a Sequential")
    wanted = _numbers(blocks, len(known))
    swapped, left, replaced = [], [], {}
    tried: dict[Any, Any] = {}  # signature -> what a trial call gave, or why it failed
    for number, attention in enumerate(known):
        try:
            if number not in wanted:
                raise _trial.Refused("not among blocks")
            fused, notes = _made(attention, plain, backend, tried)
        except _trial.Refused as sentence:
            left.append(Left(number, tuple(attention.names), attention.what, str(sentence)))
        else:
            replaced[id(attention.module)] = fused
            swapped.append(Swapped(number, tuple(attention.names), attention.what, notes))
    left += [Left(None, tuple(each.names), each.what, each.why_unknown) for each in found if not each.known]
    _replace(model, replaced)
    return FuseReport(tuple(swapped), tuple(left), backend)


def unfuse(model: nn.Module) -> list[str]:
    """Gives a model, in place, its original attentions again, with the weights and the mode as they are now.

    Returns the names of the modules that were given back, an empty list where nothing was fused.

    Raises ValueError, and changes nothing, where an original can't do what the model does now: a mix of
    plain attention that was trained, hooks or parametrizations on a fused module.

    Example:
        >>> import timm
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2)
        >>> report = fuse(model, plain=True)
        >>> unfuse(model)
        ['blocks.0.attn', 'blocks.1.attn']
    """
    if isinstance(model, Fused):
        raise ValueError("model must hold its attentions, got an attention: put it into a Sequential")
    fused = {name: module for name, module in model.named_modules() if isinstance(module, Fused)}
    for name, module in fused.items():
        if type(module) not in FAMILIES:
            why: str | None = f"its class was changed to {type(module).__name__}: undo that first"
        elif (hook := hook_of(module)) is not None:
            why = f"it has the hook {hook}: remove it first, and register it again afterwards"
        else:
            why = module.why_not_back()
        if why is not None:
            raise ValueError(f"model can't be unfused at {name}: {why}")
    _replace(model, {id(module): module.give_back() for module in fused.values()})
    return list(fused)


def names_of_new_mixes(model: nn.Module) -> set[str]:
    """What `fuse(plain=True)` has added to the names of a state dict."""
    return {
        f"{name}.{added}.{parameter}"
        for name, module in model.named_modules()
        if isinstance(module, Fused)
        for added in module.added
        for parameter in getattr(module, added).state_dict()
    }


def _check_wrappers(model, plain):
    for module in model.modules():
        name = type(module).__name__
        if name == "FullyShardedDataParallel":
            raise ValueError("model must not be wrapped for FSDP: fuse it first, and wrap it then")
        if plain and isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "model must not be wrapped in DistributedDataParallel when plain is True, since gradients of "
                "the new mixes would not be averaged: fuse it first, and wrap it then"
            )


def _attentions(model):
    """All attentions of a model, in its order: those that are known, and others that are called so."""
    found = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if id(module) in found:
            found[id(module)].names.append(name)
            continue
        family, known = _recognised(module)
        if known or _called_attention(module):
            parents = name.split(".") if name else []
            above = [modules[".".join(parents[:depth])] for depth in range(len(parents))]
            found[id(module)] = _Found(module, [name], above, family, known)
    holders = {id(parent) for each in found.values() for parent in each.above}
    inner = {id(part) for each in found.values() if each.known for part in each.module.modules()}
    return [
        each
        for each in found.values()
        if each.known or not (id(each.module) in holders or id(each.module) in inner)
    ]


def _recognised(module):
    """The family, or None; and whether `fuse` knows it."""
    if isinstance(module, Fused | ReAttention | TalkingHeadsAttention):
        return None, True
    for kind in type(module).__mro__:
        for family in FAMILIES:
            if family.stands_for(kind, module):
                return family, True
    return None, False


def _called_attention(module):
    name = type(module).__name__
    return "Attention" in name or "Attn" in name


def _numbers(blocks, count):
    """Those of the attentions that are wanted."""
    if blocks is None:
        return range(count)
    if isinstance(blocks, str | bytes) or not isinstance(blocks, Iterable):
        raise TypeError(f"blocks must be numbers of attentions, such as [0, 1], got {blocks!r}")
    wanted = set()
    for block in blocks:
        try:
            number = operator.index(block)
        except TypeError:
            number = None
        if number is None or isinstance(block, bool):
            raise TypeError(f"blocks must be numbers of attentions, got {block!r} among them")
        if not -count <= number < count:
            raise ValueError(f"blocks must be from {-count} to {count - 1} in this model, got {number}")
        wanted.add(number % count)
    if not wanted:
        raise ValueError("blocks must name at least one attention, got none")
    return wanted


def _made(attention, plain, backend, tried):
    """What takes the place of an attention, and notes on it. Raises Refused where there is none."""
    module, family = attention.module, attention.family
    sentence = _why_not(attention, plain)
    if sentence is not None:
        raise _trial.Refused(sentence)
    key = (_signature(family.trial(module, attention.above)[0]), _signature(module))
    if key not in tried:
        try:
            tried[key] = _trial.rest_of(family, module, attention.above)
        except _trial.Refused as refused:
            tried[key] = refused
    if isinstance(tried[key], _trial.Refused):
        raise tried[key]
    fused = family(module, backend, tried[key])
    if backend != "reference" and (sentence := fused.unreadable()) is not None:
        raise _trial.Refused(sentence)
    try:
        return fused, _notes(fused, backend)
    except TypeError as hook:
        raise _trial.Refused(str(hook)) from hook


def _why_not(attention, plain):
    module, family = attention.module, attention.family
    if isinstance(module, Fused):
        return f"it is fused already, with backend {module.backend!r}: unfuse the model to change that"
    if family is None:
        return "it has this package's kernels by itself"
    if not family.stands_for(type(module), module):
        return f"{type(module).__name__} is a subclass, and what it changes is not known"
    missing = [name for name in family.parts if not hasattr(module, name)]
    if missing:
        return f"it has no {', '.join(missing)}, which the known release has"
    if family.on_request and not plain:
        return "it mixes no heads: plain=True gives it a mix that starts as the identity"
    for name in ("forward", "_compiled_call_impl"):
        if vars(module).get(name) is not None:
            return f"it has a {name} of its own: fuse it before that is set"
    if (hook := hook_of(module)) is not None:
        return f"it has the hook {hook}: remove it, fuse, and register it on what takes its place"
    sentence = family.why_not(module, attention.above)
    if sentence is None:
        root, _ = family.trial(module, attention.above)
        for name, tensor in (*root.named_parameters(), *root.named_buffers()):
            if type(tensor) not in (torch.Tensor, nn.Parameter):
                return f"{name} is a {type(tensor).__name__}: fuse before it is sharded or quantised"
    return sentence


def _signature(module):
    """What tells apart attentions that need a trial of their own."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    plain = int | float | str | None
    own = [(name, value) for name, value in vars(module).items() if isinstance(value, plain)]
    return (
        type(module),
        type(module).forward,
        repr(module),
        tuple((name, tuple(tensor.shape)) for name, tensor in tensors),
        tuple(sorted((name, repr(value)) for name, value in own if name != "training")),
    )


def _notes(fused, backend):
    notes = []
    drop = fused.drop_of_maps()
    if drop > 0 and getattr(fused, "apply_transform", True):
        if backend not in ("auto", "reference"):
            raise _trial.Refused(
                f"its {fused.drop} is {drop}, and only the reference has dropout of maps: set it to 0, or "
                'take backend "auto", which runs the reference in training'
            )
        notes.append(f"in training its {fused.drop} of {drop} needs the reference, which holds the maps")
    if fused.added:
        frozen = "" if fused.reatten_matrix.weight.requires_grad else ", frozen"
        notes.append(f"new parameters: reatten_matrix{frozen}")
    if fused.gives_maps:
        notes.append("its maps are None")
    return tuple(notes)


def _replace(model: nn.Module, replaced: dict[int, Any]) -> None:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in replaced:
                parent._modules[name] = replaced[id(child)]
