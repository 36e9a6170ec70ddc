"""Speed and memory of re-attention: attention whose softmax maps are mixed across heads, and normalised.

eager mixes by einsum, the fastest plain form found; conv2d by a 1x1 Conv2d, as DeepViT was published; sdpa
does not mix, and so bounds what mixing kernels can reach. Batch norm is in training, with running statistics.
--pre-mix yes also mixes the logits (talking heads). --packed yes takes q, k and v as a layer has them: views
of the one [B, N, 3, H, d] that its linear layer wrote, whose gradient is one tensor, too; and joins the
heads of the output, as the next linear layer wants them. Example:

    python benchmarks/bench_reattention.py --providers eager,native --shapes 32x12x197x64 --norm none,batch
"""

from functools import partial

import cli
import torch
from harness import Workload, standard_providers
from torch.nn.functional import batch_norm, conv2d, layer_norm, scaled_dot_product_attention

import vitdiv_kernels

SUITES = {
    "readme": [
        ((32, 12, 197, 64), {}),
        ((32, 12, 197, 32), {}),
        ((32, 12, 197, 64), {"norm": "batch"}),
        ((32, 12, 197, 64), {"norm": "layer"}),
    ],
    "batches": [
        ((b, 12, 197, d), {"norm": norm})
        for b in (1, 4, 32)
        for d in (64, 32)
        for norm in ("none", "batch", "layer")
    ],
    "vit": [
        ((32, 6, 197, 64), {"norm": "batch"}),
        ((32, 12, 197, 32), {"norm": "batch"}),
        ((32, 12, 197, 35), {"norm": "batch"}),
        ((32, 12, 197, 64), {"pre_mix": "yes"}),
        ((8, 12, 577, 64), {"norm": "batch"}),
        ((2, 16, 1025, 64), {}),
        ((2, 16, 1025, 64), {"norm": "batch"}),
        ((1, 12, 4096, 64), {}),
    ],
    "packed": [((32, 12, 197, 64), {"norm": norm, "packed": "yes"}) for norm in ("none", "batch", "layer")],
    "gpu": [
        ((128, 12, 197, 64), {}),
        ((128, 12, 197, 64), {"norm": "batch"}),
        ((128, 12, 197, 64), {"packed": "yes"}),
        ((8, 16, 1025, 64), {}),
        ((8, 16, 1025, 64), {"norm": "batch"}),
        ((128, 12, 197, 64), {"norm": "layer"}),
        ((128, 12, 197, 32), {"norm": "batch"}),
        ((128, 6, 197, 64), {"norm": "batch"}),
        ((32, 12, 577, 64), {"norm": "batch"}),
        ((128, 12, 197, 35), {"norm": "batch"}),
        ((128, 12, 197, 64), {"pre_mix": "yes"}),
        ((1, 12, 4096, 64), {}),
    ],
    "gpu-float16": [((128, 12, 197, 64), {}), ((128, 12, 197, 64), {"norm": "batch"})],
    "small": [((4, 3, 65, 32), {"norm": norm}) for norm in ("none", "batch", "layer")],
    "tiny": [((1, 2, 4, 8), {})],
}


def einsum_mix(maps, weight):
    return torch.einsum("gh,bhij->bgij", weight, maps)


def conv2d_mix(maps, weight):
    return conv2d(maps, weight[:, :, None, None])


def plain(q, k, v, mix, *, pre_mix=None, norm, mix_heads, norm_weight=None, norm_bias=None, **running):
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if pre_mix is not None:
        logits = mix_heads(logits, pre_mix.to(logits.dtype))
    maps = mix_heads(torch.softmax(logits, -1), mix.to(logits.dtype))
    if norm == "batch":
        maps = batch_norm(maps, **running, weight=norm_weight, bias=norm_bias, training=True)
    elif norm == "layer":
        # The published form: heads last, where layer_norm wants them.
        heads_last = maps.permute(0, 2, 3, 1)
        weight, bias = norm_weight.to(maps.dtype), norm_bias.to(maps.dtype)
        maps = layer_norm(heads_last, maps.shape[1:2], weight, bias).permute(0, 3, 1, 2)
    return maps @ v


