"""A plain vision transformer with timm's names, whose blocks attend or re-attend (arXiv 2103.11886)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import ReAttention


@dataclass(frozen=True)
class ViTConfig:
    """The shape of a ViT.

    `overlap` widens each patch by so many pixels on every side; `reattention` lists the blocks that
    re-attend. Raises ValueError for sizes that do not fit together.

    Example:
        >>> ViTConfig(depth=24, reattention=range(12, 24)).patch
        16
    """

    image_size: int = 224
    channels: int = 3
    patch: int = 16
    overlap: int = 0
    dim: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    classes: int = 1000
    drop_path: float = 0.0
    pos_std: float = 0.02
    reattention: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.image_size % self.patch:
            raise ValueError(f"image_size must be a multiple of patch ({self.patch}), got {self.image_size}")
        if self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads ({self.heads}), got {self.dim}")
        unknown = [i for i in self.reattention if not 0 <= i < self.depth]
        if unknown:
            raise ValueError(f"reattention must list blocks from 0 to {self.depth - 1}, got {unknown}")


_DIGITS24 = dict(
    image_size=8,
    channels=1,
    patch=2,
    overlap=1,
    dim=48,
    depth=24,
    heads=4,
    mlp_ratio=2.0,
    classes=10,
    pos_std=0.2,
)

CONFIGS = {
    "digits24": ViTConfig(**_DIGITS24),
    "digits24_reattention": ViTConfig(**_DIGITS24, reattention=range(24)),
    "deit_tiny": ViTConfig(dim=192, heads=3),
    "deit_small": ViTConfig(),
    "deit_base": ViTConfig(dim=768, heads=12),
    "deepvit_16b": ViTConfig(depth=16, heads=12, mlp_ratio=3.0, reattention=range(16)),
    "deepvit_24b": ViTConfig(depth=24, heads=12, mlp_ratio=3.0, reattention=range(24)),
    "deepvit_32b": ViTConfig(depth=32, heads=12, mlp_ratio=3.0, reattention=range(32)),
}


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
        nn.init.zeros_(self.patch_embed.proj.bias)
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

    def query_key(self, tokens: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """Queries and keys [B, H, N, d] of a block, from the tokens [B, N, D] that enter it: one product."""
        norm, attn = self.blocks[block].norm1, self.blocks[block].attn
        rows = 2 * self.config.dim
        qk = F.linear(norm(tokens), attn.qkv.weight[:rows], attn.qkv.bias[:rows])
        q, k = qk.unflatten(-1, (2, self.config.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k
