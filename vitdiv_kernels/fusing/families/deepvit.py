"""DeepViT's released ReAttention (github.com/zhoudaquan/dvit_repo, models/layers.py)."""

from torch import nn

from .._packed import PARTS, FusedPackedReAttention


class FusedDeepViTReAttention(FusedPackedReAttention):
    """It returns (output, None) where the original returns (output, maps)."""

    title = "ReAttention of DeepViT"
    classes = frozenset({(None, "ReAttention")})
    parts = (*PARTS, "attn_drop", "apply_transform")
    gives_maps = True

    def __init__(self, original, backend, rest=None):
        super().__init__(original, backend, rest)
        self.apply_transform = original.apply_transform
        self.map_norm = "batch"
        self.out_scale = getattr(original, "reatten_scale", 1.0)

    @classmethod
    def why_not(cls, original, above):
        if original.apply_transform and not (
            isinstance(getattr(original, "reatten_matrix", None), nn.Module)
            and isinstance(getattr(original, "var_norm", None), nn.Module)
        ):
            return "it has no reatten_matrix and var_norm"
        if any(getattr(module, "cos_reg", False) is True for module in above):
            return (
                "its model collects the maps for cos_reg: set model.cos_reg to False and take "
                "losses.cos_reg by a DiversityObjective"
            )
        return None

    def unreadable(self):
        return super().unreadable() if self.apply_transform else None

    def forward(self, x, atten=None):
        return super().forward(x)
