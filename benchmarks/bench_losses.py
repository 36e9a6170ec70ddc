"""Speed and memory of losses, in closed form or by tiles, against their plain formulas. Example:

python benchmarks/bench_losses.py --loss patch_contrast,signed_cosine --shapes 64x196x384
python benchmarks/bench_losses.py --loss weight_soft_orthogonality --shapes 36x384x384
"""

from collections.abc import Callable
from dataclasses import dataclass

import cli
import torch
from harness import Unavailable, Workload
from torch.nn.functional import normalize

from vitdiv_kernels import losses

PATCHES, WEIGHTS, DENSE, WIDE = (64, 196, 384), (36, 384, 384), (16, 1024, 384), (16, 1024, 768)


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


def koleo(x):
    x = unit(x)
    own = torch.eye(x.shape[-2], dtype=torch.bool, device=x.device)
    nearest = (x @ x.mT).masked_fill(own, -2).argmax(-1)
    distance = (x - x.take_along_dim(nearest.unsqueeze(-1), -2)).norm(dim=-1)
    return -(distance + 1e-8).log().mean()


def info_nce(x, y):
    logits = 10 * (unit(x) @ unit(y).mT)
    return (logits.logsumexp(-1) - logits.diagonal(dim1=-2, dim2=-1)).mean()


@dataclass(frozen=True)
class Loss:
    plain: Callable
    package: Callable
    tensors: int | None  # how many it takes; None: one for each matrix
    # multiply-adds of the best known algorithm, forward and backward, in units of B N D
    forward: Callable[[int, int], float]
    backward: Callable[[int, int], float]
    constant: int = 0  # the last of the tensors have no gradient


LOSSES = {
    "patch_contrast": Loss(patch_contrast, losses.patch_contrast, 2, lambda n, d: 3, lambda n, d: 6),
    "signed_cosine": Loss(
        signed_cosine,
        lambda x: losses.pairwise_cosine(x, penalty="signed"),
        1,
        lambda n, d: 2,
        lambda n, d: 4,
    ),
    "weight_soft_orthogonality": Loss(
        weight_soft_orthogonality,
        lambda *weights: losses.weight_soft_orthogonality(weights),
        None,
        lambda n, d: min(n, d) / 2,
        lambda n, d: min(n, d),
    ),
    "gram_anchoring": Loss(gram_anchoring, losses.gram_anchoring, 2, lambda n, d: n, lambda n, d: n, 1),
    "gram_anchoring_both": Loss(gram_anchoring, losses.gram_anchoring, 2, lambda n, d: n, lambda n, d: 2 * n),
    "linear_cka": Loss(
        linear_cka, losses.linear_cka, 2, lambda n, d: 3 * min(n, d), lambda n, d: 6 * min(n, d)
    ),
    "koleo": Loss(koleo, losses.koleo, 1, lambda n, d: n / 2, lambda n, d: 2),
    "info_nce": Loss(info_nce, losses.info_nce, 2, lambda n, d: n, lambda n, d: 2 * n),
}
SUITES = {
    "readme": [
        (PATCHES, {"loss": "signed_cosine"}),
        (PATCHES, {"loss": "patch_contrast"}),
        (WEIGHTS, {"loss": "weight_soft_orthogonality"}),
        (WIDE, {"loss": "gram_anchoring"}),
        (WIDE, {"loss": "gram_anchoring_both"}),
        (DENSE, {"loss": "koleo"}),
        (DENSE, {"loss": "info_nce"}),
    ],
    "dense": [
        ((1, 4096, 384), {"loss": "gram_anchoring"}),
        ((1, 4096, 384), {"loss": "linear_cka"}),
    ],
    "tiny": [((1, 4, 3), {"loss": loss}) for loss in LOSSES],
}


def workload(shape, loss="patch_contrast"):
    terms = LOSSES[loss]

    def inputs(device, dtype):
        if terms.tensors is None:
            made = torch.randn(shape, device=device).div(shape[2] ** 0.5).unbind()
        else:
            # Patches of one image have much in common, and so have two layers.
            shared = torch.randn(shape, device=device) + 0.5
            made = [shared + torch.randn(shape, device=device) for _ in range(terms.tensors)]
        wanted = len(made) - terms.constant
        return {f"x{i}": x.to(dtype, copy=True).requires_grad_(i < wanted) for i, x in enumerate(made)}

    def in_order(function):
        return lambda **inputs: function(*inputs.values())

    def compiled():
        if terms.tensors is None:
            raise Unavailable("it would unroll the loop over all matrices, for minutes")
        return torch.compile(in_order(terms.plain), fullgraph=True, dynamic=False)

    b, n, d = shape
    return Workload(
        op="losses",
        variant=loss,
        shape=shape,
        arguments=("--shapes", "x".join(map(str, shape)), "--loss", loss),
        inputs=inputs,
        providers={
            "eager": lambda: in_order(terms.plain),
            "compile": compiled,
            "ours": lambda: in_order(terms.package),
        },
        flops={
            "fwd": int(2 * b * n * d * terms.forward(n, d)),
            "bwd": int(2 * b * n * d * terms.backward(n, d)),
        },
    )


def main():
    parser = cli.parser(__doc__, providers=("eager", "compile", "ours"))
    cli.add_shapes(parser, "BND", SUITES, loss=tuple(LOSSES))
    args = parser.parse_args()
    cli.run(parser, args, cli.workloads(parser, args, workload, SUITES, "loss"))


if __name__ == "__main__":
    main()
