"""Tiles of the row kernels of the workspace."""

from typing import NamedTuple

import torch

from ..._tables import ANY, first_row


class RowTile(NamedTuple):
    block: int  # keys of a tile; longer rows are walked in blocks
    tiles: int  # of a program, one after the other: they share its partial sums
    warps: int
    stages: int
    maxnreg: int | None
    source: str


# 8 to 32 elements a thread; the backward holds about five such tiles at a time, eight with extras. Without
# maxnreg ptxas sometimes spills a little at 128 or 168 registers; rows that have it do not spill with it.
# Direction, most bytes of an element, with layer norm or pre-mix (which hold more tiles at a time), most rows
# of a tile, most keys.
ROWS = {
    ("forward", 2, False, 16, 64): RowTile(64, 8, 2, 1, None, "aot"),
    ("forward", 2, False, 16, 256): RowTile(256, 8, 4, 1, 128, "aot"),
    ("forward", 4, True, 16, 256): RowTile(256, 8, 8, 1, 240, "aot"),
    ("forward", 2, False, 16, 512): RowTile(512, 8, 8, 1, None, "aot"),
    ("forward", 4, True, 16, ANY): RowTile(128, 4, 4, 1, 240, "aot"),
    ("forward", 2, False, 32, 256): RowTile(256, 8, 8, 1, None, "aot"),
    ("forward", 4, True, 32, ANY): RowTile(64, 4, 8, 1, 255, "aot"),
    ("forward", 8, True, 16, ANY): RowTile(32, 4, 8, 1, 240, "aot"),
    ("forward", 8, True, 32, ANY): RowTile(16, 4, 8, 1, 255, "aot"),
    ("backward", 2, False, 16, 64): RowTile(64, 8, 4, 1, None, "aot"),
    ("backward", 2, False, 16, 256): RowTile(256, 8, 4, 1, 255, "aot"),
    ("backward", 2, False, 16, ANY): RowTile(128, 4, 8, 1, 240, "aot"),
    ("backward", 2, True, 16, ANY): RowTile(64, 4, 8, 1, 255, "aot"),
    ("backward", 4, False, 16, ANY): RowTile(128, 4, 8, 1, 240, "aot"),
    ("backward", 4, True, 16, ANY): RowTile(64, 4, 8, 1, None, "aot"),
    ("backward", 2, False, 32, ANY): RowTile(32, 4, 8, 1, 255, "aot"),
    ("backward", 2, True, 32, ANY): RowTile(32, 4, 8, 1, 255, "aot"),
    ("backward", 8, False, 16, ANY): RowTile(32, 4, 8, 1, 240, "aot"),
    ("backward", 4, False, 32, ANY): RowTile(32, 4, 8, 1, 255, "aot"),
    ("backward", 8, True, 32, ANY): RowTile(16, 4, 8, 1, 255, "aot"),
}


class RowConfig(NamedTuple):
    share: int  # query rows of a tile; a layer norm over heads wants one
    tile_rows: int
    block: int
    one_block: bool
    tiles: int
    split: int  # of the keys of a block, for products over them: where [T, T] is less than one product a warp
    apart: bool  # results are made one after the other, to save registers
    reload: bool  # matrices of the mixes are loaded for each use, to save registers
    warps: int
    stages: int
    maxnreg: int | None

    def in_blocks(self, most, keys):
        """With rows in one block where `most` keys are enough."""
        # 16: what a tensor-core product takes at least
        block = min(most, max(16, 1 << (keys - 1).bit_length()))
        return self._replace(block=block, one_block=keys <= block, split=min(self.split, block // 16))


def row_config(direction, heads, keys, dtype, extras):
    """The tiles for a call, with or without layer norm or pre-mix."""
    tile_rows = max(16, 1 << (heads - 1).bit_length())
    row = first_row(
        ROWS,
        lambda of, most_bytes, with_extras, most_rows, most_keys: (
            of == direction
            and dtype.itemsize <= most_bytes
            and extras <= with_extras
            and tile_rows <= most_rows
            and keys <= most_keys
        ),
    )
    if row is None:
        raise ValueError(f"q must have at most 32 heads for the Triton kernels, got {heads}")
    large = tile_rows > 16
    if direction == "forward":
        apart = large and dtype.itemsize > 4
    else:
        apart = (large and (extras or dtype != torch.bfloat16)) or (extras and dtype.itemsize > 4)
    return RowConfig(
        share=1 if extras else tile_rows // heads,
        tile_rows=tile_rows,
        block=row.block,
        one_block=False,
        tiles=row.tiles,
        split=1 if large and direction == "backward" else row.warps,
        apart=apart,
        reload=extras or large,
        warps=row.warps,
        stages=row.stages,
        maxnreg=row.maxnreg,
    ).in_blocks(row.block, keys)
