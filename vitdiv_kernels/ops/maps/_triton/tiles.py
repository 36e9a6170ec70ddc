"""Tiles of the kernels that hold all heads.

Rows of source "aot" were chosen by instruction counts and shared memory; no GPU has measured them yet. Tiles
of up to 8 heads also fit the GPUs with little shared memory, see `shared_memory`.
"""

from typing import NamedTuple

from ..._tables import first_row


class Tile(NamedTuple):
    rows: int  # queries, or keys where a program owns keys
    columns: int  # of a step of its loop
    width: int  # columns of q, k, v or their gradients that are held or written at a time, at most
    hold: bool  # a program's own rows stay on the chip for the whole loop
    reload: bool  # matrices of the mixes are loaded at each step, to save registers
    apart: bool  # a kernel of several results makes one at a time
    warps: int  # at most: a product over heads gives a warp whole heads
    stages: int
    maxnreg: int | None
    source: str


# Wider rows of 16 heads, held for a whole loop, are more than sm_80 has.
MOST_WIDTH = 128
# kernel, bytes of an element, most heads, most width, with layer norm or pre-mix (or, for the gradients of q
# and k, with one of the output): the first row that covers a call. Kernels differ in how much they hold; a
# step that loads the next one's operands early has 2 stages.
# The smallest tile, 16 x 16 of 32 heads, is an eighth of an SM's registers, and kernels hold five and more.
# They spill there, with layer norm or pre-mix at 16 heads already, and in float64 nearly everywhere.
TILES = {
    ("softmax", 2, 8, 64, False): Tile(32, 16, 64, True, False, False, 8, 1, None, "aot"),
    ("softmax", 2, 8, 64, True): Tile(32, 16, 64, True, False, False, 8, 1, None, "aot"),
    ("softmax", 2, 16, 64, False): Tile(32, 16, 64, True, False, False, 8, 2, None, "aot"),
    ("softmax", 2, 16, MOST_WIDTH, False): Tile(16, 16, 64, True, False, False, 8, 1, None, "aot"),
    ("softmax", 2, 8, MOST_WIDTH, True): Tile(16, 16, 64, True, False, False, 8, 1, None, "aot"),
    ("softmax", 4, 8, MOST_WIDTH, True): Tile(16, 16, 32, False, False, False, 8, 1, 255, "aot"),
    ("softmax", 4, 16, MOST_WIDTH, False): Tile(16, 16, 32, False, False, False, 16, 1, None, "aot"),
    ("softmax_gram", 2, 2, 64, True): Tile(16, 16, 64, True, False, False, 8, 1, None, "aot"),
    ("softmax_gram", 2, 8, 64, False): Tile(32, 16, 64, True, False, False, 8, 1, None, "aot"),
    ("softmax_gram", 2, 8, 64, True): Tile(32, 16, 64, True, False, False, 8, 1, 255, "aot"),
    ("softmax_gram", 2, 16, 64, False): Tile(32, 16, 64, True, False, False, 16, 2, None, "aot"),
    ("softmax_gram", 2, 16, MOST_WIDTH, False): Tile(16, 16, 64, True, False, False, 8, 1, 255, "aot"),
    ("softmax_gram", 2, 8, MOST_WIDTH, True): Tile(16, 16, 64, True, False, False, 8, 1, None, "aot"),
    ("softmax_gram", 4, 8, MOST_WIDTH, True): Tile(16, 16, 32, False, False, False, 8, 1, 255, "aot"),
    ("softmax_gram", 4, 16, MOST_WIDTH, False): Tile(16, 16, 16, False, False, False, 8, 1, None, "aot"),
    ("output_sweep", 2, 8, 64, False): Tile(32, 16, 64, True, False, False, 8, 1, None, "aot"),
    ("output_sweep", 2, 8, 64, True): Tile(32, 16, 64, True, False, False, 8, 1, None, "aot"),
    ("output_sweep", 2, 16, 64, False): Tile(16, 16, 64, True, False, False, 8, 2, None, "aot"),
    ("output_sweep", 2, 16, MOST_WIDTH, False): Tile(16, 16, 64, True, False, False, 8, 1, 255, "aot"),
    ("output_sweep", 2, 8, MOST_WIDTH, True): Tile(16, 16, 64, True, False, False, 8, 1, None, "aot"),
    ("output_sweep", 4, 8, MOST_WIDTH, True): Tile(16, 16, 32, False, False, False, 8, 1, None, "aot"),
    ("output_sweep", 4, 16, MOST_WIDTH, False): Tile(16, 16, 16, False, False, False, 8, 1, None, "aot"),
    ("parameter_sweep", 2, 8, 64, False): Tile(16, 16, 64, True, False, False, 8, 1, None, "aot"),
    ("parameter_sweep", 2, 8, 64, True): Tile(16, 16, 64, True, False, False, 8, 1, None, "aot"),
    ("parameter_sweep", 2, 16, 64, False): Tile(16, 16, 64, True, False, False, 8, 2, None, "aot"),
    ("parameter_sweep", 2, 8, MOST_WIDTH, False): Tile(16, 16, 64, True, False, False, 8, 1, 255, "aot"),
    ("parameter_sweep", 2, 16, MOST_WIDTH, False): Tile(16, 16, 64, True, False, False, 8, 1, None, "aot"),
    ("parameter_sweep", 2, 8, MOST_WIDTH, True): Tile(16, 16, 32, True, True, True, 8, 1, 255, "aot"),
    ("parameter_sweep", 4, 8, MOST_WIDTH, True): Tile(16, 16, 32, False, False, True, 8, 1, None, "aot"),
    ("parameter_sweep", 4, 16, MOST_WIDTH, False): Tile(16, 16, 16, False, False, False, 8, 1, None, "aot"),
    ("query_gradient", 2, 8, 64, False): Tile(32, 16, 64, True, False, False, 8, 1, None, "aot"),
    ("query_gradient", 2, 8, 64, True): Tile(16, 16, 64, True, False, False, 8, 1, 255, "aot"),
    ("query_gradient", 2, 16, 64, False): Tile(16, 16, 64, True, False, False, 8, 2, None, "aot"),
    ("query_gradient", 2, 16, 64, True): Tile(16, 16, 32, True, True, True, 8, 1, None, "aot"),
    ("query_gradient", 2, 16, MOST_WIDTH, False): Tile(16, 16, 32, True, False, False, 8, 1, None, "aot"),
    ("query_gradient", 2, 8, MOST_WIDTH, True): Tile(16, 16, 16, False, True, True, 8, 1, 255, "aot"),
    ("query_gradient", 2, 16, MOST_WIDTH, True): Tile(16, 16, 16, False, True, True, 8, 1, None, "aot"),
    ("query_gradient", 4, 8, MOST_WIDTH, True): Tile(16, 16, 32, False, False, True, 8, 1, None, "aot"),
    ("query_gradient", 4, 16, MOST_WIDTH, True): Tile(16, 16, 16, False, False, False, 8, 1, None, "aot"),
    ("key_gradient", 2, 8, 64, False): Tile(32, 16, 64, True, False, False, 8, 1, 255, "aot"),
    ("key_gradient", 2, 8, 64, True): Tile(16, 16, 64, True, False, False, 8, 1, None, "aot"),
    ("key_gradient", 2, 16, 64, False): Tile(16, 16, 64, True, False, False, 8, 1, None, "aot"),
    ("key_gradient", 2, 16, 64, True): Tile(16, 16, 32, True, False, False, 8, 1, None, "aot"),
    ("key_gradient", 2, 16, MOST_WIDTH, False): Tile(16, 16, 16, False, False, False, 8, 1, 255, "aot"),
    ("key_gradient", 2, 8, MOST_WIDTH, True): Tile(16, 16, 16, False, False, False, 8, 1, 255, "aot"),
    ("key_gradient", 2, 16, MOST_WIDTH, True): Tile(16, 16, 16, False, False, False, 16, 1, None, "aot"),
    ("key_gradient", 4, 8, MOST_WIDTH, True): Tile(16, 16, 32, False, False, False, 8, 1, 255, "aot"),
    ("key_gradient", 4, 16, MOST_WIDTH, True): Tile(16, 16, 16, False, False, False, 8, 1, None, "aot"),
    ("value_gradient", 2, 8, 64, False): Tile(32, 16, 64, True, False, False, 8, 1, None, "aot"),
    ("value_gradient", 2, 8, 64, True): Tile(32, 16, 64, True, False, False, 8, 1, None, "aot"),
    ("value_gradient", 2, 16, 64, False): Tile(16, 16, 64, True, False, False, 8, 2, None, "aot"),
    ("value_gradient", 2, 16, MOST_WIDTH, False): Tile(16, 16, 32, True, False, False, 8, 1, None, "aot"),
    ("value_gradient", 2, 8, MOST_WIDTH, True): Tile(16, 16, 64, True, False, False, 8, 1, None, "aot"),
    ("value_gradient", 4, 8, MOST_WIDTH, True): Tile(16, 16, 32, False, False, False, 8, 1, None, "aot"),
    ("value_gradient", 4, 16, MOST_WIDTH, False): Tile(16, 16, 16, False, False, False, 8, 1, None, "aot"),
}


