"""Hooks that keep what blocks make in a forward pass, and what they tell about the layout of its tokens."""

import weakref

import torch
from torch import nn

from .. import _checks
from .._exporting import exporting
from ._blocks import place_of

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


class _Input(_Hook):
    """The tokens that enter a module."""

    def __call__(self, module, args, kwargs):
        if self.shelf.takes(self.key):
            self.shelf.kept[self.key] = args[0] if args else next(iter(kwargs.values()))


class _Mask(_Hook):
    def __call__(self, module, args, kwargs):
        if self.shelf.takes(self.key):
            several = bool(args) and isinstance(args[0], (list, tuple)) and len(args[0]) > 1
            self.shelf.kept[self.key] = kwargs.get("attn_mask"), kwargs.get("is_causal", False), several


class Recorder:
    """Keeps what chosen blocks make in the last forward pass; hooks, and nothing of the model, are changed.

    Args:
        model: the plain model.
        parts: its `ModelParts`.
        tokens: blocks whose tokens [B, N, D] are kept as they leave them; of block -1 those that enter the
            first.
        heads: a dict of blocks to their `_blocks.Attention`s, the outputs of whose projections, q, k and v
            [B, N, 3 H d], are kept.
        patch_embed: whether the output of parts.patch_embed [B, N, D] is kept.
        without_grad: keep also what is made without gradients.

    The hooks go with the recorder, at the latest when it is deleted. A copy of it, or one that is pickled, is
    the recorder of the copy of the model.
    """

    def __init__(self, model, parts, tokens=(), heads=None, *, patch_embed=False, without_grad=False):
        heads = heads or {}
        self.without_grad, self.channels_last = without_grad, parts.channels_last
        self.shelf, self.handles, self.places = _Shelf(), [], {}
        embedding = parts.patch_embed
        if tokens or heads or patch_embed:
            self._before(_Start, None, model if embedding is None else embedding)
            first = min(max(0, i) for i in [*tokens, *heads])
            self._before(_Mask, ("mask", first), parts.blocks[first], with_kwargs=True)
        if tokens and embedding is not None:
            if isinstance(getattr(embedding, "proj", None), nn.Module):
                self._after(_Shape, ("shape", "proj"), embedding.proj)
            self._after(_Shape, ("shape", "patch_embed"), embedding)
        for i in sorted(tokens):
            module, side = parts.tokens[i + 1]
            self.places["tokens", i] = f"{'what enters ' * (side == 'input')}{place_of(model, module)}"
            if side == "input":
                self._before(_Input, ("tokens", i), module, with_kwargs=True)
            else:
                self._after(_Output, ("tokens", i), module)
        for i, attention in sorted(heads.items()):
            for j, projection in enumerate(attention.projections):
                self.places["heads", i, j] = f"{attention.place}.{attention.names.projections[j]}"
                self._after(_Output, ("heads", i, j), projection)
        if patch_embed:
            self.places["patch_embed", 0] = "model.patch_embed"
            self._after(_Output, ("patch_embed", 0), embedding)
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
        absent = [key for key in self.places if key not in taken]
        if absent:
            places = [(self.places[key], missed.get(key)) for key in absent]
            raise RuntimeError(_why_absent(places, len(absent) == len(self.places)))
        width, projected = None, {}
        for key, place in self.places.items():
            value = taken[key] = _tokens(key[0], taken[key], place, width, self.channels_last)
            width = value.shape[-1]
            if key[0] == "heads":
                del taken[key]
                projected.setdefault(key[:2], []).append(value)
        for key, values in projected.items():
            taken[key] = values[0] if len(values) == 1 else torch.cat(values, -1)
        return taken


def _remove(handles, shelf):
    for handle in handles:
        handle.remove()
    handles.clear()
    shelf.kept = None


def _why_absent(absent, all_absent):
    by_cause = {}
    for place, cause in absent:
        places = by_cause.setdefault(cause, [])
        if place not in places:
            places.append(place)
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


def _tokens(kind, value, place, width, channels_last):
    """The tensor [B, N, D] of what a hook was given.

    DINOv3 gives its blocks lists of one tensor, and the released code of papers gives (tokens, maps); an
    embedding gives the size of its grid beside patches, or [B, rows, columns, D], as do blocks of Swin.
    """
    if isinstance(value, (list, tuple)) and len(value) > 0:
        several = [isinstance(each, torch.Tensor) and each.dim() == 3 for each in value]
        if kind == "patch_embed" or not any(several[1:]):
            value = value[0]
    if isinstance(value, torch.Tensor) and value.dim() == 3:
        return value
    given = type(value).__name__
    if isinstance(value, torch.Tensor):
        maps = (kind != "heads" and channels_last) or (kind == "patch_embed" and value.shape[-1] == width)
        if maps and value.dim() == 4:
            return value.flatten(1, 2)
        given = _checks.shape_of(value)
    what = "they" if kind == "patch_embed" else f"its {kind}"
    ways = ", or a tuple of which the first alone is" if kind == "tokens" else ""
    if isinstance(value, torch.Tensor) and value.dim() == 4 and kind == "tokens":
        given += ": for maps [B, rows, columns, D] give parts with channels_last"
    raise TypeError(f"{place} must give tokens [B, N, D]{ways}; {what} are {given}")
