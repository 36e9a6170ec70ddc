"""Tile sizes of the Triton kernels of two_gram, by bytes of an element and compute capability major."""

from .._tiles import Forward

FORWARD = {
    (2, 8): Forward(128, 32, 8, 3, "aot"),
    (2, 9): Forward(128, 64, 8, 2, "aot"),
    (2, 10): Forward(64, 64, 4, 3, "aot"),
    (4, 8): Forward(64, 16, 8, 2, "aot"),
    (4, 9): Forward(64, 32, 4, 3, "aot"),
    (4, 10): Forward(32, 32, 4, 3, "aot"),
    (8, 8): Forward(32, 16, 4, 2, "aot"),
    (8, 9): Forward(32, 16, 8, 2, "aot"),
    (8, 10): Forward(32, 16, 8, 1, "aot"),
}

# The weights of the gradient. With the rows of FORWARD these spilled.
WEIGHTS = {
    (2, 8): Forward(64, 64, 4, 3, "aot"),
    (2, 9): Forward(64, 64, 4, 3, "aot"),
    (2, 10): Forward(64, 64, 8, 3, "aot"),
    (4, 8): Forward(32, 16, 4, 2, "aot"),
    (4, 9): Forward(64, 32, 4, 3, "aot"),
    (4, 10): Forward(32, 32, 4, 3, "aot"),
    (8, 8): Forward(32, 16, 4, 2, "aot"),
    (8, 9): Forward(32, 16, 8, 2, "aot"),
    (8, 10): Forward(32, 16, 8, 1, "aot"),
}
