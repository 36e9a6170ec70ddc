"""Speed and memory of losses that have a closed form, against their plain formulas with all pairs. Example:

python benchmarks/bench_losses.py --loss patch_contrast,signed_cosine --shapes 64x196x384
python benchmarks/bench_losses.py --loss weight_soft_orthogonality --shapes 36x384x384
"""

import cli
import torch
from harness import Unavailable, Workload
from torch.nn.functional import normalize

from vitdiv_kernels import losses

PATCHES, WEIGHTS = (64, 196, 384), (36, 384, 384)


def unit(x):
    return normalize(x, dim=-1, eps=1e-8)


def signed_cosine(x):
    n, unit_x = x.shape[-2], unit(x)
    s = unit_x @ unit_x.mT
    others = s.sum((-2, -1)) - s.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (others / (n * (n - 1))).mean()


def patch_contrast(x, y):
    s = unit(x) @ unit(y).mT
    own = s.diagonal(dim1=-2, dim2=-1)
    others = (s.sum(-1) - own) / (x.shape[-2] - 1)
    return -(own.exp() / (own.exp() + others.exp())).log().mean()


def weight_soft_orthogonality(*weights):
    """The published loop: one matrix after another."""
    total = 0
    for w in weights:
        identity = torch.eye(len(w), device=w.device, dtype=w.dtype)
        total = total + torch.norm(w @ w.mT - identity) ** 2
    return total


def gram_anchoring(x, y):
    x, y = unit(x), unit(y)
    return (x @ x.mT - y @ y.mT).square().mean()


def linear_cka(x, y):
    x, y = x - x.mean(-2, keepdim=True), y - y.mean(-2, keepdim=True)
    k, m = x @ x.mT, y @ y.mT
    inner = (k * m).sum((-2, -1))
    return (inner / (k.square().sum((-2, -1)) * m.square().sum((-2, -1))).sqrt()).mean()


def _pairs(shape):
    b, n, d = shape
    return 2 * b * n * d


# of each: the plain formula, the package's function, how many tensors it takes, multiply-adds of the closed
# form, forward, as operations
LOSSES = {
    "patch_contrast": (patch_contrast, losses.patch_contrast, 2, lambda shape: 3 * _pairs(shape)),
    "signed_cosine": (
        signed_cosine,
        lambda x: losses.pairwise_cosine(x, penalty="signed"),
        1,
        lambda shape: 2 * _pairs(shape),
    ),
    "weight_soft_orthogonality": (
        weight_soft_orthogonality,
        lambda *weights: losses.weight_soft_orthogonality(weights),
        None,  # a tensor for each matrix
        lambda shape: _pairs(shape) * min(shape[1:]),
    ),
    "gram_anchoring": (gram_anchoring, losses.gram_anchoring, 2, lambda shape: 3 * _pairs(shape) * shape[2]),
    "linear_cka": (linear_cka, losses.linear_cka, 2, lambda shape: 3 * _pairs(shape) * shape[2]),
}
SUITES = {
    "issue": [
        (PATCHES, {"loss": "signed_cosine"}),
        (PATCHES, {"loss": "patch_contrast"}),
        (WEIGHTS, {"loss": "weight_soft_orthogonality"}),
    ],
    "dense": [
        ((1, 4096, 384), {"loss": "gram_anchoring"}),
        ((1, 4096, 384), {"loss": "linear_cka"}),
    ],
    "tiny": [((1, 4, 3), {"loss": loss}) for loss in LOSSES],
}


def workload(shape, loss="patch_contrast"):
    plain, package, tensors, operations = LOSSES[loss]
    if loss in ("gram_anchoring", "linear_cka") and shape[2] >= shape[1]:
        raise SystemExit(f"{loss} has a closed form only where D < N, got {'x'.join(map(str, shape))}")

    def inputs(device, dtype):
        if tensors is None:
            made = torch.randn(shape, device=device).div(shape[2] ** 0.5).unbind()
        else:
            # Patches of one image have much in common, and so have two layers.
            shared = torch.randn(shape, device=device) + 0.5
            made = [shared + torch.randn(shape, device=device) for _ in range(tensors)]
        return {f"x{i}": x.to(dtype, copy=True).requires_grad_() for i, x in enumerate(made)}

    def in_order(function):
        return lambda **inputs: function(*inputs.values())

    def compiled():
        if tensors is None:
            raise Unavailable("it would unroll the loop over all matrices, for minutes")
        return torch.compile(in_order(plain), fullgraph=True, dynamic=False)

    flops = operations(shape)
    return Workload(
        op="losses",
        variant=loss,
        shape=shape,
        arguments=("--shapes", "x".join(map(str, shape)), "--loss", loss),
        inputs=inputs,
        providers={
            "eager": lambda: in_order(plain),
            "compile": compiled,
            "ours": lambda: in_order(package),
        },
        flops={"fwd": flops, "bwd": 2 * flops},
    )


def main():
    parser = cli.parser(__doc__, providers=("eager", "compile", "ours"))
    cli.add_shapes(parser, "BND", SUITES, loss=tuple(LOSSES))
    args = parser.parse_args()
    cli.run(parser, args, cli.workloads(parser, args, workload, SUITES, "loss"))


if __name__ == "__main__":
    main()
