"""The training loop: AdamW, cosine schedule, clipping, label smoothing, CutMix, bf16, log, exact resume."""

import contextlib
import csv
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .. import _dispatch, use_backend
from ..attach.monitor import CollapseMonitor, read_records, write_records
from ..attach.objective import DiversityObjective
from ..losses import cutmix_shares
from ..vit.model import ViT
from . import cutmix
from .data import Data, DataError
from .losses import mixes, objective_terms
from .metrics import accuracy

CHECKPOINT = (
    "model",
    "optimizer",
    "step",
    "rows",
    "recipe",
    "config",
    "classes",
    "rng",
    "cuda_rng",
    "augment_rng",
)


class TrainError(RuntimeError):
    """Training can't start or go on; the message is one sentence for the user."""


@dataclass(frozen=True)
class Recipe:
    """How to train; all of it is kept in checkpoints, and a resumed run must have the same.

    `cutmix` is the alpha of CutMix's Beta distribution, at most 1000; 0 mixes no images. None is 1 where
    patch_mixing is among the losses, by itself or in a preset, as its papers train, and else 0.
    """

    steps: int = 1200
    batch: int = 32
    lr: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    label_smoothing: float = 0.1
    cutmix: float | None = None
    losses: dict[str, float] = field(default_factory=dict)
    amp: bool = False
    seed: int = 0


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


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then half a cosine down to a hundredth."""
    warm = max(1, int(recipe.warmup * recipe.steps))
    if step < warm:
        return recipe.lr * (step + 1) / warm
    done = (step - warm) / max(1, recipe.steps - warm)
    return recipe.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


class StepBatches:
    """The index lists of steps start..stop, a permutation for each epoch.

    It depends on the seed and the epoch alone, so a run can start at any step.
    """

    def __init__(self, size: int, batch: int, seed: int, start: int, stop: int) -> None:
        self.size, self.batch, self.seed, self.start, self.stop = size, batch, seed, start, stop
        self.per_epoch = size // batch

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        order_of = None
        for step in range(self.start, self.stop):
            epoch, i = divmod(step, self.per_epoch)
            if epoch != order_of:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order, order_of = torch.randperm(self.size, generator=generator).tolist(), epoch
            yield order[i * self.batch : (i + 1) * self.batch]


def as_batch(batch):
    return batch


def with_own_errors(loader: DataLoader) -> Iterator:
    """The loader's batches; a worker's DataError is cut back to its sentence.

    The loader raises it again with the whole traceback of the worker as its message.
    """
    try:
        yield from loader
    except DataError as error:
        name = f"{DataError.__module__}.{DataError.__qualname__}: "
        raise DataError(str(error).rpartition(name)[2].strip()) from None


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay for the network's matrices only: not for biases, norms, position embedding, class token."""
    plain = {"pos_embed", "cls_token"}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if p.ndim >= 2 and name not in plain]
    rest = [p for name, p in named if p.ndim < 2 or name in plain]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def processes() -> int:
    """How many processes this one was started with, by torchrun or what sets the same variables."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    world = os.environ.get("WORLD_SIZE", "")
    return int(world) if world.isdecimal() else 1


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
        backend: str = "auto",
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
        with self._chosen_backend():
            for operation in _dispatch.OPERATIONS:
                try:
                    _dispatch.resolve(operation, self.device, "auto")
                except (RuntimeError, ValueError) as error:
                    raise TrainError(str(error)) from None
        self.model, self.data = model.to(device), data
        self.objective = None
        if recipe.losses:
            try:
                # for good, and before the model is compiled: forward passes without gradients leave no trace
                terms = objective_terms(recipe.losses, recipe.label_smoothing)
                self.objective = DiversityObjective(terms).attach(self.model)
            except (TypeError, ValueError) as error:
                raise TrainError(str(error)) from None
        self.patches_mix = self.objective is not None and any(map(mixes, self.objective.terms.values()))
        self.recipe = recipe if recipe.cutmix is not None else replace(recipe, cutmix=float(self.patches_mix))
        self.monitor = None
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
        self.rows: list[dict] = []
        self.log_path, self.log_every, self.eval_every = log_path, log_every, eval_every

    @property
    def columns(self) -> list[str]:
        return [
            "step",
            "epoch",
            "loss",
            "cross_entropy",
            *(self.objective.terms if self.objective else ()),
            "lr",
            "grad_norm",
            "val_accuracy",
        ]

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
        terms["cross_entropy"] = cross_entropy
        terms["loss"] = cross_entropy + total
        return terms

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.label_smoothing)

    def _patch_labels(self, labels: Tensor, box: cutmix.Box | None, size: Sequence[int]) -> tuple:
        """labels, others and shares for patch_mixing; images that are not mixed have an empty box."""
        grid = [pixels // self.model.config.patch for pixels in size]
        shares = cutmix_shares(box or (0, 0, 0, 0), image_size=size, grid=grid)
        return labels, labels.flip(0), shares.to(self.device, non_blocking=True)

    def train_step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One update; returns the losses and the gradient norm before clipping, as detached scalars."""
        lr = learning_rate(self.recipe, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        images = self.data.augment(images.to(self.device, non_blocking=True), self.augment_rng)
        box = None
        if self.recipe.cutmix:
            box = cutmix.draw_box(*images.shape[-2:], self.recipe.cutmix, self.augment_rng)
            images = cutmix.mix(images, box)
        terms = self.losses(images, labels.to(self.device, non_blocking=True), box)
        self.optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip or math.inf)
        self.optimizer.step()
        self.step += 1
        return {name: value.detach() for name, value in terms.items()} | {"lr": lr, "grad_norm": norm}

    def fit(self, until: int | None = None, on_step: Callable[[int, dict], None] | None = None) -> None:
        """Trains to step `until` (default: the recipe's last), or until `stop_requested` is set.

        May be called again for more. `on_step(step, terms)` is called after each step. Raises TrainError when
        the loss is not finite at a logged step, DataError when an image can't be read.
        """
        until = self.recipe.steps if until is None else min(until, self.recipe.steps)
        batches = StepBatches(len(self.data.train), self.recipe.batch, self.recipe.seed, self.step, until)
        # A generator of its own: a loader without one takes a number from the global state at each start, and
        # resuming is a start.
        loader = DataLoader(
            self.data.train,
            batch_sampler=batches,
            collate_fn=as_batch,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),
        )
        self.model.train()
        with self._chosen_backend(), self._log_file() as log:
            for images, labels in with_own_errors(loader):
                terms = self.train_step(images, labels)
                last = self.step == self.recipe.steps
                measure = last or self.step % self.eval_every == 0
                if measure or self.step % self.log_every == 0:
                    self._log(log, terms, batches.per_epoch, measure)
                if self.monitor:
                    self.monitor.step(images, self.step)
                if on_step:
                    on_step(self.step, terms)
                if self.stop_requested:
                    break

    def _chosen_backend(self):
        """Sets the backend of the fused operations; `auto` leaves it to VITDIV_BACKEND and the table."""
        return contextlib.nullcontext() if self.backend == "auto" else use_backend(self.backend)

    def _log(self, log, terms: dict, per_epoch: int, measure: bool) -> None:
        row = {"step": self.step, "epoch": round(self.step / per_epoch, 3)}
        row |= {name: float(terms[name]) for name in self.columns if name in terms}
        if not math.isfinite(row["loss"]):
            raise TrainError(
                f"the loss is {row['loss']} at step {self.step}: try a smaller --lr or --clip, or no --amp"
            )
        row["val_accuracy"] = accuracy(self.model, self.data.val, self.device) if measure else ""
        self.rows.append(row)
        if log:
            csv.DictWriter(log, self.columns).writerow(row)
            log.flush()

    @contextlib.contextmanager
    def _log_file(self):
        """The CSV log, rewritten up to this step, so that a killed and resumed run has no row twice."""
        if self.log_path is None:
            yield None
            return
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        if self.monitor:
            write_records(self.monitor.csv, self.monitor.records)
        with open(self.log_path, "w", newline="") as log:
            writer = csv.DictWriter(log, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)
            yield log

    def save(self, path: Path) -> None:
        """Writes a checkpoint beside the path, then renames it: a crash never leaves half a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "rows": self.rows,
            "recipe": asdict(self.recipe),
            "config": _plain(asdict(self.model.config)),
            "classes": list(self.data.classes),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "augment_rng": self.augment_rng.get_state(),
        }
        part = path.with_name(path.name + ".part")
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)

    def load(self, path: Path) -> None:
        """Restores a checkpoint of the same model, recipe and classes; otherwise raises TrainError."""
        state = read_checkpoint(path, CHECKPOINT)
        now = asdict(self.recipe) | _plain(asdict(self.model.config)) | {"classes": list(self.data.classes)}
        then = state["recipe"] | state["config"] | {"classes": state["classes"]}
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


def read_checkpoint(path: Path, parts: Sequence[str]) -> dict:
    """What `Trainer.save` wrote, on the CPU. Raises TrainError where a part is not there."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise TrainError(f"there is no checkpoint {path}") from None
    except Exception as error:
        raise TrainError(f"{path} is no checkpoint or a damaged one ({type(error).__name__})") from None
    absent = [name for name in parts if not isinstance(state, dict) or name not in state]
    if absent:
        raise TrainError(f"{path} is no checkpoint of this trainer: it has no {', '.join(absent)}")
    return state


def _plain(config: dict) -> dict:
    """Ranges as lists, which a checkpoint can hold and compare."""
    return config | {"reattention": list(config["reattention"])}
