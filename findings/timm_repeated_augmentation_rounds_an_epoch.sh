#!/usr/bin/env bash
# timm 1.0.31 (torch 2.13.0): an epoch of RepeatAugSampler is rounded down to a multiple of 256 indices once there are 256 images
# or more, so that 511 images give 256, 86 images of them thrice; 255 images give 255. selected_round=0 stops it. The order is
# drawn from the number of the epoch alone: torch.manual_seed changes nothing, and runs of two seeds see the same images.
# Output seen: 255 images: 255 indices, 85 distinct; 511 images: 256 indices, 86 distinct; 511 images, selected_round=0: 511
# indices, 171 distinct; the same order with two seeds: True
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
from timm.data.distributed_sampler import RepeatAugSampler


def epoch(images, **options):
    return list(RepeatAugSampler(range(images), num_replicas=1, rank=0, num_repeats=3, **options))


seen = []
for images, options in ((255, {}), (511, {}), (511, {"selected_round": 0})):
    indices = epoch(images, **options)
    seen.append((len(indices), len(set(indices))))
    print(f"{images} images {options}: {len(indices)} indices, {len(set(indices))} distinct")
orders = []
for seed in (0, 1):
    torch.manual_seed(seed)
    orders.append(epoch(511))
print("the same order with two seeds:", orders[0] == orders[1])
assert seen == [(255, 85), (256, 86), (511, 171)] and orders[0] == orders[1], "the behaviour has changed"
PY
