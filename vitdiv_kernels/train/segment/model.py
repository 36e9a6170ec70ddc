"""A ViT that segments: trunk and head."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import vit
from .. import models
from ..errors import TrainError
from .heads import LinearHead, UPerHead

# of a trunk, what makes logits of images
CLASSIFIERS = ("head", "head_dist", "patch_head", "attn_pool")
# what only a class token meets that joins after the blocks (CaiT, XCiT)
CLASS_BLOCKS = ("blocks_token_only", "cls_attn_blocks")


class Segmenter(nn.Module):
    """Images [B, C, S, S] to logits [B, classes, S, S] of each pixel.

    Args:
        config: of the trunk, whose `classes` are those of the pixels.
        head: "linear", on the tokens of the last block, or "upernet", on those of four blocks.
        width: features in the head upernet; None for as many as tokens have.

    The trunk is the ViT without its classifiers; the final norm is applied to the tokens of each block that
    the head takes. `blocks`, `patch_embed`, `norm` and `num_prefix_tokens` are the trunk's, so that a
    `DiversityObjective` and a `CollapseMonitor` find them.

    Raises TrainError for a trunk that gives no tokens, or has fewer blocks than the head takes, and for a
    width of another head.
    """

    def __init__(self, config: models.Config, head: str = "linear", width: int | None = None) -> None:
        super().__init__()
        if width is not None and head != "upernet":
            raise TrainError(f"--head-width is of --head upernet: leave it out with --head {head}")
        self.config = config
        self.trunk: Any = models.make(config)
        if not isinstance(self.trunk, vit.ViT) and not hasattr(self.trunk, "forward_intermediates"):
            raise TrainError(
                f"{type(self.trunk).__name__} has no forward_intermediates, which gives the tokens of its "
                "blocks: give another --model"
            )
        if isinstance(config, models.TimmConfig):
            self._try(config)
        # the trunk's own forward then makes no logits
        for name in CLASSIFIERS:
            if isinstance(getattr(self.trunk, name, None), nn.Module):
                setattr(self.trunk, name, nn.Identity() if name == "head" else None)
        if any(getattr(self.trunk, name, None) is not None for name in CLASS_BLOCKS):
            # processes wait for the gradients of all parameters that learn
            for name, parameter in self.trunk.named_parameters():
                if name.partition(".")[0] in ("cls_token", *CLASS_BLOCKS):
                    parameter.requires_grad_(False)
        dim: Any = config.dim if isinstance(config, vit.ViTConfig) else self.trunk.num_features
        classes = config.classes
        kept: Any = UPerHead(dim, width or dim, classes) if head == "upernet" else LinearHead(dim, classes)
        depth = len(self.blocks)
        if depth < kept.levels:
            raise TrainError(
                f"--head {head} takes the tokens of {kept.levels} blocks, but the model has {depth}: "
                "give --head linear"
            )
        self.levels = [depth * (i + 1) // kept.levels - 1 for i in range(kept.levels)]
        self.head = kept

    @property
    def blocks(self) -> Any:
        return self.trunk.blocks

    @property
    def patch_embed(self) -> nn.Module:
        return self.trunk.patch_embed

    @property
    def norm(self) -> nn.Module | None:
        return getattr(self.trunk, "norm", None)

    @property
    def fc_norm(self) -> nn.Module | None:
        return getattr(self.trunk, "fc_norm", None)

    @property
    def num_prefix_tokens(self) -> int | None:
        return getattr(self.trunk, "num_prefix_tokens", None)

    def no_weight_decay(self) -> set[str]:
        """Those of the trunk."""
        named = getattr(self.trunk, "no_weight_decay", None)
        return {f"trunk.{name}" for name in ("pos_embed", "cls_token", *(named() if named else ()))}

    def forward(self, images: Tensor) -> Tensor:
        logits = self.head([self._map(tokens) for tokens in self._tokens(images)])
        return F.interpolate(logits, images.shape[-2:], mode="bilinear")

    def _tokens(self, images: Tensor) -> Sequence[Tensor]:
        """The patches [B, N, D] that leave the blocks which the head takes."""
        if isinstance(self.trunk, vit.ViT):
            tokens = self.trunk(images, return_tokens=True)[1]
            return [tokens[level + 1][:, self.trunk.num_prefix_tokens :] for level in self.levels]
        return self.trunk.forward_intermediates(
            images, indices=self.levels, output_fmt="NLC", intermediates_only=True
        )

    def _map(self, tokens: Tensor) -> Tensor:
        """[B, N, D] to a map [B, D, rows, columns], after the final norm."""
        for norm in (self.norm, self.fc_norm):
            tokens = tokens if norm is None else norm(tokens)
        side = math.isqrt(tokens.shape[1])
        grid = getattr(self.patch_embed, "grid_size", (side, side))
        return tokens.mT.unflatten(2, tuple(grid))

    @torch.no_grad()
    def _try(self, config: models.TimmConfig) -> None:
        """Raises TrainError for a trunk of timm whose blocks give no tokens [B, N, D], as in pyramids."""
        image = torch.zeros(1, config.channels, config.image_size, config.image_size)
        options: Any = {"indices": [len(self.blocks) - 1], "output_fmt": "NLC", "intermediates_only": True}
        try:
            self.trunk.eval().forward_intermediates(image, **options)
        except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
            raise TrainError(
                f"timm's {config.timm} gives no tokens of its last block ({error}): give another --model, "
                "such as timm:vit_*"
            ) from None
        self.trunk.train()

    def start_from(self, path: Path) -> None:
        """Loads the trunk's weights of a classifier as `vit.load` does; a warning tells what was left out.

        Raises ValueError with the names that are missing, unexpected or of another shape.
        """
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            whole = vit.load(path, models.make(self.config))
        for each in told:
            # of a classifier for other classes, which is left out in any case
            if "it keeps its initial values" not in str(each.message):
                warnings.warn(str(each.message), stacklevel=2)
        weights, kept = whole.state_dict(), self.trunk.state_dict()
        left = [name for name in weights if name not in kept]
        self.trunk.load_state_dict({name: weights[name] for name in kept})
        warnings.warn(
            f"{path}: {', '.join(left) or 'nothing'} left out; the head for pixels is new", stacklevel=2
        )
