"""The training loop: AdamW, cosine schedule, clipping, label smoothing, CutMix, bf16, log, exact resume."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _dispatch, use_backend
from .._types import Backend
from ..attach.monitor import CollapseMonitor, read_records, write_records
from ..attach.objective import DiversityObjective
from ..losses import cutmix_shares
from ..vit import ViT
from . import checkpoint, cutmix
from .data import Data, ImageSet, StepBatches, batches_of
from .errors import TrainError
from .logs import Row, csv_log
from .loss_weights import mixes, objective_terms
from .recipe import Recipe, learning_rate


@contextlib.contextmanager
def flushed_denormals() -> Iterator[None]:
    """Denormal numbers, with which processors are slow, count as zero in this thread; as before afterwards.

    Enter after the imports: numpy warns where it finds denormals flushed.
    """
    smallest = torch.finfo(torch.float32).tiny
    before = bool(torch.tensor(smallest) / 2 == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay for the network's matrices only: not for biases, norms, position embedding, class token."""
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (decayed if p.ndim >= 2 and name not in ("pos_embed", "cls_token") else rest).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def processes() -> int:
    """How many processes this one was started with, by torchrun or what sets the same variables."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    world = os.environ.get("WORLD_SIZE", "")
    return int(world) if world.isdecimal() else 1


@torch.no_grad()
def accuracy(model: nn.Module, data: ImageSet, device: str | torch.device = "cpu", batch: int = 256) -> float:
    """Share of the images whose class is right, in evaluation mode; the model's mode is restored."""
    was_training = model.training
    model.eval()
    right = 0
    for start in range(0, len(data), batch):
        images, labels = data.__getitems__(list(range(start, min(start + batch, len(data)))))
        right += int((model(images.to(device)).argmax(-1) == labels.to(device)).sum())
    model.train(was_training)
    return right / len(data)


