"""The talking heads of Gong et al. 2021 (github.com/ChengyueGongR/PatchVisionTransformer, deit/models.py)."""

from torch import nn

from .._packed import PARTS, FusedPackedTalkingHeads


class FusedGongAttention(FusedPackedTalkingHeads):
    """Its class is called Attention, as many are: `proj_pre` and `proj_post` tell it."""

    title = "Attention of Gong et al."
    classes = frozenset({(None, "Attention")})
    parts = (*PARTS, "proj_pre", "proj_post")
    mixes = ("proj_pre", "proj_post")

    @classmethod
    def stands_for(cls, kind, module=None):
        return super().stands_for(kind) and all(
            isinstance(getattr(module, name, None), nn.Module) for name in cls.mixes
        )
