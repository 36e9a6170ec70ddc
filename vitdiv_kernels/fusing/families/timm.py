"""timm: the plain Attention of its ViTs, and CaiT's talking heads."""

import torch
from torch import nn

from .._packed import PARTS, FusedPackedReAttention, FusedPackedTalkingHeads


class IdentityConv2d(nn.Conv2d):
    """A mix that starts as the identity: the heads as they are."""

    bias: torch.Tensor

    def reset_parameters(self) -> None:
        nn.init.dirac_(self.weight)
        nn.init.zeros_(self.bias)

    def is_identity(self) -> bool:
        """Whether it still is; unknown, so taken for true, on the meta device."""
        if self.weight.is_meta:
            return True
        identity = torch.eye(self.out_channels, device=self.weight.device)
        return torch.equal(self.weight.flatten(1).float(), identity) and not self.bias.any()


class FusedTimmAttention(FusedPackedReAttention):
    """It starts as plain attention: the mix is the identity, and can be trained away from it."""

    title = "Attention of timm"
    classes = frozenset(
        {("timm.layers.attention", "Attention"), ("timm.models.vision_transformer", "Attention")}
    )
    parts = (*PARTS, "attn_drop")
    added = ("reatten_matrix", "var_norm")
    on_request = True

    def __init__(self, original, backend, rest=None):
        super().__init__(original, backend, rest)
        self.map_norm = "none"
        self.out_scale = 1.0
        like, heads = next(original.parameters()), self.num_heads
        with torch.inference_mode(False):  # its parameters can be trained
            # made without the global random numbers
            mix = IdentityConv2d(heads, heads, 1, device="meta", dtype=like.dtype).to_empty(
                device=like.device
            )
            mix.reset_parameters()
        mix.requires_grad_(any(parameter.requires_grad for parameter in original.parameters()))
        self.reatten_matrix = mix.train(original.training)
        self.var_norm = nn.Identity().train(original.training)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """The original's own state dict: what it computes has the identity as its mix."""
        mix = f"{prefix}reatten_matrix."
        like = state_dict.get(f"{prefix}proj.weight")
        if like is not None and not any(name.startswith(mix) for name in state_dict):
            identity = torch.eye(self.num_heads, dtype=like.dtype, device=like.device)
            state_dict[f"{mix}weight"] = identity[:, :, None, None]
            state_dict[f"{mix}bias"] = identity.new_zeros(self.num_heads)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def why_not_back(self):
        if isinstance(self.reatten_matrix, IdentityConv2d) and self.reatten_matrix.is_identity():
            return super().why_not_back()
        return "its mix is not the identity any more, and plain attention has none"


class FusedTimmTalkingHeadAttn(FusedPackedTalkingHeads):
    title = "TalkingHeadAttn of timm's CaiT"
    classes = frozenset({("timm.models.cait", "TalkingHeadAttn")})
    parts = (*PARTS, "attn_drop", "proj_l", "proj_w")
