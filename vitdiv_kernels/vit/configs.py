"""The shapes of vision transformers: `ViTConfig`, and those that have names."""

from collections.abc import Sequence
from dataclasses import dataclass, replace


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


_DIGITS24 = ViTConfig(
    8, 1, patch=2, overlap=1, dim=48, depth=24, heads=4, mlp_ratio=2.0, classes=10, pos_std=0.2
)

CONFIGS = {
    "digits24": _DIGITS24,
    "digits24_reattention": replace(_DIGITS24, reattention=range(24)),
    "deit_tiny": ViTConfig(dim=192, heads=3),
    "deit_small": ViTConfig(),
    "deit_base": ViTConfig(dim=768, heads=12),
    "deepvit_16b": ViTConfig(depth=16, heads=12, mlp_ratio=3.0, reattention=range(16)),
    "deepvit_24b": ViTConfig(depth=24, heads=12, mlp_ratio=3.0, reattention=range(24)),
    "deepvit_32b": ViTConfig(depth=32, heads=12, mlp_ratio=3.0, reattention=range(32)),
}
