"""How good a model is on images."""

import torch
from torch import nn

from .data import ImageSet
from .parallel import Processes


@torch.no_grad()
def accuracy(
    model: nn.Module,
    data: ImageSet,
    device: str | torch.device = "cpu",
    batch: int = 256,
    processes: Processes = Processes(),  # noqa: B008
) -> float:
    """Share of the images whose class is right, in evaluation mode; the model's mode is restored.

    Several processes count some images each; all must call it, and have the result.
    """
    was_training = model.training
    model.eval()
    right = 0
    for start in range(batch * processes.rank, len(data) + batch * processes.rank, batch * processes.size):
        # a process without images left goes along: sharded weights are gathered by all
        mine = range(start, min(start + batch, len(data)))
        images, labels = data.__getitems__(list(mine) or [0])
        found = (model(images.to(device)).argmax(-1) == labels.to(device)).sum()
        right += int(found) if mine else 0
    model.train(was_training)
    return processes.total(right) / len(data)
