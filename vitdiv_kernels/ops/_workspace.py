"""A workspace of constant size for what Triton kernels make of all pairs: which part of a call it holds."""

from typing import NamedTuple

import triton

# By capability: of the GPUs of data centres, and of others. Source: cost model, which counts in
# docs/kernels/reattention.md why it is more than the L2 (A100 40 MB, H200 50 MB, B200 126 MB).
WORKSPACE_BYTES = (
    ((12, 0), 128 << 20), ((9, 0), 256 << 20), ((8, 1), 128 << 20), ((8, 0), 256 << 20), ((0, 0), 64 << 20)
)  # fmt: skip

# Rows of the maps start at multiples of this many elements: 16-byte loads and stores for any number of keys.
_KEYS_MULTIPLE = 16


def workspace_bytes(capability):
    return next(size for first, size in WORKSPACE_BYTES if capability >= first)


class Plan(NamedTuple):
    """Chunks: `images` at a time with all their rows, or one image and `rows` of its rows at a time."""

    images: int
    rows: int


class Chunk(NamedTuple):
    """Images first ... last, query rows top ... bottom."""

    first: int
    last: int
    top: int
    bottom: int


def plan(images, heads, queries, keys, itemsize, maps, limit):
    """The largest chunks whose maps take at most `limit` bytes, all of about the same size.

    `maps` sets of maps. Where not even one image fits, its rows are shared out so that they do, but never
    less than 16 at a time.
    """
    row_bytes = maps * heads * padded(keys) * itemsize
    if row_bytes * queries <= limit:
        most = limit // max(row_bytes * queries, 1)
        return Plan(triton.cdiv(images, triton.cdiv(images, most)) if images else 1, queries)
    affordable = max(limit // row_bytes // 16, 1) * 16
    even = triton.cdiv(queries, triton.cdiv(queries, affordable))
    return Plan(1, min(queries, _round_up(even, 16)))


def chunks(size, images, queries):
    for first in range(0, images, size.images):
        for top in range(0, queries, size.rows):
            yield Chunk(first, min(first + size.images, images), top, min(top + size.rows, queries))


def padded(keys):
    """Elements from one row of the maps to the next."""
    return _round_up(keys, _KEYS_MULTIPLE)


def _round_up(n, multiple):
    return (n + multiple - 1) // multiple * multiple
