#!/usr/bin/env bash
# vit-pytorch 1.26.14 (torch 2.13.0): CaiT with layer_dropout drops layers at random in each forward pass, without a look at the
# mode: in evaluation, too. So model.eval() gives other logits for the same images from call to call, and a validation draws from
# the global random numbers. Its dropout, an nn.Dropout, follows the mode.
# Output seen: layer_dropout 0.0: 1 different logits in 20 calls; layer_dropout 0.5: 9 different logits in 20 calls
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 vit-pytorch==1.26.14
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch

# torchvision's operators, undeclared where its build is for another torch than this one
library = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms", "roi_align", "qroi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d"):
    for operator in (name, f"_{name}_backward"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor x) -> Tensor")
from vit_pytorch.cait import CaiT

SIZES = dict(image_size=32, patch_size=16, num_classes=3, dim=16, depth=4, cls_depth=1, heads=2, mlp_dim=16)
torch.manual_seed(0)
images, seen = torch.randn(1, 3, 32, 32), {}
for rate in (0.0, 0.5):
    model = CaiT(**SIZES, layer_dropout=rate).eval()
    with torch.no_grad():
        logits = {tuple(model(images)[0].tolist()) for _ in range(20)}
    seen[rate] = len(logits)
    print(f"layer_dropout {rate}: {len(logits)} different logits in 20 calls")
assert seen[0.0] == 1 < seen[0.5], "the behaviour has changed"
PY
