"""Tile sizes of the Triton kernels of pairwise_cosine, by bytes of an element and compute capability major.

benchmarks/tune.py measures them.
"""

from .._tiles import Forward, FromSigns

FORWARD = {
    (2, 8): Forward(128, 32, 8, 3, "aot"),
    (2, 9): Forward(128, 64, 8, 2, "aot"),
    (2, 10): Forward(128, 64, 8, 2, "aot"),
    (4, 8): Forward(64, 16, 8, 2, "aot"),
    (4, 9): Forward(64, 32, 4, 3, "aot"),
    (4, 10): Forward(32, 32, 4, 3, "aot"),
    (8, 8): Forward(32, 16, 4, 2, "aot"),
    (8, 9): Forward(32, 16, 4, 2, "aot"),
    (8, 10): Forward(32, 16, 4, 1, "aot"),
}

# From the signs of S that the forward kept: one product. columns divide rows, and rows those of the forward's
# tiles, which wrote the upper triangle tile by tile; all are multiples of the 32 bits of a word.
FROM_SIGNS = {
    (2, 8): FromSigns(64, 64, 64, 4, 3, "aot"),
    (2, 9): FromSigns(64, 64, 128, 4, 3, "aot"),
    (2, 10): FromSigns(64, 64, 128, 4, 3, "aot"),
    (4, 8): FromSigns(32, 32, 32, 4, 2, "aot"),
    (4, 9): FromSigns(64, 32, 64, 8, 2, "aot"),
    (4, 10): FromSigns(32, 32, 64, 4, 2, "aot"),
    (8, 8): FromSigns(32, 32, 32, 4, 2, "aot"),
    (8, 9): FromSigns(32, 32, 32, 4, 2, "aot"),
    (8, 10): FromSigns(32, 32, 32, 4, 1, "aot"),
}
