"""Rows of the tables of tile sizes of the Triton kernels of pairs of vectors, which are in triton_configs.py.

Rows of source "aot" were chosen by instruction counts and bytes; no GPU has measured them yet.

float32 has at most 32 rows for compute capability 10: from 64 on Triton takes tcgen05, and chains the three
products of TF32x3 in tensor memory, which gave wrong results on sm_103 (Triton's issue 10821).
"""

from typing import NamedTuple


class Forward(NamedTuple):
    """Tiles of S, rows x rows, from slices of the width."""

    rows: int
    width: int
    warps: int
    stages: int
    source: str


class Backward(NamedTuple):
    """A program holds rows x out of dx and walks the columns of S; width slices S where it is made again."""

    rows: int
    columns: int
    out: int
    width: int
    warps: int
    stages: int
    source: str


def row_for(table, tensor, capability):
    """The row for tensors like this one, of a table by bytes of an element and compute capability major.

    Other capabilities take the row of 8.
    """
    size = tensor.element_size()
    return table.get((size, capability[0]), table[size, 8])
