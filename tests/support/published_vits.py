"""Published ViTs as formulas on a state dict with the names and shapes of the published code."""

import torch
import torch.nn.functional as F


def linear_shapes(name, outputs, inputs, bias=True):
    shapes = {f"{name}.weight": (outputs, inputs)}
    return shapes | ({f"{name}.bias": (outputs,)} if bias else {})


def norm_shapes(name, features, running=False):
    parts = ("weight", "bias", "running_mean", "running_var") if running else ("weight", "bias")
    return {f"{name}.{part}": (features,) for part in parts}


def vit_shapes(dim, depth, hidden, patches, patch, classes):
    """What all of them have."""
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + patches, dim)}
    shapes |= {"patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,)}
    for i in range(depth):
        block = f"blocks.{i}"
        shapes |= norm_shapes(f"{block}.norm1", dim) | norm_shapes(f"{block}.norm2", dim)
        shapes |= linear_shapes(f"{block}.attn.qkv", 3 * dim, dim)
        shapes |= linear_shapes(f"{block}.attn.proj", dim, dim)
        shapes |= linear_shapes(f"{block}.mlp.fc1", hidden, dim)
        shapes |= linear_shapes(f"{block}.mlp.fc2", dim, hidden)
    return shapes | norm_shapes("norm", dim) | linear_shapes("head", classes, dim)


def deepvit_shapes(dim, depth, heads, reattending, patches, patch, classes):
    """Of DeepViT-S and -L."""
    shapes = vit_shapes(dim, depth, 3 * dim, patches, patch, classes)
    shapes |= {"patch_embed.conv1.weight": (64, 3, 7, 7), "patch_embed.conv2.weight": (64, 64, 3, 3)}
    shapes |= norm_shapes("patch_embed.bn1", 64, True) | norm_shapes("patch_embed.bn2", 64, True)
    shapes["patch_embed.proj.weight"] = (dim, 64, patch // 2, patch // 2)
    for i in reattending:
        mix = f"blocks.{i}.attn.reatten_matrix"
        shapes |= {f"{mix}.weight": (heads, heads, 1, 1), f"{mix}.bias": (heads,)}
        shapes |= norm_shapes(f"blocks.{i}.attn.var_norm", heads, True)
    counters = ["patch_embed.bn1", "patch_embed.bn2", *(f"blocks.{i}.attn.var_norm" for i in reattending)]
    return shapes | {f"{name}.num_batches_tracked": () for name in counters}


def gong_shapes(dim, depth, heads, patches, patch, classes):
    shapes = vit_shapes(dim, depth, 4 * dim, patches, patch, classes)
    for i in range(depth):
        for mix in ("proj_pre", "proj_post"):
            shapes |= linear_shapes(f"blocks.{i}.attn.{mix}", heads, heads, bias=False)
    return shapes | linear_shapes("patch_head", classes, dim)


def random_state(shapes, dtype=torch.float64):
    """Each weight matters to the logits: none is 0, and variances are positive."""
    state = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif name.endswith("running_var"):
            state[name] = torch.rand(shape, dtype=dtype) + 0.5
        else:
            fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 and "token" not in name else 1
            state[name] = torch.randn(shape, dtype=dtype) * (fan_in**-0.5 if fan_in > 1 else 0.5)
    return state


class Published:
    """A state dict, and formulas on parts of it by name."""

    def __init__(self, state, heads):
        self.state, self.heads = state, heads

    def linear(self, name, x):
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def layer_norm(self, name, x):
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def batch_norm(self, name, x):
        mean, var, weight, bias = (
            self.state[f"{name}.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def mixed(self, name, maps):
        """The sum over heads h of W[g, h] maps[h]."""
        bias = self.state.get(f"{name}.bias", maps.new_zeros(self.heads))
        weight = self.state[f"{name}.weight"].reshape(self.heads, self.heads)
        return torch.einsum("gh,bhnm->bgnm", weight, maps) + bias[:, None, None]

    def attention(self, name, x, change_logits=lambda logits: logits, change_maps=lambda maps: maps):
        q, k, v = self.linear(f"{name}.qkv", x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        logits = change_logits(q @ k.mT * q.shape[-1] ** -0.5)
        out = change_maps(logits.softmax(-1)) @ v
        return self.linear(f"{name}.proj", out.transpose(1, 2).flatten(2))

    def mlp(self, name, x):
        return self.linear(f"{name}.fc2", F.gelu(self.linear(f"{name}.fc1", x)))

    def tokens(self, images, patch):
        x = F.conv2d(
            images, self.state["patch_embed.proj.weight"], self.state["patch_embed.proj.bias"], stride=patch
        )
        x = torch.cat([self.state["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1)
        return x + self.state["pos_embed"]

    def logits(self, x):
        return self.linear("head", self.layer_norm("norm", x)[:, 0])


def deepvit(state, images, heads, depth, reattending, patch, transform_scale):
    """DeepViT-S and -L in evaluation: every branch sees 0.5 x, and what it gives counts twice."""
    net = Published(state, heads)
    x = F.conv2d(images, state["patch_embed.conv1.weight"], stride=2, padding=3)
    x = net.batch_norm("patch_embed.bn1", x).relu()
    x = F.conv2d(x, state["patch_embed.conv2.weight"], padding=1)
    x = net.tokens(net.batch_norm("patch_embed.bn2", x).relu(), patch // 2)
    scale = (x.shape[-1] // heads) ** -0.5 if transform_scale else 1.0
    for i in range(depth):
        block = f"blocks.{i}"

        def reattend(maps, attn=f"{block}.attn"):
            return scale * net.batch_norm(f"{attn}.var_norm", net.mixed(f"{attn}.reatten_matrix", maps))

        change = {"change_maps": reattend} if i in reattending else {}
        x = x + 2 * net.attention(f"{block}.attn", net.layer_norm(f"{block}.norm1", x / 2), **change)
        x = x + 2 * net.mlp(f"{block}.mlp", net.layer_norm(f"{block}.norm2", x / 2))
    return net.logits(x)


def gong(state, images, heads, depth, patch):
    """The ViT of Gong et al., with talking heads in all blocks, and what its class token's head gives."""
    net = Published(state, heads)
    x = net.tokens(images, patch)
    for i in range(depth):
        block = f"blocks.{i}"
        x = x + net.attention(
            f"{block}.attn",
            net.layer_norm(f"{block}.norm1", x),
            lambda logits, name=f"{block}.attn.proj_pre": net.mixed(name, logits),
            lambda maps, name=f"{block}.attn.proj_post": net.mixed(name, maps),
        )
        x = x + net.mlp(f"{block}.mlp", net.layer_norm(f"{block}.norm2", x))
    return net.logits(x)
