"""Speed and memory of the similarity of attention heads: the Gram matrix of the softmax maps and its uses.

--function gram is attention_gram, diversity is attention_diversity (signed), cosine is attention_cosine of
two layers. Example:

    python benchmarks/bench_attention_gram.py --providers eager,native --shapes 32x12x197x64 --function gram
"""

import cli
import torch
from harness import Workload, standard_providers
from torch.nn.functional import normalize

import vitdiv_kernels

SUITES = {
    "readme": [((32, 12, 197, 64), {})],
    "vit": [
        ((32, 6, 197, 64), {}),
        ((32, 12, 197, 32), {}),
        ((32, 12, 197, 64), {"function": "diversity"}),
        ((32, 12, 197, 64), {"function": "cosine"}),
        ((8, 12, 577, 64), {}),
        ((2, 16, 1025, 64), {}),
        ((1, 12, 4096, 64), {}),
    ],
    "gpu": [
        ((128, 12, 197, 64), {}),
        ((8, 16, 1025, 64), {}),
        ((128, 12, 197, 64), {"function": "cosine"}),
        ((128, 6, 197, 64), {}),
        ((1, 12, 4096, 64), {}),
    ],
    "gpu-float16": [((128, 12, 197, 64), {})],
    "small": [((4, 3, 65, 32), {"function": function}) for function in ("gram", "diversity", "cosine")],
    "tiny": [((1, 2, 4, 8), {})],
}


def _maps(q, k):
    """Softmax maps of all heads, flattened: [B, H, N N]."""
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1).flatten(2)


def plain_gram(q, k):
    maps = _maps(q, k)
    return maps @ maps.mT


def plain_diversity(q, k):
    unit = normalize(_maps(q, k), dim=-1)
    return (unit @ unit.mT).mean()


def plain_cosine(q, k, q2, k2):
    return normalize(_maps(q, k), dim=-1) @ normalize(_maps(q2, k2), dim=-1).mT


# The formula and the package's function of the same arguments.
FUNCTIONS = {
    "gram": (plain_gram, vitdiv_kernels.attention_gram),
    "diversity": (plain_diversity, vitdiv_kernels.attention_diversity),
    "cosine": (plain_cosine, vitdiv_kernels.attention_cosine),
}


def _flops(shape, function):
    """Logits; the products of pairs of maps, symmetric within a layer. Backward computes the logits again, as
    an operation does that keeps no map, then one head mix and the gradients of q and k."""
    b, h, n, d = shape
    layers = 2 if function == "cosine" else 1
    gemm, mix = 2 * b * h * n * n * d, 2 * b * h * h * n * n
    pairs = mix if function == "cosine" else mix // 2
    return {"fwd": layers * gemm + pairs, "bwd": layers * (3 * gemm + mix)}


def workload(shape, function="gram"):
    def inputs(device, dtype):
        names = ("q", "k", "q2", "k2") if function == "cosine" else ("q", "k")
        return {name: torch.randn(shape, device=device).to(dtype).requires_grad_() for name in names}

    return Workload(
        op="attention_gram",
        variant=function,
        shape=shape,
        arguments=("--shapes", "x".join(map(str, shape)), "--function", function),
        inputs=inputs,
        providers=standard_providers(*FUNCTIONS[function]),
        flops=_flops(shape, function),
    )


def main():
    parser = cli.parser(__doc__, providers=("eager", "compile", "reference", "native", "triton"))
    cli.add_shapes(parser, "BHNd", SUITES, function=tuple(FUNCTIONS))
    args = parser.parse_args()
    cli.run(parser, args, cli.workloads(parser, args, workload, SUITES, "function"))


if __name__ == "__main__":
    main()
