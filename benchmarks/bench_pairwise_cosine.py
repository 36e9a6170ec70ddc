"""Speed and memory of pairwise_cosine: the mean penalty on the cosines of all pairs of different patches.

The closed form of the signed and the square penalty is a provider where it is cheaper. Example:

    python benchmarks/bench_pairwise_cosine.py --providers eager,native --shapes 64x196x384 --penalty abs
"""

from functools import partial

import cli
import torch
from harness import Unavailable, Workload, standard_providers
from torch.nn.functional import normalize

import vitdiv_kernels

PENALTIES = {"abs": torch.abs, "square": torch.square, "relu": torch.relu, "signed": lambda s: s}
SUITES = {
    "readme": [((64, 196, 384), {}), ((16, 1024, 768), {})],
    "vit": [
        *(((64, 196, 384), {"penalty": penalty}) for penalty in PENALTIES),
        ((32, 197, 768), {}),
        ((16, 577, 768), {}),
        ((8, 1025, 1024), {}),
        ((1, 4096, 1024), {}),
    ],
    "gpu": [
        ((256, 196, 384), {}),
        ((256, 196, 384), {"penalty": "square"}),
        ((64, 1024, 768), {}),
        ((8, 4096, 1024), {}),
        ((64, 1024, 384), {"penalty": "square"}),
        ((256, 196, 384), {"penalty": "signed"}),
    ],
    "gpu-float16": [((256, 196, 384), {})],
    "small": [((8, 65, 192), {"penalty": penalty}) for penalty in PENALTIES],
    "tiny": [((1, 4, 8), {})],
}


def plain(x, *, penalty):
    n = x.shape[-2]
    unit = normalize(x, dim=-1, eps=1e-8)
    values = PENALTIES[penalty](unit @ unit.mT)
    others = values.sum((-2, -1)) - values.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (others / (n * (n - 1))).mean()


def closed_signed(x):
    n = x.shape[-2]
    unit = normalize(x, dim=-1, eps=1e-8)
    others = unit.sum(-2).square().sum(-1) - unit.square().sum((-2, -1))
    return (others / (n * (n - 1))).mean()


def closed_square(x):
    n = x.shape[-2]
    unit = normalize(x, dim=-1, eps=1e-8)
    others = (unit.mT @ unit).square().sum((-2, -1)) - unit.square().sum(-1).square().sum(-1)
    return (others / (n * (n - 1))).mean()


def _closed(shape, penalty):
    _, n, d = shape
    if penalty == "signed":
        return closed_signed
    if penalty != "square":
        raise Unavailable(f"penalty {penalty} has no closed form")
    if d >= n:
        raise Unavailable("it is cheaper than the pairs only where D < N")
    return closed_square


def _flops(shape, penalty):
    """Half of the N x N products, S being symmetric; backward (W + Wᵀ) X̂. Or the closed form's, if fewer."""
    b, n, d = shape
    if penalty == "signed":
        return {"fwd": 4 * b * n * d, "bwd": 4 * b * n * d}
    inner = n * n * d if penalty != "square" or n <= d else n * d * d
    return {"fwd": b * inner, "bwd": 2 * b * inner}


def workload(shape, penalty="abs"):
    def inputs(device, dtype):
        # Patches of one image have much in common; it also keeps the signed mean away from zero.
        x = torch.randn(shape, device=device) + 0.5
        return {"x": x.to(dtype).requires_grad_()}

    return Workload(
        op="pairwise_cosine",
        variant=penalty,
        shape=shape,
        arguments=("--shapes", "x".join(map(str, shape)), "--penalty", penalty),
        inputs=inputs,
        providers=standard_providers(
            partial(plain, penalty=penalty), partial(vitdiv_kernels.pairwise_cosine, penalty=penalty)
        )
        | {"closed": lambda: _closed(shape, penalty)},
        flops=_flops(shape, penalty),
    )


def main():
    parser = cli.parser(__doc__, providers=("eager", "compile", "closed", "reference", "native", "triton"))
    cli.add_shapes(parser, "BND", SUITES, penalty=tuple(PENALTIES))
    args = parser.parse_args()
    cli.run(parser, args, cli.workloads(parser, args, workload, SUITES, "penalty"))


if __name__ == "__main__":
    main()
