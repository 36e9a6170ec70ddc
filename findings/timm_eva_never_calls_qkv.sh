#!/usr/bin/env bash
# timm 1.0.31 (torch 2.13.0): the attention of Beit and Eva has attn.qkv, a Linear, as that of VisionTransformer has. Where q and v
# have a bias, the default, it multiplies by the Linear's weight and never calls the Linear: a forward hook on attn.qkv is registered
# without complaint and never runs, so that code which reads q and k by hooks sees nothing. Eva without a bias calls it.
# Output seen: VisionTransformer: hook ran 1 time; Beit: hook ran 0 times; Eva: hook ran 0 times; Eva without bias: hook ran 1 time
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
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

SIZES = dict(img_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=2)
MODELS = {
    "VisionTransformer": lambda: VisionTransformer(**SIZES),
    "Beit": lambda: Beit(**SIZES),
    "Eva": lambda: Eva(**SIZES),
    "Eva without bias": lambda: Eva(**SIZES, qkv_bias=False),
}
seen = {}
for name, make in MODELS.items():
    model, runs = make().eval(), []
    model.blocks[0].attn.qkv.register_forward_hook(lambda module, args, out: runs.append(1))
    model(torch.randn(1, 3, 32, 32))
    seen[name] = len(runs)
    print(f"{name}: hook ran {len(runs)} time{'s' * (len(runs) != 1)}")
expected = {"VisionTransformer": 1, "Beit": 0, "Eva": 0, "Eva without bias": 1}
assert seen == expected, "the behaviour has changed"
PY
