"""What the attentions share: timm's constructor, the packed projection, options as a class."""

import copyreg
import functools
import inspect
from typing import Any, TypeVar

import torch
from torch import nn

from .. import _checks, _dispatch
from . import effective


def attend(attn, x, attn_mask, is_causal, **options):
    """The forward of an attention; in a graph of torch.fx, which can't trace it, one call."""
    if isinstance(x, torch.fx.Proxy) and x.tracer.root is attn:
        raise TypeError(f"torch.fx takes {type(attn).__name__} whole: trace a module that holds it")
    return vitdiv_attention(attn, x, attn_mask, is_causal, **options)


@torch.fx.wrap
def vitdiv_attention(attn, x, attn_mask, is_causal, **options):
    if attn_mask is not None or is_causal:
        raise ValueError(
            f"attn_mask must be None and is_causal False: {type(attn).__name__} mixes maps over all keys"
        )
    return attn._attend(x, **options)


Attention = TypeVar("Attention", bound="PackedAttention")


class PackedAttention(nn.Module):
    """Attention with timm's arguments and names: `qkv`, `q_norm`, `k_norm`, `norm`, `gate`, `proj`.

    A subclass adds its mixes between `_add_input` and `_add_output`: the order of the state dict is that of
    the published modules.
    """

    def _add_input(
        self, dim, num_heads, attn_head_dim, qk_scale, qkv_bias, qk_norm, scale_norm, norm_layer, kind
    ):
        if attn_head_dim is None and dim % num_heads != 0:
            raise ValueError(f"num_heads must divide dim, got num_heads {num_heads} and dim {dim}")
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError("norm_layer must be given when qk_norm or scale_norm is True")
        self.num_heads = num_heads
        self.head_dim = attn_head_dim or dim // num_heads
        self.attn_dim = num_heads * self.head_dim
        default = self.head_dim**-0.5
        self.scale = default if qk_scale is None else _checks.positive("qk_scale", qk_scale)
        self.qkv = nn.Linear(dim, 3 * self.attn_dim, bias=qkv_bias, **kind)
        self.q_norm = norm_layer(self.head_dim, **kind) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **kind) if qk_norm else nn.Identity()

    def _add_output(self, dim_out, qkv_bias, scale_norm, proj_bias, gated, proj_drop, norm_layer, kind):
        dim = self.qkv.in_features
        self.norm = norm_layer(self.attn_dim, **kind) if scale_norm else nn.Identity()
        self.gate = nn.Linear(dim, self.attn_dim, bias=qkv_bias, **kind) if gated else None
        self.proj = nn.Linear(self.attn_dim, dim_out or dim, bias=proj_bias, **kind)
        self.proj_drop = nn.Dropout(proj_drop)

    def _split(self, x):
        """q, k and v [B, H, N, d], views into the packed projection of x [B, N, dim]."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def _project(self, out, x):
        batch, tokens, _ = x.shape
        out = self.norm(out.transpose(1, 2).reshape(batch, tokens, self.attn_dim))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def _calls_modules(self, q):
        """Whether the mixes and the norm are called on the maps: by the backend "reference", where they can't
        be read or have hooks. Raises TypeError for what can't be read, if another backend is to run."""
        sentence = effective.why_not(self)
        if sentence is None and not effective.hooked(self):
            return False
        if _dispatch.resolve("reattention", q.device, self.backend) == "reference":
            return True
        if sentence is not None:
            raise TypeError(sentence)
        return False

    def _called(self, module, maps):
        """module(maps) in the dtype of its parameters."""
        parameter = next(module.parameters(), maps)
        return module(maps.to(parameter.dtype))

    def reset_parameters(self) -> None:
        """Gives every layer its initial values again."""
        for child in self.children():
            if (reset := getattr(child, "reset_parameters", None)) is not None:
                reset()

    def init_weights(self) -> None:
        """Nothing: what timm's models, which call it, gave the Linear layers before stays."""

    @classmethod
    def with_options(cls: type[Attention], **options: Any) -> type[Attention]:
        """This class with other defaults, for models that take a class:
        `ReAttention.with_options(norm="layer")`.

        The options hold whatever the model gives. Equal options give the same class; it, its instances and
        whole models with it can be copied and pickled. Raises TypeError for an unknown option.
        """
        known = list(inspect.signature(cls.__init__).parameters)[3:]  # without self, dim and num_heads
        for name in options:
            if name not in known:
                raise TypeError(f"{cls.__name__} has no option {name!r}; its options are {', '.join(known)}")
            if getattr(options[name], "__hash__", None) is None:
                given = type(options[name]).__name__
                raise TypeError(f"{name} must be hashable, for a class is made for each value, got a {given}")
        return _with_options(cls, tuple(sorted(options.items())))  # type: ignore[arg-type]


class _Optioned(type):
    """The type of classes made by `with_options`: no module has them, they are pickled by their options."""


@functools.cache
def _with_options(cls, options):
    def __init__(self, *args, **kwargs):
        super(made, self).__init__(*args, **{**kwargs, **dict(options)})

    __init__.__signature__ = inspect.signature(cls.__init__)
    name = f"{cls.__name__}[{', '.join(f'{option}={value!r}' for option, value in options)}]"
    body = {
        "__init__": __init__,
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "_made_of": (cls, options),
    }
    made = _Optioned(name, (cls,), body)
    return made


def _reduce(cls):
    # a subclass of one is found by its name
    return (_with_options, cls.__dict__["_made_of"]) if "_made_of" in cls.__dict__ else cls.__qualname__


copyreg.pickle(_Optioned, _reduce)