class Trainer:
    """Trains a ViT on Data; `save` and `load` keep everything that the next step needs.

    The model must have been built under the recipe's seed by the caller if runs are to repeat. With
    `log_path` a CSV row is written every `log_every` steps, with the validation accuracy every `eval_every`
    steps and after the last one. With `monitor_every` a CollapseMonitor measures at every so many steps, on
    images of the step as they are before augmentation; its records go to collapse.csv beside the log.
    """

    def __init__(
        self,
        model: ViT,
        data: Data,
        recipe: Recipe,
        *,
        device: str = "cpu",
        backend: Backend = "auto",
        log_path: Path | None = None,
        log_every: int = 10,
        eval_every: int = 100,
        workers: int = 0,
        compile: bool = False,
        monitor_every: int = 0,
    ) -> None:
        if processes() > 1:
            raise TrainError(
                f"the trainer runs as one process, and this is one of {processes()} (WORLD_SIZE), which "
                "would all write the same files: start it with python, not with torchrun"
            )
        if len(data.train) < recipe.batch:
            raise TrainError(
                f"the batch ({recipe.batch}) is larger than the training set ({len(data.train)} images)"
            )
        if recipe.cutmix is not None and not 0 <= recipe.cutmix <= 1000:
            raise TrainError(f"cutmix must be a number from 0 to 1000, got {recipe.cutmix}")
        if recipe.losses and model.patch_embed.num_patches < 2:
            raise TrainError("diversity losses need at least two patches, but the model has one")
        self.device, self.backend, self.workers = torch.device(device), backend, workers
        self.model, self.data = model.to(device), data
        self.objective: DiversityObjective | None = None
        try:
            with self._chosen_backend():
                for operation in _dispatch.OPERATIONS:
                    _dispatch.resolve(operation, self.device, "auto")
            if recipe.losses:
                # for good, and before the model is compiled: forward passes without gradients leave no trace
                terms = objective_terms(recipe.losses, recipe.label_smoothing)
                self.objective = DiversityObjective(terms).attach(self.model)
        except (RuntimeError, TypeError, ValueError) as error:
            raise TrainError(str(error)) from None
        self.patches_mix = self.objective is not None and any(map(mixes, self.objective.terms.values()))
        self.recipe = recipe if recipe.cutmix is not None else replace(recipe, cutmix=float(self.patches_mix))
        self.monitor: CollapseMonitor | None = None
        if monitor_every:
            csv_path = None if log_path is None else log_path.with_name("collapse.csv")
            self.monitor = CollapseMonitor(self.model, every=monitor_every, csv=csv_path)
        self.run = torch.compile(model) if compile else model
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, recipe.weight_decay), lr=recipe.lr, betas=recipe.betas, fused=True
        )
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.augment_rng = torch.Generator().manual_seed(recipe.seed)
        self.step = 0
        self.stop_requested = False
        self.rows: list[Row] = []
        self.log_path, self.log_every, self.eval_every = log_path, log_every, eval_every
        names = self.objective.terms if self.objective else ()
        self.columns = ["step", "epoch", "loss", "cross_entropy", *names, "lr", "grad_norm", "val_accuracy"]

    def losses(self, images: Tensor, labels: Tensor, box: cutmix.Box | None = None) -> dict[str, Tensor]:
        """Cross-entropy, each diversity loss unweighted, and `loss`, their weighted sum.

        Of images that CutMix has mixed at `box` the cross-entropies with the labels of both are weighted by
        their shares of the area.
        """
        size = images.shape[-2:]
        mixing = self._patch_labels(labels, box, size) if self.patches_mix else None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.amp):
            logits = self.run(images)
            total, terms = self.objective(mixing=mixing) if self.objective else (0.0, {})
        cross_entropy = self._cross_entropy(logits, labels)
        if box:
            share = cutmix.share_left(box, *size)
            others = self._cross_entropy(logits, labels.flip(0))
            cross_entropy = share * cross_entropy + (1 - share) * others
        return terms | {"cross_entropy": cross_entropy, "loss": cross_entropy + total}

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.label_smoothing)

    def _patch_labels(
        self, labels: Tensor, box: cutmix.Box | None, size: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """labels, others and shares for patch_mixing; images that are not mixed have an empty box."""
        grid = [pixels // self.model.config.patch for pixels in size]
        shares = cutmix_shares(box or (0, 0, 0, 0), image_size=size, grid=grid)
        return labels, labels.flip(0), shares.to(self.device, non_blocking=True)

    def train_step(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
        """One update; returns the losses and the gradient norm before clipping, as detached scalars."""
        lr = learning_rate(self.recipe, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        images = self.data.augment(images.to(self.device, non_blocking=True), self.augment_rng)
        box = None
        if self.recipe.cutmix:
            height, width = images.shape[-2:]
            box = cutmix.draw_box(height, width, self.recipe.cutmix, self.augment_rng)
            images = cutmix.mix(images, box)
        terms = self.losses(images, labels.to(self.device, non_blocking=True), box)
        self.optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip or math.inf)
        self.optimizer.step()
        self.step += 1
        return {name: value.detach() for name, value in terms.items()} | {"lr": lr, "grad_norm": norm}

    def fit(
        self, until: int | None = None, on_step: Callable[[int, dict[str, Any]], None] | None = None
    ) -> None:
        """Trains to step `until` (default: the recipe's last), or until `stop_requested` is set.

        May be called again for more. `on_step(step, terms)` is called after each step. Raises TrainError when
        the loss is not finite at a logged step, DataError when an image can't be read.
        """
        until = self.recipe.steps if until is None else min(until, self.recipe.steps)
        steps = StepBatches(len(self.data.train), self.recipe.batch, self.recipe.seed, self.step, until)
        batches = batches_of(self.data.train, steps, self.workers, pin_memory=self.device.type == "cuda")
        self.model.train()
        with self._chosen_backend(), csv_log(self.log_path, self.columns, self.rows) as log:
            if self.monitor and self.monitor.csv:
                write_records(self.monitor.csv, self.monitor.records)
            for images, labels in batches:
                terms = self.train_step(images, labels)
                measure = self.step == self.recipe.steps or self.step % self.eval_every == 0
                if measure or self.step % self.log_every == 0:
                    self.rows.append(self._row(terms, steps.per_epoch, measure))
                    log(self.rows[-1])
                if self.monitor:
                    self.monitor.step(images, self.step)
                if on_step:
                    on_step(self.step, terms)
                if self.stop_requested:
                    break

    def _chosen_backend(self) -> contextlib.AbstractContextManager[Any]:
        """Sets the backend of the fused operations; `auto` leaves it to VITDIV_BACKEND and the table."""
        return contextlib.nullcontext() if self.backend == "auto" else use_backend(self.backend)

    def _row(self, terms: dict[str, Any], per_epoch: int, measure: bool) -> Row:
        row: Row = {"step": self.step, "epoch": round(self.step / per_epoch, 3)}
        row |= {name: float(terms[name]) for name in self.columns if name in terms}
        if not math.isfinite(row["loss"]):
            raise TrainError(
                f"the loss is {row['loss']} at step {self.step}: try a smaller --lr or --clip, or no --amp"
            )
        row["val_accuracy"] = accuracy(self.model, self.data.val, self.device) if measure else ""
        return row

    def save(self, path: Path) -> None:
        """Writes a checkpoint; one that was there stays whole until then."""
        checkpoint.write(
            path,
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "rows": self.rows,
                **self._made_with(),
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
                "augment_rng": self.augment_rng.get_state(),
            },
        )

    def _made_with(self) -> dict[str, Any]:
        """What a run that goes on must have as it was."""
        config = checkpoint.plain(asdict(self.model.config))
        return {"recipe": asdict(self.recipe), "config": config, "classes": list(self.data.classes)}

    def load(self, path: Path) -> None:
        """Restores a checkpoint of the same model, recipe and classes; otherwise raises TrainError."""
        state = checkpoint.read(path)
        now, then = (
            made["recipe"] | made["config"] | {"classes": made["classes"]}
            for made in (self._made_with(), state)
        )
        changed = [
            f"{name} {then.get(name)!r}, now {now[name]!r}" for name in now if now[name] != then.get(name)
        ]
        if changed:
            raise TrainError(
                f"{path} was made with {'; '.join(changed)}: resume with the same, or start anew"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.rows = state["step"], state["rows"]
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        self.augment_rng.set_state(state["augment_rng"])
        if self.monitor and self.monitor.csv and self.monitor.csv.exists():
            try:
                records = read_records(self.monitor.csv)
            except ValueError as error:
                raise TrainError(str(error)) from None
            self.monitor.records = [record for record in records if record["step"] <= self.step]