def of_packed(maker):
    """The same provider of `qkv` [B, N, 3, H, d] in the place of q, k and v; its output is [B, N, H d]."""

    def make():
        operation = maker()

        def packed(qkv, **others):
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
            return operation(q=q, k=k, v=v, **others).transpose(1, 2).flatten(2)

        return packed

    return make


def unmixed(q, k, v, mix, **_):
    """Attention without mixing: what a kernel that mixes is measured against."""
    return scaled_dot_product_attention(q, k, v)


def _products(shape):
    """The large products alone: logits and maps times v; backward the logits again and the gradients."""
    b, h, n, d = shape
    gemm = 2 * b * h * n * n * d
    return {"fwd": 2 * gemm, "bwd": 5 * gemm}


def _flops(shape, norm, pre_mix):
    """Logits, the mix, the product with v. Backward computes the maps again, as an operation does that keeps
    none, and mixes three times: maps, their gradient, the products that give the gradient of the mix."""
    b, h, n, _ = shape
    mix, products = 2 * b * h * h * n * n, _products(shape)
    fwd, bwd = products["fwd"] + mix, products["bwd"] + 3 * mix
    if norm == "batch":
        fwd, bwd = fwd + mix // 2, bwd + mix  # the Gram matrix, symmetric, and the mix with its gradient
    if pre_mix == "yes":
        fwd, bwd = fwd + mix, bwd + 3 * mix
    return {"fwd": fwd, "bwd": bwd}


def workload(shape, norm="none", pre_mix="no", packed="no", dtype="float32"):
    b, heads, n, d = shape

    def inputs(device, dtype):
        # Parameters and statistics stay in float32 beside activations of 16 bits, as the operation has it.
        wide = torch.promote_types(dtype, torch.float32)
        floats = partial(torch.randn, device=device)
        if packed == "yes":
            named = {"qkv": floats(b, n, 3, heads, d).to(dtype)}
        else:
            named = {name: floats(shape).to(dtype) for name in ("q", "k", "v")}
        mixes = ("mix", "pre_mix") if pre_mix == "yes" else ("mix",)
        identity = torch.eye(heads, device=device, dtype=wide)
        named |= {name: identity + 0.1 * floats(heads, heads, dtype=wide) for name in mixes}
        if norm != "none":
            named["norm_weight"] = 1 + 0.1 * floats(heads, dtype=wide)
            named["norm_bias"] = 0.1 * floats(heads, dtype=wide)
        for x in named.values():
            x.requires_grad_()
        if norm == "batch":
            named["running_mean"] = torch.zeros(heads, device=device, dtype=wide)
            named["running_var"] = torch.ones(heads, device=device, dtype=wide)
        return named

    formula = partial(plain, norm=norm, mix_heads=einsum_mix)
    package = partial(vitdiv_kernels.reattention, norm=norm, training=True)
    published = partial(plain, norm=norm, mix_heads=conv2d_mix)
    providers = standard_providers(formula, package) | {
        "conv2d": lambda: published,
        "sdpa": lambda: unmixed,
    }
    if packed == "yes":
        providers = {name: of_packed(maker) for name, maker in providers.items()}
        # what is compiled is the plain formula with its views, as in a model
        providers["compile"] = lambda: torch.compile(providers["eager"](), fullgraph=True, dynamic=False)
    options = {"shapes": "x".join(map(str, shape)), "norm": norm, "pre-mix": pre_mix, "packed": packed}
    return Workload(
        op="reattention",
        variant=f"norm={norm}" + " pre_mix" * (pre_mix == "yes") + " packed" * (packed == "yes"),
        shape=shape,
        arguments=tuple(word for name, value in options.items() for word in (f"--{name}", value)),
        inputs=inputs,
        providers=providers,
        bounds=("sdpa",),
        flops=_flops(shape, norm, pre_mix),
        products=_products(shape),
    )


PROVIDERS = "eager", "compile", "conv2d", "sdpa", "reference", "native", "triton"


def main():
    parser = cli.parser(__doc__, providers=PROVIDERS)
    yes_or_no = "no", "yes"
    options = {"norm": ("none", "batch", "layer"), "pre_mix": yes_or_no, "packed": yes_or_no}
    cli.add_shapes(parser, "BHNd", SUITES, **options)
    args = parser.parse_args()
    make = partial(workload, dtype=args.dtype)
    cli.run(parser, args, cli.workloads(parser, args, make, SUITES, *options))


if __name__ == "__main__":
    main()
