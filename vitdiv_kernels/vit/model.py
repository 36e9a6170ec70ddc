"""A plain vision transformer with timm's names, whose blocks attend or re-attend (arXiv 2103.11886)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import ReAttention
from .configs import ViTConfig


class PatchEmbed(nn.Module):
    """Images [B, C, S, S] to patch tokens [B, N, D]."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_patches = (config.image_size // config.patch) ** 2
        width = config.patch + 2 * config.overlap
        self.proj = nn.Conv2d(config.channels, config.dim, width, stride=config.patch, padding=config.overlap)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention over [B, N, D]."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )  # each [B, H, N, d]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm block; in training a branch is dropped for a whole image with probability `drop_path`."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = drop_path

    def _drop(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        keep = branch.new_empty(branch.shape[0], 1, 1).bernoulli_(1 - self.drop_path)
        return branch * keep / (1 - self.drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._drop(self.attn(self.norm1(x)))
        return x + self._drop(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Images [B, C, S, S] to logits [B, classes]; the head reads the class token.

    With `return_tokens=True` the second result is the list of `depth + 1` token tensors [B, 1 + N, D]: entry
    i enters block i, the last leaves the last block. They are the tensors that the forward pass makes anyway,
    not copies.

    Example:
        >>> model = ViT(ViTConfig(image_size=32, dim=48, depth=2, heads=4, classes=10))
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    num_prefix_tokens = 1

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        dim, depth = config.dim, config.depth
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.patch_embed.num_patches, dim))
        self.blocks = nn.ModuleList(
            Block(
                dim,
                ReAttention(dim, config.heads, qkv_bias=True)
                if i in config.reattention
                else Attention(dim, config.heads),
                config.mlp_ratio,
                config.drop_path * i / max(1, depth - 1),
            )
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, config.classes)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.pos_embed, std=self.config.pos_std)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.zeros_(self.get_parameter("patch_embed.proj.bias"))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, return_tokens: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        tokens = [x]
        for block in self.blocks:
            x = block(x)
            tokens.append(x)
        logits = self.head(self.norm(x[:, 0]))
        return (logits, tokens) if return_tokens else logits
