"""What the small modules of a head-mixing attention compute, taken without calling them.

`reatten_matrix`, `var_norm`, `proj_l` and `proj_w` hold tensors that the operation reads; on the maps, which
are never made, they can't be called. So each is read between its own hooks, which is what weight_norm,
spectral_norm, pruning and FSDP2 need, with the weights of LoRA adapters added. What can't be read so is
refused in a sentence. Hooks that are set for all modules at once, by `register_module_forward_hook`, do not
run.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import _checks
from ._initial import MapBatchNorm2d, MapLayerNorm, MixConv2d

MIXES = (MixConv2d, nn.Conv2d, nn.Linear)
NORMS = {
    MapBatchNorm2d: "batch",
    nn.BatchNorm2d: "batch",
    nn.SyncBatchNorm: "batch",
    MapLayerNorm: "layer",
    nn.LayerNorm: "layer",
    nn.Identity: "none",
}
# Classes of packages that are not imported here, by module and name.
FROZEN = {("torchvision.ops.misc", "FrozenBatchNorm2d"), ("timm.layers.norm_act", "FrozenBatchNormAct2d")}
LORA = {("peft.tuners.lora.layer", "Linear"), ("peft.tuners.lora.layer", "Conv2d")}
EXPECTED = {
    "mix": "a Conv2d or a Linear",
    "batch": "a BatchNorm2d, SyncBatchNorm or FrozenBatchNorm2d",
    "layer": "a LayerNorm",
    "none": "an Identity",
}
CALLED_BY_THE_REFERENCE = 'give the attention backend="reference", which then calls its modules on the maps'
# What hooks get as input.
NO_INPUT = (None,)


class Norm(NamedTuple):
    """The norm of the mixed maps: its kind, "none", "batch" or "layer", and its tensors [H], None where it
    has none. `from_batch`: batch norm takes the statistics of this batch, with `process_group` those of the
    batches of all its processes."""

    kind: str
    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    eps: float = 0.0
    from_batch: bool = False
    process_group: Any = None


def effective_mix(attn, name="reatten_matrix", otherwise=CALLED_BY_THE_REFERENCE):
    """(weight [H, H], bias [H] or None) of a mix of `attn`, as its hooks and LoRA adapters make them.

    Raises TypeError for a module that can't be read; `otherwise` is what the sentence tells to do.
    """
    sentence = _why_not_mix(getattr(attn, name), name)
    _raise(sentence and sentence.replace(CALLED_BY_THE_REFERENCE, otherwise))
    return read_mix(attn, name)


def effective_norm(attn):
    """The `Norm` of the mixed maps of a ReAttention. Raises TypeError for a module that can't be read."""
    _raise(_why_not_norm(attn.var_norm, attn.map_norm))
    return read_norm(attn)


def why_not(attn):
    """Why the mixes and the norm of an attention can't be read, a sentence; None when they can."""
    if _reattends(attn):
        first = _why_not_mix(attn.reatten_matrix, "reatten_matrix")
        return first or _why_not_norm(attn.var_norm, attn.map_norm)
    sentences = (_why_not_mix(getattr(attn, name), name) for name in attn.mixes)
    return next(filter(None, sentences), None)


def hooked(attn):
    """Whether one of these modules has hooks of its own."""
    if _reattends(attn):
        return _hooks(attn.reatten_matrix) or _hooks(attn.var_norm)
    return any(_hooks(getattr(attn, name)) for name in attn.mixes)


def _reattends(attn):
    return "map_norm" in attn.__dict__


def read_mix(attn, name):
    """`effective_mix` where `why_not` is None."""
    return _adapted(getattr(attn, name), name)


def read_norm(attn):
    """`effective_norm` where `why_not` is None."""
    module = attn.var_norm
    kind = norm_kind(module)
    if kind == "none":
        return Norm(kind)
    weight, bias = _read(module, "var_norm")
    if kind == "layer":
        return Norm(kind, weight, bias, eps=module.eps)
    mean, var = module.running_mean, module.running_var
    # as the module itself: its own mode, so that it can be frozen; the batch's statistics if none are kept
    from_batch = kind == "batch" and (module.training or mean is None)
    return Norm("batch", weight, bias, mean, var, module.eps, from_batch, _process_group(module))


def _process_group(batch_norm):
    """The processes whose statistics a batch norm shares, as torch's own forward has it; else None."""
    if not isinstance(batch_norm, nn.SyncBatchNorm) or not batch_norm.training:
        return None
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    return batch_norm.process_group or torch.distributed.group.WORLD


def _raise(sentence):
    if sentence is not None:
        raise TypeError(sentence)


def _plain(module):
    """Whether there is nothing to run."""
    return not _hooks(module) and "forward" not in module.__dict__ and _foreign_tensor(module) is None