_HEADS_OF_LITTLE_MEMORY = 8


def shared_memory(capability):
    """Bytes of shared memory that a block may take on a GPU of this (major, minor), at least."""
    if capability in ((8, 6), (8, 9)) or capability[0] >= 12:
        return 101376
    return 166912 if capability[0] == 8 else 232448


def most_heads(dtype, extras, capability=(9, 0)):
    """How many heads tiles hold, with or without layer norm or pre-mix; 0 in float64.

    More would spill, or be more than the shared memory of a GPU of this capability.
    """
    most = max(
        (
            heads
            for name, most_bytes, heads, _, with_extras in TILES
            if name == "softmax" and dtype.itemsize <= most_bytes and extras <= with_extras
        ),
        default=0,
    )
    return most if shared_memory(capability) >= 166912 else min(most, _HEADS_OF_LITTLE_MEMORY)


def too_large(heads, width, dtype, extras, capability):
    """Whether no tile holds so many heads of rows of so many numbers."""
    return width > MOST_WIDTH or heads > most_heads(dtype, extras, capability)


# The interpreter's time goes with the number of steps, hardly with their size.
INTERPRETED = Tile(32, 32, 64, True, False, False, 8, 1, None, "interpreter")


def tile(kernel, heads, width, dtype, extras, interpreted):
    """The Tile of a kernel for padded `heads` and rows of `width` numbers."""
    if interpreted:
        return fitted(INTERPRETED, heads, width)
    row = first_row(
        TILES,
        lambda name, most_bytes, most_heads, most_width, with_extras: (
            name == kernel
            and dtype.itemsize <= most_bytes
            and heads <= most_heads
            and width <= most_width
            and extras <= with_extras
        ),
    )
    return fitted(row, heads, width)


def fitted(row, heads, width):
    piece = min(row.width, max(16, 1 << (width - 1).bit_length()))
    return row._replace(width=piece, warps=min(row.warps, heads))
