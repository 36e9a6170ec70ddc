"""The specification of re-attention, in plain PyTorch: any float dtype, any device, plain autograd.

    Z_h = scale Q_h K_h^T
    L   = Z, or with pre_mix  L_g = sum_h pre_mix[g, h] Z_h + pre_bias[g]
    A   = dropout(softmax(L))
    X_g = sum_h mix[g, h] A_h + mix_bias[g]
    Y   = X | batch norm over (image, query, key), per head | layer norm over heads, per (image, query, key)
    O_g = out_scale Y_g V_g

float16 and bfloat16 are computed in float32 and the output is rounded once. Holds several [B, H, N, M] maps.
"""

import torch
import torch.nn.functional as F

from ...._autograd import AllSum
from ..attention_gram.reference import centered_gram


def reattention(
    q, k, v, mix, *, mix_bias, pre_mix, pre_bias, norm, norm_weight, norm_bias, running_mean, running_var,
    training, momentum, eps, out_scale, scale, return_gram, process_group, dropout_p=0.0,
):  # fmt: skip
    """Output [B, H, N, d] in the dtype of q, and the Gram matrix [B, H, H] of the softmax maps, or None.

    Shapes and meaning of the arguments are those of the public function; `scale` is a number. The running
    statistics are updated in place. With `process_group` the statistics of batch norm are those of the
    batches of all processes.
    """
    compute_dtype = torch.promote_types(q.dtype, torch.float32)

    def to_compute(tensor):
        return None if tensor is None else tensor.to(compute_dtype)

    # transpose and permute: torch.onnx.export(dynamo=False) does not know mT, and writes an invalid movedim
    logits = scale * to_compute(q) @ to_compute(k).transpose(-2, -1)  # [B, H, N, M]
    if pre_mix is not None:
        logits = mix_heads(logits, to_compute(pre_mix), to_compute(pre_bias))
    maps = torch.softmax(logits, dim=-1)
    gram = centered_gram(maps) + maps.shape[2] / maps.shape[3] if return_gram else None
    maps = F.dropout(maps, dropout_p, training)

    if mix_bias is not None and norm == "batch" and training:
        mix_bias = without_gradient(mix_bias)
    mixed = mix_heads(maps, to_compute(mix), to_compute(mix_bias))
    if norm == "batch":
        mixed = batch_norm(
            mixed, to_compute(norm_weight), to_compute(norm_bias), running_mean, running_var, training,
            momentum, eps, process_group,
        )  # fmt: skip
    elif norm == "layer":
        heads_last = mixed.permute(0, 2, 3, 1)
        # the size of mix: that exporter wants one which does not depend on the input
        heads_last = F.layer_norm(
            heads_last, mix.shape[:1], to_compute(norm_weight), to_compute(norm_bias), eps
        )
        mixed = heads_last.permute(0, 3, 1, 2)

    out = out_scale * (mixed @ to_compute(v))
    return out.to(q.dtype), gram


def without_gradient(bias):
    """The bias, with a gradient of exactly 0.

    Batch norm takes a bias out again. Autograd of the formula gives its rounding instead, which an optimizer
    that divides by its size (Adam) follows at the full learning rate.
    """
    never = torch.zeros_like(bias, dtype=torch.bool)
    return torch.where(never, bias, bias.detach())


def mix_heads(maps, weight, bias):
    """out_g = sum_h weight[g, h] maps_h + bias[g], for maps [B, H, N, M]."""
    mixed = torch.einsum("gh,bhij->bgij", weight, maps)
    return mixed if bias is None else mixed + bias[:, None, None]


def batch_norm(maps, weight, bias, running_mean, running_var, training, momentum, eps, process_group):
    """Batch norm with heads as channels, as F.batch_norm does it and, across processes, SyncBatchNorm."""
    mean, var = running_mean, running_var
    if mean is not None and mean.dtype != maps.dtype:
        mean, var = mean.to(maps.dtype), var.to(maps.dtype)
    if training and process_group is not None:
        out = _synced_batch_norm(maps, weight, bias, mean, var, momentum, eps, process_group)
    else:
        out = F.batch_norm(maps, mean, var, weight, bias, training, momentum, eps)
    if training and mean is not running_mean:
        running_mean.copy_(mean)
        running_var.copy_(var)
    return out


def _synced_batch_norm(maps, weight, bias, running_mean, running_var, momentum, eps, process_group):
    def all_sum(values):
        return AllSum.apply(values, process_group)

    over = (0, 2, 3)
    count = all_sum(maps.new_tensor([maps.shape[0] * maps.shape[2] * maps.shape[3]]))
    mean = all_sum(maps.sum(over)) / count
    deviation = maps - mean[:, None, None]
    var = all_sum(deviation.square().sum(over)) / count
    if running_mean is not None:
        with torch.no_grad():
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(var * (count / (count - 1)), momentum)
    out = deviation * (var + eps).rsqrt()[:, None, None]
    if weight is not None:
        out = out * weight[:, None, None]
    return out if bias is None else out + bias[:, None, None]