def _hooks(module):
    return (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _class_in(module, known):
    """The class of `known` whose forward the module has, or None. It may be a subclass: parametrizations and
    FSDP2 make some."""
    for cls in type(module).__mro__:
        if cls in known:
            return cls
        if "forward" in vars(cls):
            return None
    return None


def _named(module, names):
    return (type(module).__module__, type(module).__name__) in names


def norm_kind(module):
    """Which norm it is: "batch", "frozen" (of fixed statistics), "layer", "none", or None where it is no norm
    of maps."""
    kind = NORMS.get(type(module))
    return kind or ("frozen" if _named(module, FROZEN) else NORMS.get(_class_in(module, NORMS)))


def _foreign_tensor(module):
    """A parameter that is no tensor of torch's own, as quantised weights are, or None. A parametrized weight
    is not looked at: each look may take a step, as spectral norm's does."""
    for tensor in module._parameters.values():
        if (
            type(tensor) is not nn.Parameter
            and is_traceable_wrapper_subclass(tensor)
            and not type(tensor).__module__.startswith("torch.")
        ):
            return tensor
    return None


def _why_not_mix(module, name):
    kind = type(module)
    if kind not in MIXES and _named(module, LORA):
        return _why_not_lora(module, name) or _why_not_mix(module.base_layer, f"{name}.base_layer")
    cls = kind if kind in MIXES else _class_in(module, MIXES)
    if cls is None:
        return _instead(name, EXPECTED["mix"], type(module).__name__)
    if cls is not nn.Linear and (module.kernel_size, module.stride, module.padding, module.groups) != (
        (1, 1), (1, 1), (0, 0), 1,
    ):  # fmt: skip
        return _instead(name, "a Conv2d of kernel 1, stride 1, padding 0 and one group", module)
    return _why_not_read(module, name)


def _why_not_norm(module, wanted):
    kind = norm_kind(module)
    if kind == "frozen":
        if any(not isinstance(getattr(module, part, None), nn.Identity | None) for part in ("act", "drop")):
            return _instead("var_norm", "without activation and dropout", module)
        kind = "batch"
    # folding batch norm into the mix leaves an Identity
    if kind not in (wanted, "none"):
        return _instead("var_norm", EXPECTED[wanted], type(module).__name__)
    return _why_not_read(module, "var_norm")


def _why_not_read(module, name):
    if _plain(module):
        return None
    if "forward" in module.__dict__:
        return _instead(name, "a module with the forward of its class", "one whose forward was replaced")
    foreign = _foreign_tensor(module)
    if foreign is not None:
        return _instead(name, "a module of plain tensors", f"a {type(foreign).__name__} in it")
    for hooks in (module._forward_hooks, module._backward_hooks, module._backward_pre_hooks):
        for hook in hooks.values():
            if not (getattr(hook, "__module__", None) or "").startswith("torch.distributed."):
                return _instead(name, "without hooks on its output and gradients", _name_of(hook))
    return None


def _why_not_lora(module, name):
    if _hooks(module):
        return _instead(name, "a LoRA layer without hooks", _name_of(next(iter(_hooks(module).values()))))
    if module.disable_adapters or module.merged:
        return None
    for adapter in _adapters(module):
        dropout, up = module.lora_dropout[adapter], module.lora_B[adapter]
        if adapter in getattr(module, "lora_variant", ()) or getattr(module, "use_dora", {}).get(adapter):
            return _instead(name, "plain LoRA", f"a variant as adapter {adapter!r}")
        if dropout.training and getattr(dropout, "p", 0) > 0:
            return _instead(name, "LoRA without dropout", f"lora_dropout={dropout.p}")
        if up.bias is not None:
            return _instead(name, "LoRA without bias", f"lora_bias in adapter {adapter!r}")
        if not (_plain(module.lora_A[adapter]) and _plain(up)):
            return _instead(name, "LoRA of plain layers", f"other layers or hooks in adapter {adapter!r}")
    return None


def _instead(name, expected, got):
    return (
        f"{name} must be {expected}, got {got}: its tensors are read and it is never called; change it back, "
        f"or {CALLED_BY_THE_REFERENCE}"
    )


def _name_of(hook):
    return getattr(hook, "__qualname__", None) or type(hook).__name__


def _adapters(module):
    return [adapter for adapter in module.active_adapters if adapter in module.lora_A]


def _adapted(module, name):
    if type(module) in MIXES or not _named(module, LORA):
        return _read(module, name)
    weight, bias = _adapted(module.base_layer, f"{name}.base_layer")
    if not (module.disable_adapters or module.merged):
        with _checks.autocast_off(weight):
            for adapter in _adapters(module):
                weight = weight + module.get_delta_weight(adapter).flatten(1).to(weight.dtype)
    return weight, bias


def _read(module, name):
    """Weight, [H, H] or [H], and bias, read between the module's hooks."""
    for key, hook in module._forward_pre_hooks.items():
        with_kwargs = key in module._forward_pre_hooks_with_kwargs
        try:
            changed = hook(module, NO_INPUT, {}) if with_kwargs else hook(module, NO_INPUT)
        except (AttributeError, IndexError, TypeError) as error:
            raise TypeError(
                _instead(name, "without hooks that read its input", f"{_name_of(hook)}, which failed")
            ) from error
        if with_kwargs and changed is not None:
            changed = changed[0]
        if changed is not None and changed != NO_INPUT:
            raise TypeError(_instead(name, "without hooks that change its input", _name_of(hook)))
    weight, bias = module.weight, module.bias
    if weight is not None and weight.dim() > 1:
        weight = weight.flatten(1)
    if not module._forward_hooks:
        return weight, bias
    # FSDP2's: they free what was gathered, and gather it again before the backward of what they are given
    read = tuple(None if tensor is None else tensor.clone() for tensor in (weight, bias))
    for key, hook in module._forward_hooks.items():
        with_kwargs = key in module._forward_hooks_with_kwargs
        changed = hook(module, NO_INPUT, {}, read) if with_kwargs else hook(module, NO_INPUT, read)
        read = read if changed is None else changed
    return read
