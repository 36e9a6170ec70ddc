"""Layers of `ReAttention` that know their initial values.

`reset_parameters` gives them again, in whatever order a tool resets the modules: FSDP and others make a model
on the meta device, call `to_empty`, then `reset_parameters` of each module, parents first.
"""

import torch
from torch import nn

MIX_NOISE = 0.1


class MixConv2d(nn.Conv2d):
    """A mix [H, H, 1, 1]. After `start_unmixed` it starts from the heads as they are: I plus noise, no bias.

    Its constructor is that of Conv2d, since adapters make more layers of the type that they find.
    """

    unmixed = False

    def start_unmixed(self):
        self.unmixed = True
        self._unmix()
        return self

    def reset_parameters(self):
        super().reset_parameters()
        if self.unmixed:
            self._unmix()

    @torch.no_grad()
    def _unmix(self):
        noise = MIX_NOISE * torch.randn_like(self.weight)
        identity = torch.eye(self.out_channels, device=self.weight.device)[:, :, None, None]
        self.weight.copy_(identity + noise)
        self.bias.zero_()


class _Gain:
    gain = 1.0

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.constant_(self.weight, self.gain)

    def start_from(self, gain):
        self.gain = gain
        self.reset_parameters()
        return self


class MapBatchNorm2d(_Gain, nn.BatchNorm2d):
    """Batch norm whose weight starts from a gain."""


class MapLayerNorm(_Gain, nn.LayerNorm):
    """Layer norm whose weight starts from a gain."""
