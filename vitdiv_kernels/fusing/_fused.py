"""What takes the place of an attention of another package: it holds the parts of the original, under their
names, and computes what the original does.

The parts are shared and not copied: an optimiser, an average of weights or a tied block that holds a weight
still holds it afterwards, nothing is held twice, and `unfuse` has nothing to copy back.
"""

from typing import Any, ClassVar

from torch import nn

# What every module has of its own accord; the rest of a module's attributes are those of its class.
INTERNAL = frozenset(vars(nn.Module()))
HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def hook_of(module):
    """The name of a hook of this module itself, or None."""
    for kind in HOOKS:
        for hook in getattr(module, kind, {}).values():
            return getattr(hook, "__qualname__", None) or type(getattr(hook, "hook", hook)).__name__
    return None


class Fused(nn.Module):
    """The base of all of them. A family is a subclass in a file of `families`, and a line of its table.

    A subclass says which classes it stands for, and gives `forward`; `why_not` and `trial` where its
    originals ask for more.
    """

    title: ClassVar[str]  # as the report names the originals
    classes: ClassVar[frozenset[tuple[str | None, str]]]  # (module, name); module None is any
    parts: ClassVar[tuple[str, ...]]  # what an original must have
    drop: ClassVar[str] = "attn_drop"  # the dropout of the maps
    never_called: ClassVar[tuple[str, ...]] = ()  # parts that are read, beside `drop`
    added: ClassVar[tuple[str, ...]] = ()  # parts that the original has not
    on_request = False  # only with plain=True
    gives_maps = False  # whether the original returns its maps, in whose place None is returned

    # What the original returns after its output; None where it returns the output alone.
    rest: tuple[Any, ...] | None

    def __init__(self, original, backend, rest=None):
        nn.Module.__init__(self)
        for name, value in vars(original).items():
            if name not in INTERNAL:
                self.__dict__[name] = value
        for kind in ("_parameters", "_buffers", "_modules"):
            getattr(self, kind).update(getattr(original, kind))
        self._non_persistent_buffers_set = set(original._non_persistent_buffers_set)
        self.training = original.training
        self.backend = backend
        self.rest = rest
        self._original = (original,)  # in a tuple: as a module its parts would be counted twice

    @classmethod
    def stands_for(cls, kind, module=None):
        """Whether a class, or where only the parts tell it, a module, is an original of this family."""
        return not cls.classes.isdisjoint({(kind.__module__, kind.__name__), (None, kind.__name__)})

    @classmethod
    def why_not(cls, original, above):
        """Why this original can't be replaced, a sentence, or None. `above`: the modules that hold it."""
        return None

    @classmethod
    def trial(cls, original, above):
        """(module, shapes of its inputs) to compare before and after: the original or one that holds it."""
        return original, [(2, 5, original.qkv.in_features)]

    def unreadable(self):
        """Why the parts that are read can't be, a sentence, or None."""
        return None

    def give_back(self):
        """The original, with the parts as they are now."""
        (original,) = self._original
        for kind in ("_parameters", "_buffers", "_modules"):
            ours, theirs = getattr(self, kind), getattr(original, kind)
            for name in theirs:
                theirs[name] = ours[name]
        for name in vars(original):
            if name not in INTERNAL:
                original.__dict__[name] = self.__dict__[name]
        original.training = self.training
        return original

    def why_not_back(self):
        """Why the original can't do what this does now, a sentence, or None."""
        (original,) = self._original
        for kind in ("_parameters", "_buffers", "_modules"):
            for name, part in getattr(self, kind).items():
                known = name in getattr(original, kind) or name in self.added
                if not known and not isinstance(part, nn.Identity | None):
                    return f"its {name} is new, and the original has none: remove it first"
        return None

    def drop_of_maps(self):
        """The probability of the dropout of the maps. Raises TypeError for hooks that would not run."""
        for name in (self.drop, *self.never_called):
            part = getattr(self, name, None)
            for module in part.modules() if isinstance(part, nn.Module) else ():
                if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
                    raise TypeError(
                        f"{name} must be without hooks, got {hook_of(module)}: a fused attention never calls "
                        "it; remove the hook, or unfuse the model"
                    )
        drop = getattr(self, self.drop, None)
        return getattr(drop, "p", 0.0)
