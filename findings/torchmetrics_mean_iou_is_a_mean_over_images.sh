#!/usr/bin/env bash
# torchmetrics 1.9.0 (torch 2.13.0): segmentation.MeanIoU is no mean IoU of a data set, as benchmarks of segmentation report it. It
# takes the IoU of each image and class, and the mean over images: one wrong pixel of a class that the image has not counts as an
# IoU of 0 of a whole image. With per_class=True a class that no image has, nor any prediction, gets -1, which a mean over the
# tensor would take in; without per_class it is left out.
# Output seen: of the data set 0.775 ([0.8, 0.75]); MeanIoU 0.6875, per class [0.875, 0.5, -1.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 torchmetrics==1.9.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torchmetrics.segmentation import MeanIoU

target = torch.tensor([[[0, 0, 0, 0]], [[0, 1, 1, 1]]])  # two images of 1 x 4 pixels; class 2 is nowhere
predicted = torch.tensor([[[0, 0, 0, 1]], [[0, 1, 1, 1]]])


def measured(**options):
    metric = MeanIoU(num_classes=3, input_format="index", **options)
    metric.update(predicted, target)
    return metric.compute().tolist()


both = [((predicted == c) & (target == c)).sum() for c in (0, 1)]
either = [((predicted == c) | (target == c)).sum() for c in (0, 1)]
of_data_set = [round((b / e).item(), 4) for b, e in zip(both, either)]
mean, classes = measured(), measured(per_class=True)
print(f"of the data set {sum(of_data_set) / 2} ({of_data_set}); MeanIoU {mean}, per class {classes}")
assert of_data_set == [0.8, 0.75] and mean == 0.6875 and classes == [0.875, 0.5, -1.0], "the behaviour has changed"
PY
