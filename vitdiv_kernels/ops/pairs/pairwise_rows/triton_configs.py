"""Tile sizes of the Triton kernels of pairwise_rows, by bytes of an element and compute capability major."""

from .._tiles import Backward, Forward

FORWARD = {
    (2, 8): Forward(64, 64, 4, 3, "aot"),
    (2, 9): Forward(64, 64, 4, 3, "aot"),
    (2, 10): Forward(64, 64, 4, 3, "aot"),
    (4, 8): Forward(64, 16, 8, 2, "aot"),
    (4, 9): Forward(64, 32, 4, 3, "aot"),
    (4, 10): Forward(32, 32, 4, 3, "aot"),
    (8, 8): Forward(32, 16, 4, 2, "aot"),
    (8, 9): Forward(32, 16, 8, 2, "aot"),
    (8, 10): Forward(32, 16, 4, 1, "aot"),
}

# S is made again: two products, the first of them for every `out` columns of dx.
BACKWARD = {
    (2, 8): Backward(64, 64, 256, 32, 8, 2, "aot"),
    (2, 9): Backward(64, 64, 256, 64, 8, 2, "aot"),
    (2, 10): Backward(64, 64, 256, 64, 8, 2, "aot"),
    (4, 8): Backward(32, 32, 64, 32, 8, 2, "aot"),
    (4, 9): Backward(64, 32, 128, 16, 8, 2, "aot"),
    (4, 10): Backward(32, 32, 64, 32, 8, 2, "aot"),
    (8, 8): Backward(32, 16, 32, 16, 4, 2, "aot"),
    (8, 9): Backward(32, 16, 32, 16, 4, 2, "aot"),
    (8, 10): Backward(32, 16, 32, 16, 4, 1, "aot"),
}
