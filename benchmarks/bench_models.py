"""A training step of whole models: DeepViT-16B, and CaiT-XXS24 of timm. Example:

python benchmarks/bench_models.py --threads 2

A step is forward and backward, in training mode with cross entropy, of B images of 224 x 224 pixels. Provider
"ours" has the fused attention, "eager" the published one, which holds the maps of all heads, and "plain", in
the place of both, scaled_dot_product_attention: the same model without a mix. The weights are the same.
"""

import copy
from dataclasses import replace
from functools import cache

import cli
import torch
from harness import Unavailable, Workload
from torch import nn
from torch.nn import functional as F

from vitdiv_kernels.nn import TalkingHeadsAttention
from vitdiv_kernels.vit import CONFIGS, ViT

MODELS = "deepvit_16b", "cait_xxs24"
SUITES = {
    "readme": [((batch, 224), {"model": model}) for model in MODELS for batch in (2, 16)],
    "tiny": [((1, 32), {"model": "deepvit_16b"})],
}


class Projections(nn.Module):
    """What follows an attention's layers, from one that has them."""

    def __init__(self, attn):
        super().__init__()
        self.layers, self.num_heads = dict(attn.named_children()), attn.num_heads

    def forward(self, x):
        q, k, v = self.layers["qkv"](x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.layers["proj"](self.attend(q, k, v).transpose(1, 2).flatten(2))


class Plain(Projections):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class Published(Projections):
    """Zhou et al. 2021: the mix is a 1 x 1 convolution of the maps."""

    def attend(self, q, k, v):
        maps = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return self.layers["var_norm"](self.layers["reatten_matrix"](maps)) @ v


def fused_talking_heads(attn):
    fused = TalkingHeadsAttention(attn.qkv.in_features, attn.num_heads, qkv_bias=True)
    for name in ("qkv", "proj_l", "proj_w", "proj"):
        setattr(fused, name, getattr(attn, name))
    return fused


def cait():
    try:
        from timm.models.cait import cait_xxs24_224
    # RuntimeError: a torchvision that was made for another torch
    except (ImportError, RuntimeError) as error:
        raise Unavailable(f"timm cannot be imported: {error}") from error
    return cait_xxs24_224


def make(model, size):
    """The model, and what makes the attention of each provider of its own."""
    if model == "deepvit_16b":
        return ViT(replace(CONFIGS[model], image_size=size)), {
            "ours": None,
            "eager": Published,
            "plain": Plain,
        }
    return cait()(img_size=size), {"ours": fused_talking_heads, "eager": None, "plain": Plain}


def with_attention(model, change):
    """A copy that has the model's own parameters, its attention layers replaced."""
    copied = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for block in copied.blocks if change else ():
        block.attn = change(block.attn)
    return copied.train()


def workload(shape, model="deepvit_16b"):
    batch, size = shape

    @cache
    def models(device):
        torch.manual_seed(0)
        made, attentions = make(model, size)
        made = made.to(device)
        return made, {name: with_attention(made, change) for name, change in attentions.items()}

    def inputs(device, dtype):
        made, _ = models(device)
        images = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
        return {"images": images} | {name.replace(".", "_"): p for name, p in made.named_parameters()}

    def provider(name):
        def step(images, **parameters):
            labels = torch.arange(batch, device=images.device)
            return F.cross_entropy(models(images.device)[1][name](images), labels)

        def made():
            if model == "cait_xxs24":
                cait()
            return step

        return made

    depth, dim, ratio = (16, 384, 3) if model == "deepvit_16b" else (24, 192, 4)
    tokens = (size // 16) ** 2
    flops = 2 * batch * tokens * depth * ((4 + 2 * ratio) * dim * dim + 2 * tokens * dim)
    return Workload(
        op="models",
        variant=model,
        shape=shape,
        arguments=("--shapes", "x".join(map(str, shape)), "--model", model),
        inputs=inputs,
        providers={name: provider(name) for name in ("eager", "ours", "plain")},
        flops={"fwd": flops, "bwd": 2 * flops},
        bounds=("plain",),
    )


def main():
    parser = cli.parser(__doc__, providers=("eager", "ours", "plain"))
    cli.add_shapes(parser, "BS", SUITES, model=MODELS)
    parser.set_defaults(modes=["fwd+bwd"], repeats=7)
    args = parser.parse_args()
    cli.run(parser, args, cli.workloads(parser, args, workload, SUITES, "model"))


if __name__ == "__main__":
    main()
