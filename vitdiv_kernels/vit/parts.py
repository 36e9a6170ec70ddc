"""The parts that a ViT is made of; parameters have the names of the published code."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import ReAttention, TalkingHeadsAttention
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


class ConvStem(nn.Module):
    """Images [B, C, S, S] to patch tokens [B, N, D], by two convolutions with batch norm before the patches:
    the stem of DeepViT-S and -L."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_patches = (config.image_size // config.patch) ** 2
        half = config.patch // 2
        self.conv1 = nn.Conv2d(config.channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.proj = nn.Conv2d(64, config.dim, half, stride=half)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.proj(x).flatten(2).transpose(1, 2)


STEMS: dict[str, type[PatchEmbed] | type[ConvStem]] = {"patch": PatchEmbed, "conv": ConvStem}


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


class ClassAttention(nn.Module):
    """The first of the tokens [B, N, D] attends to all of them, [B, 1, D] (CaiT)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for y in (self.q(x[:, :1]), self.k(x), self.v(x))
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def attention_of(config: ViTConfig, block: int) -> nn.Module:
    """The attention of a block."""
    dim, heads = config.dim, config.heads
    if block in config.reattention:
        return ReAttention(
            dim, heads, qkv_bias=True, norm=config.map_norm, transform_scale=config.transform_scale,
            mix_init=config.mix_init,
        )  # fmt: skip
    if config.attention == "plain":
        return Attention(dim, heads)
    attn = TalkingHeadsAttention(dim, heads, qkv_bias=True)
    if not config.talking_bias:
        attn.proj_l = nn.Linear(heads, heads, bias=False)
        attn.proj_w = nn.Linear(heads, heads, bias=False)
    return attn


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm block; in training a branch is dropped for a whole image with probability `drop_path`.

    `adjustment` and `layer_scale` are a ViTConfig's scale_adjustment and layer_scale.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        drop_path: float,
        adjustment: float = 1.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = drop_path
        self.adjustment = adjustment
        self.gamma_1 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.gamma_2 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))

    def _drop(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        keep = branch.new_empty(branch.shape[0], 1, 1).bernoulli_(1 - self.drop_path)
        return branch * keep / (1 - self.drop_path)

    def _adjusted(self, x: Tensor) -> Tensor:
        return x if self.adjustment == 1 else self.adjustment * x

    def _added(self, branch: Tensor, gamma: Tensor | None) -> Tensor:
        """What a branch adds."""
        if gamma is not None:
            branch = gamma * branch
        return self._drop(branch if self.adjustment == 1 else branch / self.adjustment)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._added(self.attn(self.norm1(self._adjusted(x))), self.gamma_1)
        return x + self._added(self.mlp(self.norm2(self._adjusted(x))), self.gamma_2)


class ClassBlock(Block):
    """A block that changes the class token alone (CaiT): forward(class token [B, 1, D], patches [B, N, D])
    gives the class token."""

    def forward(self, x: Tensor, patches: Tensor) -> Tensor:  # type: ignore[override]
        x = x + self._added(self.attn(self.norm1(torch.cat([x, patches], 1))), self.gamma_1)
        return x + self._added(self.mlp(self.norm2(x)), self.gamma_2)
