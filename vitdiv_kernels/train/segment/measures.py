"""Intersection over union, from a confusion matrix."""

import torch
from torch import Tensor

from .augment import IGNORED


def confusion(truth: Tensor, found: Tensor, classes: int) -> Tensor:
    """Counts [classes, classes], int64: row t, column f is the number of pixels of class t found to be f.

    truth and found are integer tensors of one shape; pixels that are `IGNORED` in truth do not count.
    """
    known = truth != IGNORED
    pairs = truth[known].long() * classes + found[known].long()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def iou(counts: Tensor) -> Tensor:
    """Of each class, float64: what truth and prediction share, over what either has; nan where both have
    none of it. counts: [..., classes, classes]."""
    counts = counts.double()
    both = counts.diagonal(dim1=-2, dim2=-1)
    return both / (counts.sum(-1) + counts.sum(-2) - both)


def mean_iou(counts: Tensor) -> float:
    """Over the classes that truth or prediction have."""
    return float(iou(counts).nanmean())


def pixel_accuracy(counts: Tensor) -> float:
    """Share of the pixels whose class is right."""
    return float(counts.diagonal().sum() / counts.sum().clamp_min(1))
