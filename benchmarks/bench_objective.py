"""What the losses of Chen et al. 2022 (Diverse-ViT), or the monitor, add to a training step. Example:

python benchmarks/bench_objective.py --threads 2

A step is forward and backward of a DeiT-S in training mode with cross entropy: B images of S x S pixels,
width D. The losses are those of the published recipe ("recipe"), or every loss of the paper, each at its
default layers ("every"). Provider "ours" takes them with `DiversityObjective`, "eager" with the published
formulas, which hold all pairs and all maps, and "plain" takes none: what losses cost is a row's time less
that of "plain". With "monitor" there are no losses: "ours" measures 8 of the images in each step, which is to
be divided by the steps between two measurements, 50 unless told otherwise.
"""

from dataclasses import replace
from functools import cache

import cli
import torch
from bench_losses import unit
from harness import Workload
from torch.nn import functional as F

from vitdiv_kernels import CollapseMonitor, DiversityObjective, losses
from vitdiv_kernels.attach.presets import PRESETS
from vitdiv_kernels.attach.terms import LOSSES, Term
from vitdiv_kernels.vit import CONFIGS, ViT

CHEN = (
    "pairwise_cosine", "patch_cross_cosine", "patch_contrast", "patch_mhs", "patch_mgd",
    "patch_soft_orthogonality", "patch_condition_orthogonality", "patch_mixing",
    "attention_diversity", "head_cross_cosine", "head_contrast", "head_mhs", "head_mgd",
    "head_soft_orthogonality", "head_condition_orthogonality",
    "weight_mhs", "weight_mgd", "weight_soft_orthogonality", "weight_condition_orthogonality",
)  # fmt: skip


def cosines(x, y=None):
    return unit(x) @ unit(x if y is None else y).mT


def off_diagonal(s):
    return s[..., ~torch.eye(s.shape[-1], dtype=torch.bool)]


def contrast(s):
    own = s.diagonal(dim1=-2, dim2=-1)
    others = (s.sum(-1) - own) / (s.shape[-1] - 1)
    return -(own.exp() / (own.exp() + others.exp())).log().mean()


def separation(s):
    return -(2 - 2 * off_diagonal(s)).amin(-1)


def determinant(s):
    kernel = (2 * s.double() - 2).exp() + 1e-6 * torch.eye(s.shape[-1])
    return -2 * torch.linalg.cholesky(kernel).diagonal(dim1=-2, dim2=-1).log().sum(-1).float()


def orthogonality(gram):
    return (gram - torch.eye(gram.shape[-1])).square().sum((-2, -1))


def condition(gram, start):
    def quotient(matrix, v):
        v = (matrix @ v).squeeze(-1)
        return (v * (matrix @ v.unsqueeze(-1)).squeeze(-1)).sum(-1) / (v.square().sum(-1) + 1e-6)

    largest = quotient(gram, start[0].unsqueeze(-1))
    shifted = gram - largest[..., None, None] * torch.eye(gram.shape[-1])
    return (quotient(shifted, start[1].unsqueeze(-1))).square()


def maps(q, k):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).flatten(2)


def one_by_one(measure):
    """The published loop over weight matrices."""
    return lambda weights: sum(measure(w) for each in weights for w in each)


def mean_cosine(x, y=None, *, penalty="abs", include_self=False):
    s = cosines(x, y)
    s = off_diagonal(s) if y is None and not include_self else s
    return s.mean() if penalty == "signed" else s.abs().mean()


PLAIN = {
    "pairwise_cosine": mean_cosine,
    "patch_cross_cosine": mean_cosine,
    "patch_contrast": lambda x, y: contrast(cosines(x, y)),
    "patch_mhs": lambda x: separation(cosines(x)).mean(),
    "patch_mgd": lambda x: determinant(cosines(x)).mean(),
    "patch_soft_orthogonality": lambda x: orthogonality(cosines(x)).mean(),
    "patch_condition_orthogonality": lambda x, *, start: condition(cosines(x), start).mean(),
    "patch_mixing": losses.patch_mixing,
    "attention_diversity": lambda q, k: cosines(maps(q, k)).mean(),
    "head_cross_cosine": lambda q, k, q2, k2: cosines(maps(q, k), maps(q2, k2)).abs().mean(),
    "head_contrast": lambda q, k, q2, k2: contrast(cosines(maps(q, k), maps(q2, k2))),
    "head_mhs": lambda q, k: separation(cosines(maps(q, k))).mean(),
    "head_mgd": lambda q, k: determinant(cosines(maps(q, k))).mean(),
    "head_soft_orthogonality": lambda q, k: orthogonality(maps(q, k) @ maps(q, k).mT).mean(),
    "head_condition_orthogonality": lambda q, k, *, start: condition(
        maps(q, k) @ maps(q, k).mT, start
    ).mean(),
    "weight_mhs": one_by_one(lambda w: separation(cosines(w))),
    "weight_mgd": one_by_one(lambda w: determinant(cosines(w))),
    "weight_soft_orthogonality": one_by_one(lambda w: orthogonality(w @ w.mT)),
    "weight_condition_orthogonality": lambda weights, *, start: one_by_one(
        lambda w: condition(w @ w.mT, start)
    )(weights),
}


