"""Every operator of both kernel families on small tensors, for compute-sanitizer to watch:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/sanitize.py

Inputs are copied from the CPU, so that the device runs kernels of this package only. Results are not looked
at; the tests do that. Each case is named as it begins. Those of Triton are fewer, as each is compiled first.
"""

import argparse
import itertools

import torch

from vitdiv_kernels import _dispatch

# Of native; Triton takes those of TRITON_DTYPES, and the last two of SHAPES.
DTYPES = torch.bfloat16, torch.float32, torch.float16, torch.float64
# B, H, N, M, d: less than a tile, odd widths, more than one tile of rows and of keys
SHAPES = (1, 2, 3, 5, 8), (2, 3, 37, 70, 35), (1, 12, 65, 65, 64)
TRITON_DTYPES = torch.bfloat16, torch.float32


class Inputs:
    """Of one case: its tensors, and the operators that it calls."""

    def __init__(self, backend, device, dtype):
        self.device, self.dtype, self.native = device, dtype, backend == "native"
        self.operators = getattr(torch.ops, "vitdiv" if self.native else "vitdiv_triton")
        self.accumulation = torch.float64 if dtype == torch.float64 else torch.float32

    def __call__(self, *shape, dtype=None):
        return torch.randn(shape).to(dtype or self.dtype).to(self.device)

    def variants(self, *values):
        """All combinations; for Triton the first and the last."""
        combined = list(itertools.product(*values))
        return combined if self.native else combined[:: max(1, len(combined) - 1)]

    def wide(self, *shape):
        return self(*shape, dtype=self.accumulation)


def pairwise_cosine(inputs, shape):
    items, _, rows, columns, width = shape
    x = inputs(items, rows, width)
    sets = (x, None), (x, inputs(items, columns, width))
    for penalty, (x, y) in inputs.variants(("signed", "square", "relu", "abs"), sets):
        options = penalty, False, 1e-8
        sums, saved = inputs.operators.pairwise_cosine_fwd(x, y, *options, True)
        dsums = inputs.wide(*sums.shape)
        inputs.operators.pairwise_cosine_bwd(dsums, x, y, saved, *options, True, y is not None)


def pairwise_rows(inputs, shape):
    items, _, rows, columns, width = shape
    x = inputs(items, max(rows, 2), width)
    for y, scale in inputs.variants((None, inputs(items, columns, width)), (10.0, 1e3)):
        logsumexp, saved = inputs.operators.pairwise_logsumexp_fwd(x, y, scale, 1e-8, True)
        drows = inputs.wide(*logsumexp.shape)
        inputs.operators.pairwise_logsumexp_bwd(
            drows, logsumexp, x, y, saved, scale, 1e-8, True, y is not None
        )
        inputs.operators.pairwise_nearest(x, y, 1e-8)


def two_gram(inputs, shape):
    items, _, rows, other_width, width = shape
    x = inputs(items, rows, width)
    for y, penalty, normalise in inputs.variants(
        (None, inputs(items, rows, other_width)), ("relu_square", "hinge", "product"), (True, False)
    ):
        options = penalty, 0.25, normalise, 1e-8, True, y is not None
        sums, saved = inputs.operators.two_gram_fwd(x, y, *options)
        inputs.operators.two_gram_bwd(inputs.wide(*sums.shape), x, y, saved, *options)


def attention_gram(inputs, shape):
    b, h, n, m, d = shape
    q, k, q2, k2 = (inputs(b, h, rows, d) for rows in (n, m, n, m))
    for layers in ((q, k, 0.3, None, None, 0.3), (q, k, 0.3, q2, k2, 0.4)):
        heads = h if layers[3] is None else 2 * h
        inputs.operators.attention_gram_fwd(*layers)
        needs = [x is not None for x in (q, k, layers[3], layers[4])]
        inputs.operators.attention_gram_bwd(inputs.wide(b, heads, heads), *layers, needs)


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
        inputs.operators.reattention_fwd(*arguments, True, centred)
        needs = [True] * 3 + [pre is not None, True, norm is not None]
        inputs.operators.reattention_bwd(dout, coupling if centred else None, *arguments, needs)
    inputs.operators.head_dots(dout, q)


RUN = tuple(globals()[operation] for operation in _dispatch.OPERATIONS)


def cases(backends):
    """(backend, operation, dtype, shape), such that the first few have each operation of each backend."""
    for shape, dtype in itertools.product(reversed(SHAPES), DTYPES):
        for backend, operation in itertools.product(backends, RUN):
            if backend == "native" or (dtype in TRITON_DTYPES and shape != SHAPES[0]):
                yield backend, operation, dtype, shape


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default: cuda")
    device = parser.parse_args().device
    torch.manual_seed(0)
    torch.ones(8, device=device).add_(1).sum().item()  # what the tool cannot watch ends here
    print("the device works", flush=True)
    absent = {}
    for backend, operation in itertools.product(("native", "triton"), RUN):
        why_not = _dispatch.missing(backend, device, operation=operation.__name__)
        if why_not is not None:
            absent[backend, operation] = why_not
            print(f"{operation.__name__} of {backend}: left out: {why_not}")
    chosen = [case for case in cases(("native", "triton")) if case[:2] not in absent]
    for number, (backend, operation, dtype, shape) in enumerate(chosen, 1):
        what = f"{backend} {operation.__name__} {str(dtype).removeprefix('torch.')} {shape}"
        print(f"case {number} of {len(chosen)}: {what}", flush=True)
        operation(Inputs(backend, device, dtype), shape)
        if device == "cuda":
            torch.cuda.synchronize()
    print(f"{len(chosen)} cases ran on {device}")


if __name__ == "__main__":
    main()
