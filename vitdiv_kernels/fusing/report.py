"""What `fuse` did."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Swapped:
    """An attention that was replaced.

    number: among the attentions that `fuse` knows, as `blocks` takes it. names: where it is in the model,
    more than one name for a module that is shared. what: the class that it had. notes: what changes by it.
    """

    number: int
    names: tuple[str, ...]
    what: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Left:
    """An attention that was left as it is. number: None for one that `fuse` does not know."""

    number: int | None
    names: tuple[str, ...]
    what: str
    why: str


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` replaced, and what it left and why; print it.

    Attributes:
        swapped: what was replaced, each with `number` (as `blocks` takes it), `names` (where it is; more than
            one for a shared module), `what` (its former class) and `notes` (what changes by it).
        left: what was left, each with `number` (None for a class that `fuse` does not know), `names`, `what`
            and `why`.
        backend: of the operation.

    Example:
        >>> import timm
        >>> report = fuse(timm.create_model("vit_tiny_patch16_224", depth=1))
        >>> report.left[0].why
        'it mixes no heads: plain=True gives it a mix that starts as the identity'
    """

    swapped: tuple[Swapped, ...]
    left: tuple[Left, ...]
    backend: str

    def __str__(self) -> str:
        known = len(self.swapped) + sum(left.number is not None for left in self.left)
        lines = [f'fused {len(self.swapped)} of {known} attentions, backend "{self.backend}"']
        lines += [_line(swap, "; ".join(swap.notes)) for swap in self.swapped]
        if self.left:
            lines += ["left as they are:", *(_line(left, left.why) for left in self.left)]
        return "\n".join(lines)


def _line(entry, text):
    number = "" if entry.number is None else entry.number
    return f"{number:>4}  {', '.join(entry.names)}: {entry.what}" + (f"; {text}" if text else "")