class PlainTerm(Term):
    @property
    def function(self):
        return PLAIN[self.loss]


def terms(which, starts, kind):
    """The recipe's terms, or one of each loss with a weight that leaves the gradients finite."""
    chosen = (
        PRESETS["diverse_vit_deit_small"].values()
        if which == "recipe"
        else [Term(name, 1e-3) for name in CHEN]
    )
    made = {}
    for term in chosen:
        options = dict(term.options)
        if "condition" in term.loss:
            options["start"] = starts[LOSSES[term.loss][0]]
        made[term.loss] = kind(term.loss, term.weight, term.layers, options)
    return made


WHICH = "recipe", "every", "monitor"
SUITES = {
    "readme": [((16, 224, 384), {"losses": which}) for which in WHICH],
    "tiny": [((2, 32, 24), {"losses": which}) for which in WHICH],
}


def workload(shape, losses="recipe"):
    batch, size, dim = shape
    config = replace(CONFIGS["deit_small"], image_size=size, dim=dim)

    @cache
    def step_of(device):
        """The model, and a step for each provider: all have one model."""
        torch.manual_seed(0)
        model = ViT(config).to(device).train()
        labels = torch.randint(config.classes, (batch,), device=device)
        patches = (size // config.patch) ** 2
        sizes = {"patches": patches, "heads": config.heads, "weights": dim}
        starts = {name: torch.rand(2, n, device=device) for name, n in sizes.items()}
        shares = torch.ones(patches, device=device)

        def step(objective, monitor=None):
            def run(images, **parameters):
                if monitor:
                    monitor.measure(images)
                with torch.enable_grad():  # the objective records nothing of a forward pass without
                    if objective is None:
                        return F.cross_entropy(model(images), labels)
                    with objective.attach(model):
                        loss = F.cross_entropy(model(images), labels)
                        return loss + objective(mixing=(labels, labels.roll(1), shares))[0]

            return run

        if losses == "monitor":
            return model, {"ours": step(None, CollapseMonitor(model)), "plain": step(None)}
        return model, {
            "eager": step(DiversityObjective(terms(losses, starts, PlainTerm))),
            "ours": step(DiversityObjective(terms(losses, starts, Term))),
            "plain": step(None),
        }

    def inputs(device, dtype):
        model, _ = step_of(device)
        images = torch.randn(batch, config.channels, size, size, device=device, dtype=dtype)
        return {"images": images} | {name.replace(".", "_"): p for name, p in model.named_parameters()}

    def provider(name):
        def run(images, **parameters):
            return step_of(images.device)[1][name](images, **parameters)

        return lambda: run

    names = ("ours", "plain") if losses == "monitor" else ("eager", "ours", "plain")
    tokens = (size // config.patch) ** 2 + 1
    products = 12 * dim * dim + 2 * tokens * dim  # a token's multiply-adds in a block
    flops = 2 * batch * tokens * config.depth * products
    return Workload(
        op="objective",
        variant=losses,
        shape=shape,
        arguments=("--shapes", "x".join(map(str, shape)), "--losses", losses),
        inputs=inputs,
        providers={name: provider(name) for name in names},
        flops={"fwd": flops, "bwd": 2 * flops},
        bounds=("plain",),
    )


def main():
    parser = cli.parser(__doc__, providers=("eager", "ours", "plain"))
    cli.add_shapes(parser, "BSD", SUITES, losses=WHICH)
    parser.set_defaults(modes=["fwd+bwd"], repeats=7)
    args = parser.parse_args()
    cli.run(parser, args, cli.workloads(parser, args, workload, SUITES, "losses"))


if __name__ == "__main__":
    main()
