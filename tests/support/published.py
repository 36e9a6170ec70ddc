"""The published attentions, with the modules of ours called on the maps."""

import copy

import torch

import vitdiv_kernels as vd


def split(attn, x):
    return attn.qkv(x).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)


def reattention(attn, x):
    q, k, v = split(attn, x)
    mixed = attn.reatten_matrix((attn.scale * q @ k.mT).softmax(-1))
    mixed = (
        attn.var_norm(mixed.movedim(1, -1)).movedim(-1, 1)
        if attn.map_norm == "layer"
        else attn.var_norm(mixed)
    )
    return attn.proj((attn.out_scale * mixed @ v).transpose(1, 2).flatten(2))


def talking_heads(attn, x):
    q, k, v = split(attn, x)
    logits = attn.proj_l((attn.scale * q @ k.mT).movedim(1, -1)).movedim(-1, 1)
    maps = attn.proj_w(logits.softmax(-1).movedim(1, -1)).movedim(-1, 1)
    return attn.proj((maps @ v).transpose(1, 2).flatten(2))


def called_on_maps(attn, x):
    return (talking_heads if isinstance(attn, vd.nn.TalkingHeadsAttention) else reattention)(attn, x)


def assert_published(attn, steps=2, forward=None, like=None):
    """Outputs, gradients and buffers of steps of training, then the output in evaluation, are those of the
    modules called on the maps. `like` is a second attention, equal to `attn`, where that can't be copied."""
    like = copy.deepcopy(attn) if like is None else like
    forward = attn if forward is None else forward
    for _ in range(steps):
        x = torch.randn(3, 7, attn.qkv.in_features, dtype=torch.float64)
        for module, run in ((attn, forward), (like, lambda x: called_on_maps(like, x))):
            module.zero_grad()
            out = run(x)
            out.square().sum().backward()
            module.out = out.detach()
        torch.testing.assert_close(attn.out, like.out)
        for (name, ours), theirs in zip(attn.named_parameters(), like.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")
    for (name, ours), theirs in zip(attn.named_buffers(), like.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")
    attn.eval(), like.eval()
    torch.testing.assert_close(forward(x), called_on_maps(like, x))
