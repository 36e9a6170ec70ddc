"""Hooks that keep what blocks make in a forward pass, and what they tell about the layout of its tokens."""

import weakref

import torch
from torch import nn

from .. import _checks
from .._exporting import exporting

WITHOUT_GRADIENTS, IN_A_BACKWARD = "without gradients", "in a backward pass"


class _Shelf:
    """Where hooks put things: `kept` is None where nobody takes them.

    A copy, also one that was pickled, is empty and nobody's, until a recorder that is copied with it takes
    it: what a copy of the model makes, say a teacher, is not what the model made.
    """

    def __init__(self):
        self.kept, self.missed, self.without_grad = None, {}, False

    def __reduce__(self):
        return _Shelf, ()

    def takes(self, key):
        """Whether what is made now is kept: not of a pass without gradients, nor of one that a backward pass
        runs again (activation checkpointing)."""
        if self.kept is None or exporting():
            return False
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            self.missed[key] = IN_A_BACKWARD
            return False
        if self.without_grad or torch.is_grad_enabled():
            return True
        self.missed[key] = WITHOUT_GRADIENTS
        return False


class _Hook:
    def __init__(self, shelf, key=None):
        self.shelf, self.key = shelf, key


class _Start(_Hook):
    """Before a forward pass: of several the last one counts, and nothing of an earlier one."""

    def __call__(self, module, args):
        if self.shelf.takes(self.key):
            self.shelf.kept.clear()
            self.shelf.missed.clear()


class _Output(_Hook):
    def __call__(self, module, args, out):
        if self.shelf.takes(self.key):
            self.shelf.kept[self.key] = out


class _Shape(_Hook):
    """The shape alone: the tensor need not live as long."""

    def __call__(self, module, args, out):
        if self.shelf.takes(self.key):
            out = out[0] if isinstance(out, tuple) else out
            self.shelf.kept[self.key] = tuple(out.shape)


class _Tokens(_Hook):
    """The tokens that enter a block."""

    def __call__(self, module, args, kwargs):
        if self.shelf.takes(self.key):
            self.shelf.kept[self.key] = args[0] if args else next(iter(kwargs.values()))


class _Mask(_Hook):
    def __call__(self, module, args, kwargs):
        if self.shelf.takes(self.key):
            self.shelf.kept[self.key] = kwargs.get("attn_mask"), kwargs.get("is_causal", False)


