"""Tiles of the row kernels of the workspace, and its size. Nothing is tuned at run time.

source: "aot" for a row that ahead-of-time compilation showed to be free of spills, "measured on <device>"
once a benchmark made it. Rows are searched in order.
"""

from typing import NamedTuple

import torch

_BITS = {torch.float16: 16, torch.bfloat16: 16, torch.float32: 32, torch.float64: 64}
_ANY = 1 << 30

# Of the maps of a chunk and the copies of its operands, by capability. Source: cost model; README.md counts
# why it is more than the L2 (A100 40 MB, H200 50 MB, B200 126 MB).
WORKSPACE_BYTES = (((10, 0), 128 << 20), ((9, 0), 96 << 20), ((0, 0), 64 << 20))


def workspace_bytes(capability):
    return next(size for first, size in WORKSPACE_BYTES if capability >= first)


class RowsRow(NamedTuple):
    """Tiles of the row kernels: [tile_rows, block] elements."""

    direction: str
    bits: int
    extras: bool  # layer norm or pre-mix, which hold more tiles at a time
    tile_rows: int
    most_keys: int  # _ANY: rows longer than `block` are walked in blocks
    block: int
    tiles: int  # of a program, one after the other: they share its partial sums
    num_warps: int
    num_stages: int
    maxnreg: int | None
    source: str


# 8 to 32 elements a thread; the backward holds about five such tiles at a time, eight with extras. Without
# maxnreg ptxas sometimes spills a little at 128 or 168 registers; rows that have it do not spill with it.
ROWS = (
    RowsRow("forward", 16, False, 16, 64, 64, 8, 2, 1, None, "aot"),
    RowsRow("forward", 16, False, 16, 256, 256, 8, 4, 1, None, "aot"),
    RowsRow("forward", 32, True, 16, 256, 256, 8, 8, 1, 240, "aot"),
    RowsRow("forward", 16, False, 16, 512, 512, 8, 8, 1, None, "aot"),
    RowsRow("forward", 32, True, 16, _ANY, 128, 4, 4, 1, 240, "aot"),
    RowsRow("forward", 16, False, 32, 256, 256, 8, 8, 1, None, "aot"),
    RowsRow("forward", 32, True, 32, _ANY, 64, 4, 8, 1, 255, "aot"),
    RowsRow("forward", 64, True, 16, _ANY, 32, 4, 8, 1, 240, "aot"),
    RowsRow("forward", 64, True, 32, _ANY, 16, 4, 8, 1, 255, "aot"),
    RowsRow("backward", 16, False, 16, 64, 64, 8, 4, 1, None, "aot"),
    RowsRow("backward", 16, False, 16, 256, 256, 8, 8, 1, None, "aot"),
    RowsRow("backward", 16, False, 16, _ANY, 128, 4, 8, 1, 240, "aot"),
    RowsRow("backward", 16, True, 16, _ANY, 64, 4, 8, 1, 255, "aot"),
    RowsRow("backward", 32, False, 16, _ANY, 128, 4, 8, 1, None, "aot"),
    RowsRow("backward", 32, True, 16, _ANY, 64, 4, 8, 1, None, "aot"),
    RowsRow("backward", 16, False, 32, _ANY, 64, 4, 8, 1, 255, "aot"),
    RowsRow("backward", 16, True, 32, _ANY, 32, 4, 8, 1, 255, "aot"),
    RowsRow("backward", 64, False, 16, _ANY, 32, 4, 8, 1, 240, "aot"),
    RowsRow("backward", 32, False, 32, _ANY, 32, 4, 8, 1, 255, "aot"),
    RowsRow("backward", 64, True, 32, _ANY, 16, 4, 8, 1, 255, "aot"),
)


class RowConfig(NamedTuple):
    share: int  # query rows of a tile; a layer norm over heads wants one
    tile_rows: int
    block: int
    one_block: bool
    tiles: int
    split: int  # of the keys of a block, for products over them: where [T, T] is less than one product a warp
    apart: bool  # results are made one after the other, to save registers
    reload: bool  # matrices of the mixes are loaded for each use, to save registers
    num_warps: int
    num_stages: int
    maxnreg: int | None

    def in_blocks(self, most, keys):
        """With rows in one block where `most` keys are enough."""
        # 16: what a tensor-core product takes at least
        block = min(most, max(16, 1 << (keys - 1).bit_length()))
        return self._replace(block=block, one_block=keys <= block, split=min(self.split, block // 16))


def row_config(direction, heads, keys, dtype, extras):
    """The tiles for a call, with or without layer norm or pre-mix: the first row of ROWS that covers it."""
    tile_rows = max(16, 1 << (heads - 1).bit_length())
    for row in ROWS:
        if (
            row.direction == direction
            and _BITS[dtype] <= row.bits
            and extras <= row.extras
            and tile_rows <= row.tile_rows
            and keys <= row.most_keys
        ):
            large = tile_rows > 16
            return RowConfig(
                share=1 if extras else tile_rows // heads,
                tile_rows=tile_rows,
                block=row.block,
                one_block=False,
                tiles=row.tiles,
                split=1 if large and direction == "backward" else row.num_warps,
                apart=large and dtype.itemsize > 4
                if direction == "forward"
                else (large and (extras or dtype != torch.bfloat16)) or (extras and dtype.itemsize > 4),
                reload=extras or large,
                num_warps=row.num_warps,
                num_stages=row.num_stages,
                maxnreg=row.maxnreg,
            ).in_blocks(row.block, keys)
    raise ValueError(f"q must have at most 32 heads for the Triton kernels, got {heads}")
