"""All diversity losses of a training step in one object, attached to a ViT by hooks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import region_means
from . import _blocks, _recorder, _sharded, _tokens
from .parts import ModelParts
from .presets import PRESETS
from .terms import EMBEDDINGS, LOSSES, Term, options_of


class DiversityObjective:
    """The weighted sum of diversity losses, of what a ViT computes in its forward pass.

    Args:
        config: the name of a preset, "gong2021", "gong2021_released", "diverse_vit_deit_small",
            "deepvit_cos_reg" or "deepvit_32b"; or a mapping of names of your own to `Term`s, or of names of
            losses to weights; or of both.
        num_prefix_tokens: class and register tokens in front, which losses on patches drop; None takes those
            that the model tells (num_prefix_tokens, or DINOv2's num_register_tokens or DINOv3's
            n_storage_tokens and the class token), else those that are there beside its patches.

    It hooks the blocks that its losses need, and their q, k and v projections; the model is not changed, and
    `detach` takes the hooks away, as does the end of the objective. Nothing is copied: it holds references to
    tensors that the backward pass holds anyway, until it is called. A forward pass without gradients
    (validation) leaves no trace. Of several forward passes the last one counts.

    DistributedDataParallel: attach before or after wrapping; the losses are those of the images of each
    process, and their gradients are averaged as those of the task are. The same holds for fully_shard
    (FSDP2), where all processes must call the objective, which gathers weights that it reads outside of the
    forward pass. FullyShardedDataParallel (FSDP1) runs all losses but those that read such weights, which
    `attach` refuses.

    torch.compile: hooks are compiled into the model if they are there at its first call; attach before it. A
    model that was compiled without them runs on without them, and the objective says so with a RuntimeError
    when it is called. torch.compile does not see the hooks of a module where it has code of another of its
    class, of a model without an objective or, where blocks are compiled one by one, of a block that has no
    hook: with `torch._dynamo.config.skip_nnmodule_hook_guards = False` it does. torch.export leaves no trace,
    and no hooks in what it exports.

    Activation checkpointing with use_reentrant=False is exact; with use_reentrant=True blocks run without
    gradients, and the objective says so. Call it before the backward pass: what that runs again is not kept.

    A copy of an attached objective, also one that was pickled, is attached to a copy of its model, the one
    that is made with it. A copy of the model alone, such as that of a moving average, keeps nothing.

    Attention maps are those of the softmax, before dropout and before re-attention or talking heads mix
    them; cos_reg takes the mixed and normalised maps, as published. Where talking heads mix the logits, q and
    k are made H times as wide, so that losses on maps cost about H times as much. A mask, where blocks are
    called with attn_mask or is_causal, is refused for maps, and padded tokens for all losses.
    neighbourhood_contrast takes, as released, patches after the final norm (model.norm, and fc_norm) and
    embeddings without their positions, the output of model.patch_embed; its grid, as that of region_contrast,
    is that of the images in the forward pass. region_mixing takes, as released, the mean patch of each region
    after the final norm, through model.head_drop, where there is one, to model.patch_head, a head of its own.

    Give the task's loss to presets of released code: "diverse_vit_deit_small" divides it by N + 1, with those
    of the patches (`Term.with_task`). Losses that need a teacher or the gradients of patches are not here:
    see `vitdiv_kernels.losses`.

    Example:
        >>> import torch
        >>> from vitdiv_kernels import DiversityObjective
        >>> from vitdiv_kernels.vit import CONFIGS, ViT
        >>> model = ViT(CONFIGS["digits24"])
        >>> with DiversityObjective({"pairwise_cosine": 0.5, "koleo": 0.1}).attach(model) as objective:
        ...     logits = model(torch.rand(8, 1, 8, 8))
        ...     total, parts = objective()
        ...     (logits.logsumexp(-1).mean() + total).backward()
    """

    def __init__(
        self, config: str | Mapping[str, float | Term], *, num_prefix_tokens: int | None = None
    ) -> None:
        if isinstance(config, str):
            if config not in PRESETS:
                raise ValueError(f"unknown preset {config!r}: there are {', '.join(PRESETS)}")
            config = PRESETS[config]
        if not isinstance(config, Mapping) or not config:
            raise TypeError(f"config must be a preset or a mapping of names to terms, got {config!r}")
        self.terms = {
            name: value if isinstance(value, Term) else Term(name, value) for name, value in config.items()
        }
        self.num_prefix_tokens = num_prefix_tokens
        self.model: Any = None
        self.parts: Any = None
        self.attentions: dict[int, Any] = {}
        self.recorder: _recorder.Recorder | None = None

    def attach(self, model: nn.Module, parts: ModelParts | None = None) -> "DiversityObjective":
        """Puts hooks on the blocks of model; returns the objective, which as a context manager detaches.

        Args:
            model: of a family that is known (`docs/objective.md` has a table), or any with `parts`.
            parts: where the blocks, tokens and attentions of the model are; None finds them.

        Raises TypeError for a model that is not known, for losses on maps where these are not known, for
        losses on weights that are adapted or quantised, and for those that need weights which FSDP1 holds;
        ValueError for blocks that it has not; RuntimeError where the objective is attached already.
        """
        if self.attached:
            raise RuntimeError("the objective is attached already: detach it first")
        model = _blocks.plain_model(model)
        parts = _blocks.parts_of(model, parts)
        layers = {name: self._layers(term, len(parts.blocks)) for name, term in self.terms.items()}
        tokens, heads, patch_embed = set(), set(), False
        attentions: dict[int, Any] = {}
        for name, term in self.terms.items():
            kind = LOSSES[term.loss].kind
            if kind in ("patches", "embeddings", "logits", "regions"):
                tokens |= set(layers[name])
            else:
                attentions |= {i: _blocks.attention_of(model, parts, i) for i in layers[name]}
                heads |= set(layers[name] if kind in ("heads", "maps") else ())
                for i in layers[name]:
                    attentions[i].check_weight() if kind == "weights" else attentions[i].check_maps()
            if kind == "logits" and (parts.head is None or not parts.norms):
                raise TypeError(
                    f"{term.loss} needs model.norm and model.head, which make logits of tokens: give parts "
                    "with norms and head"
                )
            has_patch_head = isinstance(getattr(model, "patch_head", None), nn.Module)
            if kind == "regions" and not (parts.norms and has_patch_head):
                raise TypeError(
                    "region_mixing needs model.norm and model.patch_head: set the latter to "
                    "nn.Linear(features, classes), which the optimizer must learn, too"
                )
            if kind == "embeddings":
                if parts.patch_embed is None or not parts.norms:
                    raise TypeError(
                        f"{term.loss} needs model.patch_embed and model.norm, the final norm: give parts "
                        "with patch_embed and norms"
                    )
                patch_embed = True
        _tokens.check_prefix(model, self.num_prefix_tokens)
        if _sharded.is_flat(model):
            self._check_flat(attentions, layers)
        self.recorder = _recorder.Recorder(
            model, parts, tokens, {i: attentions[i] for i in heads}, patch_embed=patch_embed
        )
        self.model, self.parts, self.attentions, self.layers = model, parts, attentions, layers
        return self

    @property
    def attached(self) -> bool:
        """Whether its hooks are on a model."""
        return self.recorder is not None and self.recorder.remove.alive

    def detach(self) -> None:
        """Takes the hooks away; does nothing where there are none."""
        if self.recorder is not None:
            self.recorder.remove()
        self.model, self.parts, self.recorder = None, None, None
        self.attentions = {}

    def __enter__(self) -> "DiversityObjective":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __call__(
        self,
        *,
        task: Tensor | None = None,
        mixing: tuple[Tensor, Tensor, Tensor] | None = None,
        regions: tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses of the last forward pass, which is then forgotten.

        Args:
            task: the loss of the task, a scalar, such as the cross-entropy of the logits: it becomes part of
                the total, with weight 1, or 1 / (N + 1) where a term with a weight is `with_task`.
            mixing: for patch_mixing: labels [B], others [B] and shares [N] or [B, N], as
                `losses.patch_mixing` takes them (`losses.cutmix_shares` makes shares from a box).
            regions: for region_mixing: targets [B, R, C] and masks [R, rows, columns], as
                `losses.mix_two_images` makes and takes them.
            generator: torch.Generator on the model's device, for the losses that draw start vectors.

        Returns:
            total, a scalar, the weighted sum; and parts, a dict of the losses before weighting, by the names
            in the config, without the task's.

        Raises RuntimeError where it is not attached, or where no forward pass was recorded, with the blocks
        and the likely cause; ValueError where patch_mixing has no `mixing` or region_mixing no `regions`,
        where the prefix tokens or the grid are not known, or where tokens are padded; TypeError where `task`
        is no scalar tensor.
        """
        if self.recorder is None or not self.attached:
            raise RuntimeError("the objective is not attached: call attach(model) before the forward pass")
        if task is not None and not (isinstance(task, Tensor) and task.numel() == 1):
            given = f"shape {list(task.shape)}" if isinstance(task, Tensor) else type(task).__name__
            raise TypeError(f"task must be a loss, a tensor of one number, got {given}")
        kept = self.recorder.take()
        layout = _tokens.Layout(self.model, self.parts, kept, self.num_prefix_tokens)
        layout.check_masks(maps=any(key[0] == "heads" for key in kept))
        for key in [key for key in kept if key[0] == "tokens"]:
            # cut once: the gradient of each cut is a copy of all tokens
            prefix, tokens = layout.prefix(key[1], kept[key]), kept[key].shape[1]
            if prefix >= tokens:
                raise ValueError(
                    f"num_prefix_tokens must leave patches: of {tokens} tokens {prefix} are dropped"
                )
            kept[key] = kept[key][:, prefix:]
        labels = {"logits": mixing, "regions": regions}
        parts = {name: self._part(name, kept, layout, labels, generator) for name in self.terms}
        weights = {name: term.weight for name, term in self.terms.items()}
        if task is None:
            return sum(weights[name] * parts[name] for name in parts), parts
        total: Any = task.reshape(())
        for name, term in self.terms.items():
            if term.with_task and term.weight:
                n = kept["tokens", self.layers[name][0]].shape[1]
                weights[name] *= n / (n + 1)
                total = task.reshape(()) / (n + 1)
        return total + sum(weights[name] * parts[name] for name in parts), parts

    def _check_flat(self, attentions, layers):
        for name, term in self.terms.items():
            kind = LOSSES[term.loss].kind
            reads = kind in ("logits", "embeddings", "regions") or (
                kind != "patches" and any(attentions[i].reads_weights(kind) for i in layers[name])
            )
            if reads:
                raise TypeError(
                    f"{term.loss} reads weights outside of the forward pass, where FullyShardedDataParallel "
                    "has parts of them only: shard the model with torch.distributed.fsdp.fully_shard instead"
                )

    def _layers(self, term, depth):
        """Block numbers from 0, and -1 for the embeddings, as the recorder has them."""
        layers = range(depth) if term.layers == "all" else term.layers
        for i in layers:
            if i != EMBEDDINGS and not -depth <= i < depth:
                raise ValueError(f"{term.loss} takes block {i}, but the model has {depth} blocks")
        return [-1 if i == EMBEDDINGS else i % depth for i in layers]

    def _part(self, name, kept, layout, labels, generator):
        term, layers = self.terms[name], self.layers[name]
        kind, number, _ = LOSSES[term.loss]
        options = dict(term.options)
        if generator is not None and "start" not in options and "generator" in options_of(term.function):
            options["generator"] = generator
        if kind == "weights":
            return term.function([self.attentions[i].weight() for i in layers], **options)
        if kind in ("logits", "regions"):
            mixed = self._mixing if kind == "logits" else self._regions
            return _mean([mixed(term, kept["tokens", i], labels[kind], options) for i in layers])
        if "grid" in options_of(term.function) and options.get("grid") is None:
            options["grid"] = layout.known_grid(kept["tokens", layers[0]].shape[1])
        if kind == "patches":
            inputs = [(kept["tokens", i],) for i in layers]
        elif kind == "embeddings":
            patches = [self._normed(kept["tokens", i]) for i in layers]
            embedded = kept["patch_embed", 0]
            for i, x in zip(layers, patches, strict=True):
                if x.shape != embedded.shape:
                    place = _blocks.place_of(self.model, self.parts.blocks[max(0, i)])
                    raise ValueError(
                        f"layers of {term.loss} must have the patches that model.patch_embed makes, "
                        f"{list(embedded.shape)}, but {place} has {list(x.shape)}"
                    )
            # under autocast the embedding is a convolution in half precision, the norm is not
            inputs = [(x, embedded.to(x.dtype)) for x in patches]
        else:
            inputs = [self.attentions[i].query_key(kept["heads", i]) for i in layers]
        if kind == "maps":
            mixed = [self.attentions[i].mixed_layer(*qk) for i, qk in zip(layers, inputs, strict=True)]
            return term.function(mixed, **options)
        if number == 2:
            self._check_two(term, layers, *(each[0] for each in inputs))
            return term.function(*inputs[0], *inputs[1], **options)
        return _mean([term.function(*each, **options) for each in inputs])

    def _check_two(self, term, layers, first, last):
        if first.shape[1:] != last.shape[1:]:
            places = [_blocks.place_of(self.model, self.parts.blocks[max(0, i)]) for i in layers]
            raise ValueError(
                f"layers of {term.loss} must be two of the same width and number of tokens, but {places[0]} "
                f"has {list(first.shape)} and {places[1]} {list(last.shape)}: name two of one stage"
            )

    def _normed(self, patches):
        for norm in self.parts.norms:
            patches = _sharded.call(norm, patches)
        return patches

    def _regions(self, term, patches, regions, options):
        if regions is None:
            raise ValueError(
                "region_mixing needs regions=(targets, masks): losses.mix_two_images makes the targets"
            )
        targets, masks = regions
        means = region_means(self._normed(patches), masks).to(patches.dtype)
        if isinstance(getattr(self.model, "head_drop", None), nn.Module):
            means = self.model.head_drop(means)
        return term.function(_sharded.call(self.model.patch_head, means), targets, masks, **options)

    def _mixing(self, term, patches, mixing, options):
        if mixing is None:
            raise ValueError(
                "patch_mixing needs mixing=(labels, others, shares): of images that are not mixed, "
                "(labels, labels, ones)"
            )
        return term.function(_sharded.call(self.parts.head, self._normed(patches)), *mixing, **options)


def _mean(values):
    return values[0] if len(values) == 1 else sum(values) / len(values)
