"""Small models with the attribute names and shapes of other packages, for where these are not installed."""

import torch
import torch.nn.functional as F
from torch import nn

IMAGE, PATCH, DIM, HEADS, HEAD_DIM, DEPTH, CLASSES = 16, 4, 24, 2, 8, 3, 5
PATCHES = (IMAGE // PATCH) ** 2


def images(count=2):
    return torch.randn(count, 3, IMAGE, IMAGE)


def split(packed, heads):
    return packed.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)


class Patches(nn.Module):
    def forward(self, x):
        return F.unfold(x, PATCH, stride=PATCH).mT


class Feed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, DIM))

    def forward(self, x):
        return self.net(x)


class Shown(nn.Module):
    """Shows the maps of its last pass, which are not copied with it."""

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name not in ("maps", "mixed")}


class Attend(Shown):
    """vit-pytorch's Attention: of `kind` "vit", "deepvit" or "cait". `maps` are its softmax maps, `mixed`
    those that it applies."""

    def __init__(self, kind):
        super().__init__()
        self.heads, self.scale = HEADS, HEAD_DIM**-0.5
        self.norm, inner = nn.LayerNorm(DIM), HEADS * HEAD_DIM
        if kind == "cait":
            self.to_q, self.to_kv = nn.Linear(DIM, inner, bias=False), nn.Linear(DIM, 2 * inner, bias=False)
            self.mix_heads_pre_attn = nn.Parameter(torch.randn(HEADS, HEADS))
            self.mix_heads_post_attn = nn.Parameter(torch.randn(HEADS, HEADS))
        else:
            self.to_qkv = nn.Linear(DIM, 3 * inner, bias=False)
        if kind == "deepvit":
            self.reattn_weights = nn.Parameter(torch.randn(HEADS, HEADS))
            self.reattn_norm = nn.Sequential(nn.Identity(), nn.LayerNorm(HEADS), nn.Identity())
        self.kind, self.to_out = kind, nn.Sequential(nn.Linear(inner, DIM), nn.Dropout(0.0))

    def forward(self, x, context=None):
        x = self.norm(x)
        if self.kind == "cait":
            context = x if context is None else torch.cat([x, context], 1)
            q, (k, v) = self.to_q(x), self.to_kv(context).chunk(2, -1)
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
            logits = torch.einsum("bhij,hg->bgij", q @ k.mT * self.scale, self.mix_heads_pre_attn)
            self.maps = logits.softmax(-1)
            self.mixed = torch.einsum("bhij,hg->bgij", self.maps, self.mix_heads_post_attn)
        else:
            q, k, v = split(self.to_qkv(x), HEADS)
            self.maps = self.mixed = (q @ k.mT * self.scale).softmax(-1)
        if self.kind == "deepvit":
            mixed = torch.einsum("bhij,hg->bijg", self.maps, self.reattn_weights)
            self.mixed = self.reattn_norm(mixed).movedim(-1, 1)
        return self.to_out((self.mixed @ v).transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.scale, self.fn = nn.Parameter(torch.full((1, 1, DIM), 0.5)), fn

    def forward(self, x, **kwargs):
        return self.fn(x, **kwargs) * self.scale


class Transformer(nn.Module):
    def __init__(self, kind, depth=DEPTH):
        super().__init__()
        wrap = LayerScale if kind == "cait" else lambda module: module
        if kind == "vit":
            self.norm = nn.LayerNorm(DIM)
        if kind == "cait":
            self.layer_dropout = 0.0
        pairs = [nn.ModuleList([wrap(Attend(kind)), wrap(Feed())]) for _ in range(depth)]
        self.layers = nn.ModuleList(pairs)

    def forward(self, x, **context):
        for attn, ff in self.layers:
            x = attn(x, **context) + x
            x = ff(x) + x
        return self.norm(x) if hasattr(self, "norm") else x


class VitPytorch(nn.Module):
    """vit-pytorch's ViT, DeepViT and CaiT."""

    def __init__(self, kind="vit", prefix=1):
        super().__init__()
        self.kind, self.prefix = kind, prefix
        self.to_patch_embedding = nn.Sequential(Patches(), nn.Linear(3 * PATCH**2, DIM))
        self.cls_token = nn.Parameter(torch.randn(prefix, DIM))
        self.pos_embedding = nn.Parameter(torch.randn(1, PATCHES + prefix, DIM))
        if kind == "cait":
            self.patch_transformer, self.cls_transformer = Transformer(kind), Transformer(kind, 1)
        else:
            self.transformer = Transformer(kind)
        head = nn.Linear(DIM, CLASSES)
        self.mlp_head = head if kind == "vit" else nn.Sequential(nn.LayerNorm(DIM), head)

    def forward(self, x):
        x = self.to_patch_embedding(x)
        if self.kind == "cait":
            x = self.patch_transformer(x + self.pos_embedding[:, :PATCHES])
            return self.mlp_head(self.cls_transformer(self.cls_token.expand(len(x), 1, -1), context=x)[:, 0])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embedding
        return self.mlp_head(self.transformer(x)[:, 0])


class ReleasedAttention(Shown):
    """The papers' released attentions, which give (tokens, something): "gong" with talking heads, "deepvit"
    re-attends."""

    def __init__(self, kind):
        super().__init__()
        self.num_heads, self.scale, self.kind = HEADS, 0.3, kind
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        if kind == "gong":
            self.proj_pre, self.proj_post = (nn.Linear(HEADS, HEADS, bias=False) for _ in range(2))
        else:
            self.reatten_matrix, self.var_norm = nn.Conv2d(HEADS, HEADS, 1), nn.BatchNorm2d(HEADS)

    def forward(self, x, atten=None):
        q, k, v = split(self.qkv(x), HEADS)
        logits = q @ k.mT * self.scale
        if self.kind == "gong":
            self.maps = self.proj_pre(logits.movedim(1, -1)).movedim(-1, 1).softmax(-1)
            self.mixed = self.proj_post(self.maps.movedim(1, -1)).movedim(-1, 1)
        else:
            self.maps = logits.softmax(-1)
            self.mixed = self.var_norm(self.reatten_matrix(self.maps))
        x = self.proj((self.mixed @ v).transpose(1, 2).flatten(2))
        return x, 0.0 if self.kind == "gong" else self.mixed


class ReleasedBlock(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn, self.mlp = ReleasedAttention(kind), nn.Linear(DIM, DIM)

    def forward(self, x, atten=None):
        new, atten = self.attn(self.norm1(x), atten)
        x = x + new
        return x + self.mlp(self.norm2(x)), atten


class Released(nn.Module):
    """The released ViT of Gong et al. and DeepVisionTransformer: blocks give (tokens, something)."""

    def __init__(self, kind):
        super().__init__()
        self.patch_embed = nn.Sequential(Patches(), nn.Linear(3 * PATCH**2, DIM))
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM))
        self.blocks = nn.ModuleList(ReleasedBlock(kind) for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, CLASSES)

    def forward(self, x):
        x, atten = self.patch_embed(x), None
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x, atten = block(x, atten)
        return self.head(self.norm(x)[:, 0])


class AuthorsSwinBlock(nn.Module):
    """A block of the authors' Swin: tokens [B, rows columns, D]; its windows are the whole map here."""

    def __init__(self, width):
        super().__init__()
        self.window_size, self.shift_size, self.attn = 4, 0, nn.Module()
        self.attn.qkv, self.attn.num_heads = nn.Linear(width, 3 * width), 2
        self.mlp = nn.Linear(width, width)

    def forward(self, x, mask):
        return x + self.mlp(x)


class AuthorsSwin(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Sequential(Patches(), nn.Linear(3 * PATCH**2, 8))
        self.layers = nn.ModuleList(nn.Module() for _ in range(2))
        for i, stage in enumerate(self.layers):
            stage.blocks = nn.ModuleList(AuthorsSwinBlock(8 * 2**i) for _ in range(2))
        self.merge, self.norm, self.head = nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, CLASSES)

    def forward(self, x):
        x = self.patch_embed(x)
        for i, stage in enumerate(self.layers):
            x = self.merge(x.unflatten(1, (-1, 4)).flatten(2)) if i else x
            for block in stage.blocks:
                x = block(x, None)
        return self.head(self.norm(x).mean(1))
