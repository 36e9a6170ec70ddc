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


class FromSigns(NamedTuple):
    """A program holds rows x out of dx and walks the columns of S."""

    rows: int
    columns: int
    out: int
    warps: int
    stages: int
    source: str


class Gradient(NamedTuple):
    """A program makes rows x out of dx from weights [rows, inner] and vectors [inner, out] at a time."""

    rows: int
    out: int
    inner: int
    warps: int
    stages: int
    maxnreg: int | None
    source: str


# By bytes of an element and compute capability major: the products of weights with vectors.
GRADIENT = {
    (2, 8): Gradient(128, 128, 32, 8, 3, None, "aot"),
    (2, 9): Gradient(256, 128, 32, 8, 3, None, "aot"),
    (2, 10): Gradient(128, 128, 64, 8, 3, None, "aot"),
    (4, 8): Gradient(64, 64, 32, 8, 2, None, "aot"),
    (4, 9): Gradient(128, 64, 32, 8, 2, None, "aot"),
    (4, 10): Gradient(32, 64, 32, 4, 2, None, "aot"),
    (8, 8): Gradient(32, 32, 16, 4, 2, None, "aot"),
    (8, 9): Gradient(32, 32, 16, 4, 2, None, "aot"),
    (8, 10): Gradient(32, 32, 16, 4, 1, None, "aot"),
}


# Of 16 bits, where larger tiles would be fewer programs than a GPU has multiprocessors for.
FEW_PROGRAMS = 264  # twice those of an H200: of one set of vectors half of the tiles are made
FEW_FORWARD = Forward(64, 64, 4, 3, "aot")
FEW_GRADIENT = Gradient(64, 64, 32, 4, 3, None, "aot")


def row_for(table, tensor, capability):
    """The row for tensors like this one, of a table by bytes of an element and compute capability major.

    Other capabilities take the row of 8.
    """
    size = tensor.element_size()
    return table.get((size, capability[0]), table[size, 8])


def forward_row(table, x, columns, capability):
    """The row of FORWARD for x [items, N, D] beside `columns` vectors."""
    row = row_for(table, x, capability)
    few = _programs(x, columns, row.rows, row.rows) < FEW_PROGRAMS
    return FEW_FORWARD if few and row.rows > FEW_FORWARD.rows else row


def gradient_row(x, capability):
    """The row of GRADIENT for the gradient of x [items, N, D]."""
    row = row_for(GRADIENT, x, capability)
    few = _programs(x, x.shape[2], row.rows, row.out) < FEW_PROGRAMS
    return FEW_GRADIENT if few and x.element_size() == 2 else row


def _programs(x, columns, rows_of_tile, columns_of_tile):
    return x.shape[0] * -(-x.shape[1] // rows_of_tile) * -(-columns // columns_of_tile)