class Recorder:
    """Keeps what chosen blocks make in the last forward pass; hooks, and nothing of the model, are changed.

    Args:
        model: made of timm-like blocks.
        tokens: blocks whose output [B, N, D] is kept, of block -1 the tokens that enter block 0; heads: a
            dict of blocks to the projections whose output q, k and v [B, N, 3 H d] is kept.
        patch_embed: whether the output of model.patch_embed [B, N, D] is kept.
        without_grad: keep also what is made without gradients.

    The hooks go with the recorder, at the latest when it is deleted. A copy of it, or one that is pickled, is
    the recorder of the copy of the model.
    """

    def __init__(self, model, tokens=(), heads=None, *, patch_embed=False, without_grad=False):
        heads = heads or {}
        blocks = model.blocks
        self.without_grad, self.shelf, self.handles = without_grad, _Shelf(), []
        self.required = [("tokens", i) for i in sorted(tokens)] + [("heads", i) for i in sorted(heads)]
        self.required += [("patch_embed", 0)] if patch_embed else []
        embedding = getattr(model, "patch_embed", None)
        embedding = embedding if isinstance(embedding, nn.Module) else None
        if self.required:
            self._before(_Start, None, model if embedding is None else embedding)
            first = min(0 if i < 0 else i for i in [*tokens, *heads])
            self._before(_Mask, ("mask", first), blocks[first], with_kwargs=True)
        if tokens and embedding is not None:
            if isinstance(getattr(embedding, "proj", None), nn.Module):
                self._after(_Shape, ("shape", "proj"), embedding.proj)
            self._after(_Shape, ("shape", "patch_embed"), embedding)
        if patch_embed:
            self._after(_Output, ("patch_embed", 0), embedding)
        for i in sorted(tokens):
            if i < 0:
                self._before(_Tokens, ("tokens", i), blocks[0], with_kwargs=True)
            else:
                self._after(_Output, ("tokens", i), blocks[i])
        for i in sorted(heads):
            self._after(_Output, ("heads", i), heads[i])
        self._open()

    def _before(self, kind, key, module, **options):
        self.handles.append(module.register_forward_pre_hook(kind(self.shelf, key), **options))

    def _after(self, kind, key, module):
        self.handles.append(module.register_forward_hook(kind(self.shelf, key)))

    def _open(self):
        self.shelf.kept, self.shelf.without_grad = {}, self.without_grad
        self.remove = weakref.finalize(self, _remove, self.handles, self.shelf)
        self.remove.atexit = False

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "remove"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()

    @property
    def kept(self):
        return self.shelf.kept

    def take(self):
        """What was kept, {("tokens" or "heads", block): tensor}, the output of patch_embed as
        ("patch_embed", 0), and what `_tokens.Layout` reads; keeps it no longer.

        Raises RuntimeError, which names the blocks and the likely cause, where a block is absent; TypeError
        for what is no tensor [B, N, D].
        """
        taken, missed = dict(self.shelf.kept), dict(self.shelf.missed)
        self.shelf.kept.clear()
        self.shelf.missed.clear()
        absent = [key for key in self.required if key not in taken]
        if absent:
            raise RuntimeError(_why_absent(absent, missed, len(absent) == len(self.required)))
        width = None
        for key in self.required:
            taken[key] = _tokens(key, taken[key], width)
            width = taken[key].shape[-1]
        return taken


def _remove(handles, shelf):
    for handle in handles:
        handle.remove()
    handles.clear()
    shelf.kept = None


def _place(key):
    kind, i = key
    if kind == "patch_embed":
        return "model.patch_embed"
    return f"blocks[{max(0, i)}]" + (".attn.qkv" if kind == "heads" else "")


def _why_absent(absent, missed, all_absent):
    by_cause = {}
    for key in absent:
        places = by_cause.setdefault(missed.get(key), [])
        if _place(key) not in places:
            places.append(_place(key))
    ran = {
        WITHOUT_GRADIENTS: "ran without gradients: under torch.no_grad, or checkpointed with "
        "use_reentrant=True, where use_reentrant=False is needed",
        IN_A_BACKWARD: "ran in a backward pass, which counts for no loss: call the objective before backward",
        None: "did not run, or not as modules: run the model first, the attached one; blocks are missed that "
        "layer drop skips, whose forward is not what calls them, or that were compiled without hooks: attach "
        "before the first call of a compiled model, and of another of its class (or do what the docstring of "
        "DiversityObjective says)",
    }
    what = "no forward pass" if all_absent else "no whole forward pass"
    causes = "; ".join(f"{', '.join(places)} {ran[cause]}" for cause, places in by_cause.items())
    return f"{what} was recorded since the last call: {causes}"


def _tokens(key, value, width=None):
    """The tensor [B, N, D] of what a hook was given: DINOv3 gives its blocks lists of one tensor, and an
    embedding gives the size of its grid beside it, or [B, rows, columns, D]."""
    kind, i = key
    if kind == "patch_embed" and isinstance(value, tuple):
        value = value[0]
    if kind == "tokens" and isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if not isinstance(value, torch.Tensor) or value.dim() != 3:
        given = type(value).__name__
        if isinstance(value, torch.Tensor):
            if kind == "patch_embed" and value.dim() == 4 and value.shape[-1] == width:
                return value.flatten(1, 2)
            given = _checks.shape_of(value)
        where = "model.patch_embed" if kind == "patch_embed" else f"blocks[{max(0, i)}]"
        what = "they" if kind == "patch_embed" else f"its {kind}"
        raise TypeError(f"{where} must give tokens [B, N, D], {what} are {given}")
    return value
