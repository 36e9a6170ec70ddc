"""The families of attentions that `fuse` knows, a file each; a new one is a file and a line here."""

from .deepvit import FusedDeepViTReAttention
from .gong import FusedGongAttention
from .timm import FusedTimmAttention, FusedTimmTalkingHeadAttn
from .vit_pytorch import FusedVitPytorchCaiTAttention, FusedVitPytorchDeepViTAttention
from .x_transformers import FusedXTransformersAttend

FAMILIES = (
    FusedTimmAttention,
    FusedTimmTalkingHeadAttn,
    FusedDeepViTReAttention,
    FusedGongAttention,
    FusedVitPytorchDeepViTAttention,
    FusedVitPytorchCaiTAttention,
    FusedXTransformersAttend,
)
