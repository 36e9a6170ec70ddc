"""A vision transformer with timm's names, made of parts that a ViTConfig chooses."""

import torch
from torch import Tensor, nn

from .configs import ViTConfig
from .parts import STEMS, Block, ClassAttention, ClassBlock, attention_of


class ViT(nn.Module):
    """Images [B, C, S, S] to logits [B, classes]; the head reads the class token.

    With `return_tokens=True` the second result is the list of `depth + 1` token tensors [B, P + N, D]: entry
    i enters block i, the last leaves the last block. They are the tensors that the forward pass makes anyway,
    not copies. P, `num_prefix_tokens`, is 1 for the class token, 2 with a distillation token, and 0 where the
    class token joins after the blocks (`class_blocks`).

    With a distillation token the logits are the mean of both heads, as DeiT's are in evaluation.

    Example:
        >>> model = ViT(ViTConfig(image_size=32, dim=48, depth=2, heads=4, classes=10))
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    num_prefix_tokens = 1

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        if config.class_blocks or config.distilled:
            self.num_prefix_tokens = 2 if config.distilled else 0
        dim, depth = config.dim, config.depth
        self.patch_embed = STEMS[config.stem](config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.dist_token = nn.Parameter(torch.empty(1, 1, dim)) if config.distilled else None
        positions = self.num_prefix_tokens + self.patch_embed.num_patches
        self.pos_embed = nn.Parameter(torch.empty(1, positions, dim))

        def block(i: int) -> Block:
            share = config.drop_path * i / max(1, depth - 1) if config.drop_path_grows else config.drop_path
            attn = attention_of(config, i)
            return Block(dim, attn, config.mlp_ratio, share, config.scale_adjustment, config.layer_scale)

        self.blocks = nn.ModuleList(block(i) for i in range(depth))
        if config.class_blocks:
            self.blocks_token_only = nn.ModuleList(
                ClassBlock(dim, ClassAttention(dim, config.heads), 4.0, 0.0, layer_scale=config.layer_scale)
                for _ in range(config.class_blocks)
            )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, config.classes)
        self.head_dist = nn.Linear(dim, config.classes) if config.distilled else None
        self.patch_head = nn.Linear(dim, config.classes) if config.patch_head else None
        self.head_drop = nn.Dropout(config.head_drop)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        as_timm = self.config.init == "timm"
        normal = nn.init.trunc_normal_ if as_timm else nn.init.normal_
        normal(self.cls_token, std=0.02)
        normal(self.pos_embed, std=self.config.pos_std)
        if self.dist_token is not None:
            normal(self.dist_token, std=0.02)
        if not as_timm:
            nn.init.xavier_uniform_(self.get_parameter("patch_embed.proj.weight").flatten(1))
            nn.init.zeros_(self.get_parameter("patch_embed.proj.bias"))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if as_timm:
                    nn.init.trunc_normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """The parameters that the papers' recipes do not decay, beside vectors; timm's optimizers ask."""
        return {"pos_embed", "cls_token", "dist_token"}

    def forward(self, x: Tensor, return_tokens: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        x = self.patch_embed(x)
        class_token = self.cls_token.expand(x.shape[0], -1, -1)
        if self.dist_token is not None:
            x = torch.cat([class_token, self.dist_token.expand(x.shape[0], -1, -1), x], 1)
        elif not self.config.class_blocks:
            x = torch.cat([class_token, x], 1)
        x = x + self.pos_embed
        tokens = [x]
        for block in self.blocks:
            x = block(x)
            tokens.append(x)
        logits = self._logits(x, class_token)
        return (logits, tokens) if return_tokens else logits

    def _logits(self, x: Tensor, class_token: Tensor) -> Tensor:
        if self.config.class_blocks:
            for block in self.blocks_token_only:
                class_token = block(class_token, x)
            x = class_token
        logits = self.head(self.head_drop(self.norm(x[:, 0])))
        if self.head_dist is not None:
            logits = (logits + self.head_dist(self.head_drop(self.norm(x[:, 1])))) / 2
        return logits
