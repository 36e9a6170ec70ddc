"""Diversity losses and head-mixing attention for vision transformers, without N x N maps in main memory.

Three operations (`pairwise_cosine`; `attention_gram`, `attention_cosine`, `attention_diversity`;
`reattention`), each with a pure PyTorch reference and fused kernels, forward and backward; the losses of the
field as functions over them in `vitdiv_kernels.losses`, and as modules in `vitdiv_kernels.nn`;
`DiversityObjective`, which takes them from a ViT as it trains, and `CollapseMonitor`, which watches it; a
reference vision transformer in `vitdiv_kernels.vit`. `fuse` gives the attentions of a model that exists these
kernels. `python -m vitdiv_kernels.train` trains the reference, `.report` tells whether it collapses, `.demo`
shows both; `.info` tells which backends are here.
"""

from . import losses, nn
from ._dispatch import use_backend
from .attach.monitor import CollapseMonitor
from .attach.objective import DiversityObjective
from .attach.parts import AttentionNames, ModelParts
from .attach.terms import Term
from .fusing.api import fuse, unfuse
from .fusing.report import FuseReport
from .ops.maps.attention_gram import attention_cosine, attention_diversity, attention_gram
from .ops.maps.reattention import reattention
from .ops.pairs.pairwise_cosine import pairwise_cosine

__version__ = "0.1.0"

__all__ = [
    "AttentionNames",
    "CollapseMonitor",
    "DiversityObjective",
    "FuseReport",
    "ModelParts",
    "Term",
    "attention_cosine",
    "attention_diversity",
    "attention_gram",
    "fuse",
    "losses",
    "nn",
    "pairwise_cosine",
    "reattention",
    "unfuse",
    "use_backend",
]
