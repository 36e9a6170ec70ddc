"""What diversity did to a ViT: accuracy, likeness of patches, rank of patches, likeness of heads."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import attention_cosine, pairwise_cosine
from ..attach.monitor import effective_rank
from ..vit.model import ViT


def batches(dataset, size: int = 256):
    for start in range(0, len(dataset), size):
        yield dataset.__getitems__(list(range(start, min(start + size, len(dataset)))))


@torch.no_grad()
def accuracy(model: ViT, dataset, device: str | torch.device = "cpu") -> float:
    """Share of the images whose class is right, in evaluation mode; the model's mode is restored."""
    was_training = model.training
    model.eval()
    right = sum(
        int((model(images.to(device)).argmax(-1) == labels.to(device)).sum())
        for images, labels in batches(dataset)
    )
    model.train(was_training)
    return right / len(dataset)


@torch.no_grad()
def diversity(model: ViT, images: Tensor) -> dict[str, list[float]]:
    """Per block, means over images [B, C, S, S], in evaluation mode.

    `signed_cosine`, `abs_cosine`: between the patches that leave the block; `effective_rank`: of the same
    patches; `head_cosine`: between the softmax maps of the block's heads, before any mixing or normalisation.
    """
    was_training = model.training
    model.eval()
    tokens = model(images, return_tokens=True)[1]
    model.train(was_training)
    result = {"signed_cosine": [], "abs_cosine": [], "effective_rank": [], "head_cosine": []}
    for i in range(model.config.depth):
        patches = tokens[i + 1][:, model.num_prefix_tokens :]
        result["signed_cosine"].append(pairwise_cosine(patches, penalty="signed").item())
        result["abs_cosine"].append(pairwise_cosine(patches, penalty="abs").item())
        result["effective_rank"].append(effective_rank(patches).item())
        heads = attention_cosine(*model.query_key(tokens[i], i))  # [B, H, H]
        count = heads.shape[-1]
        others = heads.sum((-1, -2)) - heads.diagonal(dim1=-2, dim2=-1).sum(-1)
        result["head_cosine"].append((others.mean() / max(1, count * (count - 1))).item())
    return result


@torch.no_grad()
def patch_matrix(model: ViT, image: Tensor) -> Tensor:
    """Cosines [N, N] between the patches of one image [C, S, S] that leave the last block."""
    was_training = model.training
    model.eval()
    last = model(image[None], return_tokens=True)[1][-1]
    model.train(was_training)
    patches = F.normalize(last[0, model.num_prefix_tokens :].float(), dim=-1)
    return patches @ patches.T
