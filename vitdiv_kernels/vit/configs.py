"""The shapes of vision transformers: `ViTConfig`, and those that have names."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .. import _checks


@dataclass(frozen=True)
class ViTConfig:
    """The shape of a ViT, and how it starts.

    Args:
        image_size, channels: of the images, which are squares.
        patch, overlap: the side of a patch in pixels, and by how much each is widened on every side.
        dim, depth, heads, mlp_ratio, classes: as in every ViT.
        drop_path: the probability to drop a branch. With `drop_path_grows` it grows from 0 in the first block
            to this in the last; False gives all blocks the same, as CaiT has.
        pos_std: of the initial position embedding.
        reattention: the blocks that re-attend, as `vitdiv_kernels.nn.ReAttention`.
        transform_scale, map_norm, mix_init: options of theirs; there map_norm is called norm. mix_init="conv"
            is the start of the published code.
        attention: of the other blocks: "plain", or "talking_heads" as
            `vitdiv_kernels.nn.TalkingHeadsAttention`, whose mixes have a bias in CaiT (`talking_bias`) and
            none in the ViT of Gong et al.
        stem: "patch" is one convolution; "conv" puts two more before it, as DeepViT-S and -L have.
        scale_adjustment: a; each branch f then adds f(a x) / a, in DeepViT-S and -L with a = 0.5.
        layer_scale: the initial factor of each feature of a branch (LayerScale, CaiT); None for no factors.
        class_blocks: how many blocks of class attention come last (CaiT). The class token joins there, and
            the blocks before them have patches alone.
        distilled: adds DeiT's distillation token, with a head of its own.
        head_drop: dropout of what enters the heads (Gong et al.).
        patch_head: adds a head for patches, which the ViT of Gong et al. has. The logits do not use it.
        init: "xavier" (xavier uniform) or "timm" (normal, of standard deviation 0.02), which the published
            code of all these models uses; that leaves convolutions as torch starts them.

    Raises ValueError for sizes that do not fit together and for unknown values.

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
    transform_scale: bool = False
    map_norm: Literal["batch", "layer", "none"] = "batch"
    mix_init: Literal["identity", "conv"] = "identity"
    attention: Literal["plain", "talking_heads"] = "plain"
    talking_bias: bool = True
    stem: Literal["patch", "conv"] = "patch"
    scale_adjustment: float = 1.0
    layer_scale: float | None = None
    class_blocks: int = 0
    distilled: bool = False
    patch_head: bool = False
    head_drop: float = 0.0
    drop_path_grows: bool = True
    init: Literal["xavier", "timm"] = "xavier"

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "patch", "dim", "depth", "heads", "classes"):
            _checks.count(name, getattr(self, name), 1)
        for name in ("overlap", "class_blocks"):
            _checks.count(name, getattr(self, name))
        for name in ("drop_path", "head_drop"):
            if not 0 <= _checks.number(name, getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1, got {getattr(self, name)}")
        if self.image_size % self.patch:
            raise ValueError(f"image_size must be a multiple of patch ({self.patch}), got {self.image_size}")
        if self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads ({self.heads}), got {self.dim}")
        unknown = [i for i in self.reattention if i not in range(self.depth)]
        if unknown:
            raise ValueError(f"reattention must list blocks from 0 to {self.depth - 1}, got {unknown}")
        _checks.one_of("map_norm", self.map_norm, ("batch", "layer", "none"))
        _checks.one_of("mix_init", self.mix_init, ("identity", "conv"))
        _checks.one_of("attention", self.attention, ("plain", "talking_heads"))
        _checks.one_of("stem", self.stem, ("patch", "conv"))
        _checks.one_of("init", self.init, ("xavier", "timm"))
        if self.stem == "conv" and (self.patch % 2 or self.overlap):
            raise ValueError(
                'stem="conv" takes patches of an even side without overlap, '
                f"got patch {self.patch} and overlap {self.overlap}"
            )
        if not self.scale_adjustment > 0:
            raise ValueError(f"scale_adjustment must be positive, got {self.scale_adjustment}")
        if self.class_blocks and self.distilled:
            raise ValueError("distilled must be False with class_blocks, in which the class token is alone")


_DIGITS24 = ViTConfig(
    8, 1, patch=2, overlap=1, dim=48, depth=24, heads=4, mlp_ratio=2.0, classes=10, pos_std=0.2
)

_DEIT = {
    "tiny": ViTConfig(dim=192, heads=3),
    "small": ViTConfig(),
    "base": ViTConfig(dim=768, heads=12),
}

# DeepViT with a convolutional stem; in its code S alone has transform_scale
_DEEPVIT_S = ViTConfig(
    dim=396, depth=16, heads=12, mlp_ratio=3.0, reattention=range(11, 16), transform_scale=True,
    mix_init="conv", stem="conv", scale_adjustment=0.5, init="timm",
)  # fmt: skip
_DEEPVIT_L = replace(_DEEPVIT_S, dim=420, depth=32, reattention=range(20, 32), transform_scale=False)

# image_size, dim, depth, heads, layer_scale
_CAIT = {
    "xxs24_224": (224, 192, 24, 4, 1e-5),
    "xxs24_384": (384, 192, 24, 4, 1e-5),
    "xxs36_224": (224, 192, 36, 4, 1e-5),
    "xxs36_384": (384, 192, 36, 4, 1e-5),
    "xs24_384": (384, 288, 24, 6, 1e-5),
    "s24_224": (224, 384, 24, 8, 1e-5),
    "s24_384": (384, 384, 24, 8, 1e-5),
    "s36_384": (384, 384, 36, 8, 1e-6),
    "m36_384": (384, 768, 36, 16, 1e-6),
    "m48_448": (448, 768, 48, 16, 1e-6),
}


def _cait(image_size: int, dim: int, depth: int, heads: int, layer_scale: float) -> ViTConfig:
    return ViTConfig(
        image_size, dim=dim, depth=depth, heads=heads, attention="talking_heads", layer_scale=layer_scale,
        class_blocks=2, drop_path_grows=False, init="timm",
    )  # fmt: skip


# image_size, dim, depth, heads
_GONG = {
    "small": (224, 384, 12, 6),
    "small24": (224, 384, 24, 6),
    "base": (224, 768, 12, 12),
    "base24": (224, 768, 24, 12),
    "base_384": (384, 768, 12, 12),
    "large": (224, 1024, 24, 16),
    "large_384": (384, 1024, 24, 16),
}


def _gong(image_size: int, dim: int, depth: int, heads: int) -> ViTConfig:
    return ViTConfig(
        image_size, dim=dim, depth=depth, heads=heads, attention="talking_heads", talking_bias=False,
        patch_head=True, init="timm",
    )  # fmt: skip


CONFIGS = {
    "digits24": _DIGITS24,
    "digits24_reattention": replace(_DIGITS24, reattention=range(24)),
    "scenes12": replace(_DIGITS24, image_size=32, patch=4, overlap=2, depth=12, classes=11),
    **{f"deit_{name}": config for name, config in _DEIT.items()},
    "deit_small24": ViTConfig(depth=24, init="timm"),
    "deit_base_384": replace(_DEIT["base"], image_size=384, init="timm"),
    **{f"deit_{name}_distilled": replace(c, distilled=True, init="timm") for name, c in _DEIT.items()},
    "deit_base_distilled_384": replace(_DEIT["base"], image_size=384, distilled=True, init="timm"),
    "deepvit_16b": ViTConfig(depth=16, heads=12, mlp_ratio=3.0, reattention=range(16)),
    "deepvit_24b": ViTConfig(depth=24, heads=12, mlp_ratio=3.0, reattention=range(24)),
    "deepvit_32b": ViTConfig(depth=32, heads=12, mlp_ratio=3.0, reattention=range(32)),
    "deepvit_s": _DEEPVIT_S,
    "deepvit_l": _DEEPVIT_L,
    "deepvit_l_384": replace(_DEEPVIT_L, image_size=384),
    **{f"cait_{name}": _cait(*shape) for name, shape in _CAIT.items()},
    **{f"gong_{name}": _gong(*shape) for name, shape in _GONG.items()},
}
