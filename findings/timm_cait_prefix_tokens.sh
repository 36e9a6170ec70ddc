#!/usr/bin/env bash
# timm 1.0.31 (torch 2.13.0): a CaiT says num_prefix_tokens = 1, as a ViT does, but what leaves its blocks are patches alone; the
# class token joins in the class-attention blocks after them. Code that drops num_prefix_tokens from the tokens of a block, which
# is right for VisionTransformer, drops a patch. (XCiT is alike.) forward_intermediates knows: it gives 196 for both.
# Output seen: VisionTransformer: prefix 1, patches 196, tokens of a block 197; Cait: prefix 1, patches 196, tokens of a block 196
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 timm==1.0.31
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch

# torchvision's operators, undeclared where its build is for another torch than this one
library = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms", "roi_align", "qroi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d"):
    for operator in (name, f"_{name}_backward"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor x) -> Tensor")
from timm.models.cait import Cait
from timm.models.vision_transformer import VisionTransformer

seen = {}
for kind in (VisionTransformer, Cait):
    model = kind(img_size=224, patch_size=16, embed_dim=24, depth=1, num_heads=2)
    tokens = []
    model.blocks[0].register_forward_hook(lambda module, args, out: tokens.append(out.shape[1]))
    model(torch.randn(1, 3, 224, 224))
    seen[kind.__name__] = model.num_prefix_tokens, model.patch_embed.num_patches, tokens[0]
    prefix, patches, number = seen[kind.__name__]
    print(f"{kind.__name__}: prefix {prefix}, patches {patches}, tokens of a block {number}")
assert seen == {"VisionTransformer": (1, 196, 197), "Cait": (1, 196, 196)}, "the behaviour has changed"
PY
