"""Which tokens are patches, and where: the prefix tokens of each block, the grid, masks."""

import torch
from torch import nn

from .. import _checks
from ._blocks import place_of

# The class token joins after these blocks: in blocks of its own, of timm's CaiT and XCiT.
_CLASS_BLOCKS = "blocks_token_only", "cls_attn_blocks"
# Register tokens of DINOv2 and DINOv3; there is always a class token before them.
_REGISTERS = "num_register_tokens", "n_storage_tokens"


def told_prefix(model):
    """The prefix tokens that a model tells, and where it does; else None."""
    if isinstance(getattr(model, "num_prefix_tokens", None), int):
        return model.num_prefix_tokens, "model.num_prefix_tokens"
    if all(isinstance(getattr(model, name, None), torch.Tensor) for name in ("cls_token", "dist_token")):
        return 2, "model.cls_token and model.dist_token"
    for name in _REGISTERS:
        if isinstance(getattr(model, name, None), int):
            return 1 + getattr(model, name), f"model.{name} and the class token"
    return None, None


def check_prefix(model, given):
    """Raises ValueError for a number of prefix tokens that is none."""
    number = told_prefix(model)[0] if given is None else given
    if number is not None:
        _checks.count("num_prefix_tokens", number)


class Layout:
    """Of one forward pass, from what a `_recorder.Recorder` took.

    Args:
        model: the plain model.
        parts: of the model.
        taken: by the recorder.
        given: the number of prefix tokens that the caller gave, or None.
    """

    def __init__(self, model, parts, taken, given):
        self.model, self.parts = model, parts
        self.given = given
        self.embedded, self.projected = taken.get(("shape", "patch_embed")), taken.get(("shape", "proj"))
        self.masks = [value for key, value in taken.items() if key[0] == "mask"]

    def patches(self, width):
        """How many patches of so many features model.patch_embed made; None where that is not known."""
        shape = self.embedded
        if shape is not None and len(shape) == 3:
            return shape[1]
        if shape is not None and len(shape) == 4 and shape[-1] == width:
            return shape[1] * shape[2]
        if self.projected is not None and len(self.projected) == 4:
            return self.projected[2] * self.projected[3]
        return None

    def grid(self, patches):
        """Rows and columns of the patches: those that were embedded in this pass, else those of the model;
        None where neither tells."""
        shape = self.embedded
        candidates = [
            shape[1:3] if shape is not None and len(shape) == 4 else None,
            self.projected[2:] if self.projected is not None and len(self.projected) == 4 else None,
            getattr(self.parts.patch_embed, "grid_size", None),
        ]
        for sizes in candidates:
            if sizes is not None and len(sizes) == 2 and sizes[0] * sizes[1] == patches:
                return tuple(sizes)
        return None

    def known_grid(self, patches):
        grid = self.grid(patches)
        if grid is None:
            raise ValueError(
                f"the model does not tell the grid of its {patches} patches: give the option grid, "
                "rows and columns"
            )
        return grid

    def prefix(self, block, tokens):
        """The number of prefix tokens among the tokens [B, N, D] that leave a block, -1: that enter block 0.

        Raises ValueError where the model and its tokens tell different numbers.
        """
        if self.given is not None:
            return self.given
        told, where = self.parts.num_prefix_tokens, "parts.num_prefix_tokens"
        patches, n = self.patches(tokens.shape[-1]), tokens.shape[1]
        if told is not None:
            # fewer: patches were merged or dropped
            if patches is None or n - patches == told or n <= patches:
                return told
        else:
            told, where = told_prefix(self.model)
        if patches is None:
            if told is None:
                raise ValueError("the model tells no number of prefix tokens: give num_prefix_tokens")
            return told
        class_token = isinstance(getattr(self.model, "cls_token", None), torch.Tensor)
        if n - patches == told or (told is None and n - patches in (0, int(class_token))):
            return n - patches
        if n == patches and self._class_token_joins_after(block):
            return 0
        if told is not None and n < patches + told and self._drops_patches():
            return told
        tells = "tells no prefix tokens" if told is None else f"has {told} prefix tokens by {where}"
        module = self.parts.blocks[max(0, block)]
        name = f"{place_of(self.model, module)} {'gives' if block >= 0 else 'takes'}"
        raise ValueError(
            f"{name} {n} tokens where model.patch_embed made {patches} patches, but the model {tells}: "
            "give num_prefix_tokens"
        )

    def _class_token_joins_after(self, block):
        if any(getattr(self.model, name, None) is not None for name in _CLASS_BLOCKS):
            return True
        return block < getattr(self.model, "local_up_to_layer", -1)  # ConViT

    def _drops_patches(self):
        drop = getattr(self.model, "patch_drop", None)
        return self.model.training and drop is not None and not isinstance(drop, nn.Identity)

    def check_masks(self, maps):
        """Raises ValueError for padded tokens, and with `maps` for any mask that hides something."""
        for mask, causal, several in self.masks:
            if maps and several:
                raise ValueError(
                    "maps are taken of one batch, but the blocks were called with a list of several tensors"
                )
            if maps and causal:
                raise ValueError("maps are taken without a mask, but the blocks were called with is_causal")
            if mask is None:
                continue
            hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min
            if bool(hidden.all(-2).any()):
                raise ValueError(
                    "tokens are padded (a mask hides them from all queries), and would count as patches: "
                    "give the model images of one number of patches without padding"
                )
            if maps and bool(hidden.any()):
                raise ValueError("maps are taken without a mask, but the blocks were called with attn_mask")
