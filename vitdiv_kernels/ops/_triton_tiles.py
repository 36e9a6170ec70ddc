"""Tiles of the kernels that hold all heads, by kernel, padded heads, bytes of an element and width.

`source` says where a row comes from: "aot" rows compile without spills on sm_80, sm_90 and sm_100 and were
chosen by instruction counts and shared memory; no GPU has measured them yet.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    rows: int  # queries, or keys where a program owns keys
    columns: int  # of a step of its loop
    width: int  # columns of q, k, v or their gradients that are held or written at a time
    hold: bool  # a program's own rows stay on the chip for the whole loop
    apart: bool  # a kernel of several results makes one at a time
    warps: int
    stages: int
    source: str


def tile(kernel, heads, width, dtype, extras, capability):
    """The Tile of a kernel; `width` is the widest row that it multiplies."""
    return Tile(
        16,
        16,
        16 if width <= 16 else 32 if width <= 32 else 64,
        True,
        False,
        max(1, min(8, heads)),
        1,
        "draft",
    )
