"""The loss of one training step as the papers' released loops compute it, written from their formulas.

Sources: github.com/VITA-Group/Diverse-ViT (engine.py, reg.py, mix.py), ChengyueGongR/PatchVisionTransformer
(deit/engine.py, deit/models.py), zhoudaquan/dvit_repo (train.py, loss/cross_entropy.py),
facebookresearch/deit (engine.py). Models are made of timm-like blocks; nothing of the package is called.
"""

import torch
import torch.nn.functional as F


def forward(model, images):
    """The output of patch_embed, the tokens that enter the first block, those that leave the last, and the
    maps of all blocks as their attention uses them."""
    embedded = model.patch_embed(images)
    first = torch.cat([model.cls_token.expand(len(images), -1, -1), embedded], 1) + model.pos_embed
    x, maps = first, []
    for block in model.blocks:
        out, used = attention(block.attn, block.norm1(x))
        x = x + out
        x = x + block.mlp(block.norm2(x))
        maps.append(used)
    return embedded, first, x, maps


def attention(attn, x):
    b, n, width = x.shape
    heads = attn.num_heads
    qkv = attn.qkv(x).reshape(b, n, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    maps = (qkv[0] @ qkv[1].transpose(-2, -1)) * (width // heads) ** -0.5
    if hasattr(attn, "proj_l"):
        maps = attn.proj_l(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    maps = maps.softmax(-1)
    if hasattr(attn, "proj_w"):
        maps = attn.proj_w(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    if hasattr(attn, "reatten_matrix"):
        maps = attn.var_norm(attn.reatten_matrix(maps))
    return attn.proj((maps @ qkv[2]).transpose(1, 2).reshape(b, n, width)), maps


def soft_cross_entropy(logits, targets):
    return (-targets * F.log_softmax(logits, -1)).sum(-1).mean()


def mixed_labels(labels, classes, share, smoothing, like):
    """Labels of a batch mixed with itself in reverse order, as timm and Diverse-ViT smooth them."""
    off = smoothing / classes
    rows = torch.full((len(labels), classes), off, dtype=like.dtype)
    rows[range(len(labels)), labels] = 1 - smoothing + off
    return rows * share + rows.flip(0) * (1 - share)


def deit(model, images, targets):
    tokens = forward(model, images)[2]
    return soft_cross_entropy(model.head(model.norm(tokens)[:, 0]), targets)


def deepvit(model, images, targets, pairs):
    """SoftTargetCrossEntropyCosReg with n_comn = pairs."""
    _, _, tokens, maps = forward(model, images)
    cosines = sum(F.cosine_similarity(maps[i], maps[i + 1], dim=1) for i in range(pairs))
    task = soft_cross_entropy(model.head(model.norm(tokens)[:, 0]), targets)
    return task + 0.1 * cosines.mean() / pairs


def diverse_vit(model, images, labels, share, shares, generator):
    """run_deit_small_diverse.sh, of images that are mixed already: share of the image, shares of patches."""
    _, first, last, maps = forward(model, images)
    outputs = model.head(model.norm(last))
    tokens, classes = outputs.shape[1:]
    loss = soft_cross_entropy(outputs[:, 0], mixed_labels(labels, classes, share, 0.1, outputs))
    for p in range(1, tokens):
        targets = mixed_labels(labels, classes, shares[p - 1], 0.1, outputs)
        loss = loss + soft_cross_entropy(outputs[:, p], targets)
    loss = loss / tokens

    def unit(x):
        return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-8)

    h1, hl = unit(first[:, 1:]), unit(last[:, 1:])
    loss = loss + 0.5 * (hl @ hl.transpose(1, 2)).mean()
    cosines = h1 @ hl.transpose(1, 2)
    own = cosines.diagonal(dim1=1, dim2=2)
    others = ((cosines.sum(2) - own) / (own.shape[1] - 1)).exp()
    loss = loss + 0.5 * -(own.exp() / (own.exp() + others)).log().mean()
    heads = unit(maps[0].flatten(2))
    loss = loss + 1e-4 * (heads @ heads.transpose(1, 2)).mean()
    orthogonality = 0
    for block in model.blocks:
        for weight in block.attn.qkv.weight.chunk(3):
            gram = weight @ weight.T
            largest = eigenvalue(gram, generator)
            eye = torch.eye(len(gram), dtype=gram.dtype)
            smallest = eigenvalue(gram - eye * largest, generator) + largest
            orthogonality = orthogonality + (largest - smallest).square().mean()
    return loss + 5e-4 * orthogonality


def eigenvalue(matrix, generator):
    start = torch.rand(len(matrix), 1, generator=generator, dtype=matrix.dtype)
    once = matrix @ start
    return (matrix @ once).T @ once / (once.T @ once)


def gong(model, images, targets, box, order):
    """engine.py, of images [B, C, S, S] and soft labels that CutMix has made; box [rows, rows] of patches."""
    size, patch = len(box), images.shape[-1] // len(box)
    cut = images.reshape(*images.shape[:2], size, patch, size, patch)
    mask = box.reshape(1, 1, size, 1, size, 1)
    mixed = (cut * mask + cut[order] * (1 - mask)).reshape(images.shape)
    share = box.sum() / size**2
    embedded, _, tokens, _ = forward(model, mixed)
    normed = model.norm(tokens)
    labels = targets * share + targets[order] * (1 - share)
    task = -labels * (1e-8 + model.head(normed[:, 0]).softmax(-1)).log()
    patches = normed[:, 1:].transpose(1, 2).reshape(len(images), -1, size, size)
    regions = 0
    for area, own in ((box, targets), (1 - box, targets[order])):
        means = (patches * area).mean((2, 3)) * area.numel() / (area.sum() + 1e-4)
        log_p = (1e-8 + model.patch_head(means).softmax(-1)).log()
        regions = regions + area.mean() * F.kl_div(log_p, own, reduction="batchmean")
    near = F.avg_pool2d(patches, 7, 1, 3) - patches / 49
    near = near * 49 / 48
    far = (patches.mean((2, 3), keepdim=True) - patches / size**2) * size**2 / (size**2 - 1)
    context = embedded.detach()
    logits = [(context * x.flatten(2).transpose(1, 2)).sum(-1) for x in (patches, far, near)]
    contrast = -(torch.stack(logits, -1).softmax(-1)[..., 0] + 1e-8).log().mean()
    return task.sum(-1).mean() + regions + contrast
