"""Where a model has its tokens, attentions, norms and head: what an objective and a monitor look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from .. import _checks

Point = tuple[nn.Module, Literal["input", "output"]]


@dataclass(frozen=True)
class AttentionNames:
    """The names that an attention has for its parts; "a.b" is b of a. Parts that it has not are None.

    Args:
        projections: modules whose outputs side by side are q, k and v of all heads, [B, N, 3 H d].
        heads: the number of heads.
        norms: the norms of q and k, head by head; they count where they are there.
        scale: the factor of the logits; d^-1/2 where it is not there, unless it is needed.
        pre: the mix of the heads before the softmax, a Linear, a 1 x 1 Conv2d or a matrix.
        post: the mix of the heads after the softmax, likewise.
        norm: the norm of the mixed maps.
        transposed: whether the mixes are matrices [input head, output head].
        needs_scale: whether an attention without `scale` is of another kind.
        beside: layers and arguments that touch no map, such as the layer after the maps. A layer that is not
            named here or above, and has weights, is taken for one that does, and so is an argument; losses on
            maps are then refused.

    Example:
        >>> from vitdiv_kernels import AttentionNames
        >>> AttentionNames(projections=("query", "key", "value"), heads="num_attention_heads").all()
        ['query', 'key', 'value', 'q_norm', 'k_norm']
    """

    projections: tuple[str, ...] = ("qkv",)
    heads: str = "num_heads"
    norms: tuple[str, str] = ("q_norm", "k_norm")
    scale: str = "scale"
    pre: str | None = None
    post: str | None = None
    norm: str | None = None
    transposed: bool = False
    needs_scale: bool = False
    beside: tuple[str, ...] = ("norm", "proj", "out_proj", "to_out", "gate")

    def all(self) -> list[str]:
        """Every name."""
        mixes = [name for name in (self.pre, self.post, self.norm) if name is not None]
        return [*self.projections, *self.norms, *mixes]


@dataclass(frozen=True)
class ModelParts:
    """The parts of a model that `DiversityObjective.attach` and `CollapseMonitor` do not know by themselves.

    Args:
        blocks: the blocks in order, modules that are called with tokens.
        attentions: the attention of each block, None where it has none; left out, `block.attn`.
        names: how the attentions are read; None for those that are known, such as timm's.
        num_prefix_tokens: class and register tokens in front of the patches; None takes what the model tells,
            and the number of patches that patch_embed makes. A number that the tokens contradict is refused.
        tokens: where tokens are, (module, "input" or "output"), one more than blocks: what enters the first
            block, and then what leaves each. Left out, it is the input of the first block, and the output of
            each. A first argument counts as input, and as output the first entry of a tuple.
        channels_last: whether tokens are maps [B, rows, columns, D].
        patch_embed: makes patches, [B, N, D].
        norms: what patches go through, in turn, before the head.
        head: takes tokens to logits.

    Raises TypeError or ValueError, with a sentence, for what does not fit.

    Example:
        >>> import torch
        >>> from vitdiv_kernels import DiversityObjective, ModelParts
        >>> body = torch.nn.Sequential(*(torch.nn.TransformerEncoderLayer(16, 2) for _ in range(3)))
        >>> parts = ModelParts(body, num_prefix_tokens=0)
        >>> with DiversityObjective({"koleo": 1.0}).attach(body, parts) as objective:
        ...     out = body(torch.randn(2, 9, 16))
        ...     total, _ = objective()
    """

    blocks: Sequence[nn.Module]
    attentions: Sequence[nn.Module | None] = ()
    names: AttentionNames | None = None
    num_prefix_tokens: int | None = None
    tokens: Sequence[Point] = ()
    channels_last: bool = False
    patch_embed: nn.Module | None = None
    norms: Sequence[nn.Module] = ()
    head: nn.Module | None = None

    def __post_init__(self) -> None:
        blocks: tuple[Any, ...] = tuple(self.blocks)
        if not blocks or not all(isinstance(block, nn.Module) for block in blocks):
            raise TypeError("blocks must be modules, one at least, in the order in which they run")
        attentions = tuple(self.attentions) or tuple(getattr(block, "attn", None) for block in blocks)
        if len(attentions) != len(blocks):
            raise ValueError(
                f"attentions must be one for each of {len(blocks)} blocks, or None for a block without, got "
                f"{len(attentions)}"
            )
        tokens = tuple(self.tokens) or ((blocks[0], "input"), *((block, "output") for block in blocks))
        if len(tokens) != len(blocks) + 1:
            raise ValueError(
                f"tokens must be {len(blocks) + 1} places, what enters the first of {len(blocks)} blocks and "
                f"what leaves each, got {len(tokens)}"
            )
        for place in tokens:
            if not isinstance(place, tuple) or len(place) != 2 or place[1] not in ("input", "output"):
                raise TypeError(f'tokens must be pairs of a module and "input" or "output", got {place!r}')
        if self.num_prefix_tokens is not None:
            _checks.count("num_prefix_tokens", self.num_prefix_tokens)
        for name, value in (("blocks", blocks), ("attentions", attentions), ("tokens", tokens)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "norms", tuple(self.norms))

    def check(self, model: nn.Module) -> None:
        """Raises ValueError for a module that is not the model's."""
        known = set(model.modules())
        named: dict[str, Sequence[nn.Module | None]] = {
            "blocks": self.blocks,
            "attentions": self.attentions,
            "tokens": [module for module, _ in self.tokens],
            "patch_embed": [self.patch_embed],
            "norms": self.norms,
            "head": [self.head],
        }
        for name, modules in named.items():
            for i, module in enumerate(modules):
                if module is not None and module not in known:
                    raise ValueError(
                        f"{name} of parts must be modules of the model, {type(model).__name__}: entry {i}, a "
                        f"{type(module).__name__}, is none"
                    )
