"""Every CUDA operator once on small tensors, for compute-sanitizer to watch:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python benchmarks/sanitize.py

Inputs are copied from the CPU, so that the device runs kernels of this package only. Results are not looked
at; the tests do that.
"""

import argparse
import itertools

import torch

from vitdiv_kernels import _dispatch

DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64
# B, H, N, M, d: less than a tile, odd widths, more than one tile of rows and of keys
SHAPES = (1, 2, 3, 5, 8), (2, 3, 37, 70, 35), (1, 12, 65, 65, 64)
OPERATORS = torch.ops.vitdiv


class Inputs:
    def __init__(self, device, dtype):
        self.device, self.dtype = device, dtype
        self.accumulation = torch.float64 if dtype == torch.float64 else torch.float32

    def __call__(self, *shape, dtype=None):
        return torch.randn(shape).to(dtype or self.dtype).to(self.device)

    def wide(self, *shape):
        return self(*shape, dtype=self.accumulation)


def pairwise_cosine(inputs, shape):
    items, _, rows, columns, width = shape
    x = inputs(items, rows, width)
    sets = (x, None), (x, inputs(items, columns, width))
    for penalty, (x, y) in itertools.product(("signed", "abs", "square", "relu"), sets):
        options = penalty, False, 1e-8
        sums, saved = OPERATORS.pairwise_cosine_fwd(x, y, *options, True)
        dsums = inputs.wide(*sums.shape)
        OPERATORS.pairwise_cosine_bwd(dsums, x, y, saved, *options, True, y is not None)


def pairwise_rows(inputs, shape):
    items, _, rows, columns, width = shape
    x = inputs(items, max(rows, 2), width)
    for y, scale in itertools.product((None, inputs(items, columns, width)), (10.0, 1e3)):
        logsumexp, saved = OPERATORS.pairwise_logsumexp_fwd(x, y, scale, 1e-8, True)
        drows = inputs.wide(*logsumexp.shape)
        OPERATORS.pairwise_logsumexp_bwd(drows, logsumexp, x, y, saved, scale, 1e-8, True, y is not None)
        OPERATORS.pairwise_nearest(x, y, 1e-8)


def two_gram(inputs, shape):
    items, _, rows, other_width, width = shape
    x = inputs(items, rows, width)
    for y, penalty, normalise in itertools.product(
        (None, inputs(items, rows, other_width)), ("relu_square", "hinge", "product"), (True, False)
    ):
        options = penalty, 0.25, normalise, 1e-8, True, y is not None
        sums, saved = OPERATORS.two_gram_fwd(x, y, *options)
        OPERATORS.two_gram_bwd(inputs.wide(*sums.shape), x, y, saved, *options)


def attn_diversity(inputs, shape):
    b, h, n, m, d = shape
    q, k, q2, k2 = (inputs(b, h, rows, d) for rows in (n, m, n, m))
    for layers in ((q, k, 0.3, None, None, 0.3), (q, k, 0.3, q2, k2, 0.4)):
        heads = h if layers[3] is None else 2 * h
        OPERATORS.attention_gram_fwd(*layers)
        needs = [x is not None for x in (q, k, layers[3], layers[4])]
        OPERATORS.attention_gram_bwd(inputs.wide(b, heads, heads), *layers, needs)


def reattention(inputs, shape):
    b, h, n, m, d = shape
    q, k, v = (inputs(b, h, rows, d) for rows in (n, m, m))
    mix, vector, dout = inputs.wide(h, h), inputs.wide(h), inputs(b, h, n, d)
    coupling = inputs.wide(1, h, h)
    for pre, centred, norm in (
        (None, False, None),
        (None, True, None),
        (mix, False, None),
        (None, False, vector),
    ):
        arguments = q, k, v, 0.3, pre, None, mix, vector, centred, norm, norm, 1e-5
        OPERATORS.reattention_fwd(*arguments, True, centred)
        needs = [True] * 3 + [pre is not None, True, norm is not None]
        OPERATORS.reattention_bwd(dout, coupling if centred else None, *arguments, needs)
    OPERATORS.head_dots(dout, q)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default: cuda")
    device = parser.parse_args().device
    torch.manual_seed(0)
    ran = 0
    for operation in (pairwise_cosine, pairwise_rows, two_gram, attn_diversity, reattention):
        why_not = _dispatch.missing("native", device, operation=operation.__name__)
        if why_not is not None:
            print(f"{operation.__name__}: left out: {why_not}")
            continue
        for dtype, shape in itertools.product(DTYPES, SHAPES):
            operation(Inputs(device, dtype), shape)
            ran += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{ran} cases ran on {device}")


if __name__ == "__main__":
    main()
