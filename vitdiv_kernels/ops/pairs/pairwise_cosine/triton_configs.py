"""Tile sizes of the Triton kernels of pairwise_cosine, by bytes of an element and compute capability major.

benchmarks/tune.py measures them.
"""

from .._tiles import Backward, Forward

FORWARD = {
    (2, 8): Forward(64, 64, 4, 3, "aot"),
    (2, 9): Forward(64, 64, 4, 3, "aot"),
    (2, 10): Forward(64, 64, 4, 3, "aot"),
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
    (2, 8): Backward(64, 64, 64, 0, 4, 3, "aot"),
    (2, 9): Backward(64, 64, 128, 0, 4, 3, "aot"),
    (2, 10): Backward(64, 64, 128, 0, 4, 3, "aot"),
    (4, 8): Backward(32, 32, 32, 0, 4, 2, "aot"),
    (4, 9): Backward(64, 32, 64, 0, 8, 2, "aot"),
    (4, 10): Backward(32, 32, 64, 0, 4, 2, "aot"),
    (8, 8): Backward(32, 32, 32, 0, 4, 2, "aot"),
    (8, 9): Backward(32, 32, 32, 0, 4, 2, "aot"),
    (8, 10): Backward(32, 32, 32, 0, 4, 1, "aot"),
}

# S is made again: two products, the first of them for every `out` columns of dx.
FROM_ROWS = {
    (2, 8): Backward(64, 64, 128, 64, 8, 2, "aot"),
    (2, 9): Backward(64, 64, 128, 64, 8, 2, "aot"),
    (2, 10): Backward(64, 64, 128, 64, 8, 2, "aot"),
    (4, 8): Backward(32, 32, 64, 32, 8, 2, "aot"),
    (4, 9): Backward(64, 32, 128, 32, 8, 2, "aot"),
    (4, 10): Backward(32, 32, 64, 32, 8, 2, "aot"),
    (8, 8): Backward(32, 16, 32, 16, 4, 2, "aot"),
    (8, 9): Backward(32, 16, 32, 16, 4, 2, "aot"),
    (8, 10): Backward(32, 16, 32, 16, 4, 1, "aot"),
}
