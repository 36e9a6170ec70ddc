"""The training loop by a recipe: AdamW, schedule, clipping, autocast, processes, log, exact resume."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _dispatch, use_backend
from .._types import Backend
from ..attach.monitor import CollapseMonitor
from ..recipes import Mixed, Recipe, Schedule
from . import augmentation, checkpoint, parallel, state, wrapping
from .data import Batch, Data, Shares, StepBatches, batches_of
from .errors import TrainError
from .evaluation import accuracy as accuracy
from .init import start_from
from .logs import Row
from .optimizer import parameter_groups
from .options import chosen
from .parts import Collapse, CsvLog, Part
from .task import Classification

TaskMaker = Callable[[nn.Module, Recipe, torch.device], Any]


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


class Trainer:
    """Trains a model on Data; `save` and `load` keep everything that the next step needs.

    The model must have been built under the recipe's seed by the caller if runs are to repeat. `parts` go
    along with the run and are told what it does, see `parts.Part`; without them, `log_path` makes a CSV log
    with a row every `log_every` steps, and the validation accuracy every `eval_every` steps and after the
    last one, and `monitor_every` a CollapseMonitor, which measures at every so many steps, on images of the
    step as they are before augmentation; its records go to collapse.csv beside the log. With `save_path` a
    checkpoint is written there every `save_every` steps.

    `task` makes what is learned, of model, recipe and device: `Classification`, or a partial of
    `segment.task.Segmentation`, to which data and model must belong.

    Model and data are taken as they are: of what the recipe says of them only `weights` counts. With `resume`
    these are not read: `load` is to follow, whose checkpoint has the weights.

    Where torch.distributed is started each process makes a trainer and trains its share of each batch; all
    must call the same methods. Files are written by the first process alone.

    Raises TrainError for what can't be trained, or is not the same in all processes.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        recipe: Recipe,
        *,
        device: str = "cpu",
        backend: Backend = "auto",
        log_path: Path | None = None,
        log_every: int = 10,
        eval_every: int = 100,
        save_path: Path | None = None,
        save_every: int = 500,
        workers: int = 0,
        compile: bool = False,
        accumulate: int = 1,
        checkpointing: bool = False,
        fsdp: bool = False,
        monitor_every: int = 0,
        parts: Sequence[Part] | None = None,
        resume: bool = False,
        folder: Path | None = None,
        title: str = "",
        task: TaskMaker = Classification,
    ) -> None:
        self.processes = parallel.current()
        self.device, self.backend, self.workers = torch.device(device), backend, workers
        self.accumulate, self.fsdp, self.title = accumulate, fsdp, title
        self.data = data
        self.log_every, self.eval_every = log_every, eval_every
        self.save_path, self.save_every = save_path, save_every
        self.folder = log_path.parent if folder is None and log_path is not None else folder
        self.step, self.stop_requested = 0, False
        self.rows: list[Row] = []
        self.seconds = 0.0  # of steps, with reading and without validating and saving
        self.shown: dict[str, str] = {}  # what parts have for a progress bar
        self.measured: dict[str, float] = {}  # what parts measure, for loggers
        self.saved_step: int | None = None
        if parts is None:
            parts = [CsvLog(log_path.name)] if log_path is not None else []
            parts += [Collapse(monitor_every)] if monitor_every else []
        with self.processes.together():
            self._prepare(model, recipe, parts, resume, task)
        self._check_processes(parts)
        if checkpointing:
            wrapping.checkpoint_blocks(self.model)
        sync_bn = recipe.sync_bn and self.processes.size > 1
        self.run = wrapping.wrapped(
            self.model, self.processes, fsdp=fsdp, compile=compile, sync_bn=sync_bn,
            losses_on_patch_head=any(term.loss == "region_mixing" for term in recipe.terms().values()),
        )  # fmt: skip
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, recipe.weight_decay),
            lr=recipe.learning_rate, betas=(recipe.betas[0], recipe.betas[1]), eps=recipe.eps, fused=True,
        )  # fmt: skip
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "fp16")
        self.augment_rng = torch.Generator().manual_seed(recipe.seed)
        if not self.processes.main:
            parallel.reseed(recipe.seed, 0, self.processes.rank)

    @property
    def evaluated(self) -> list[str]:
        """The columns of the log that validation fills."""
        return [*self.task.metrics, *(name for part in self.parts for name in part.evaluated(self))]

    @property
    def columns(self) -> list[str]:
        """Those of the log."""
        return ["step", "epoch", "loss", *self.task.terms, "lr", "grad_norm", *self.evaluated]

    @property
    def monitor(self) -> CollapseMonitor | None:
        """That of the part `Collapse`, where there is one."""
        return next((part.monitor for part in self.parts if isinstance(part, Collapse)), None)

    @property
    def steps(self) -> int:
        """How many the recipe takes over these images."""
        return self.schedule.steps

    def losses(self, images: Tensor, labels: Tensor, batch: Mixed | None = None) -> dict[str, Tensor]:
        """The losses of images as they go into the model, and `loss`, their weighted sum."""
        return self.task.losses(self.run, images, labels, batch, autocast=self._autocast)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The metrics of a model on the validation images; all processes must call it."""
        self.processes.share_buffers(model)
        return self.task.evaluate(model, self.data.val, self.processes)

    def train_step(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
        """One update by this process's share of a batch.

        Returns the losses of that share and the gradient norm before clipping, as detached scalars.
        """
        lr = self.schedule.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        whole = len(images) * self.processes.size
        mine = parallel.share(whole, self.processes.rank, self.processes.size)
        drawn = self.augment_rng.get_state()
        sums: dict[str, Tensor] = {}
        for i in range(self.accumulate):
            part = parallel.share(len(images), i, self.accumulate)
            with wrapping.synchronised(self.run, self.model, last=i == self.accumulate - 1):
                # each part draws for the whole batch, the same numbers, and takes its own
                self.augment_rng.set_state(drawn)
                alone = len(part) == whole
                terms = self._part_of_step(
                    images if self.accumulate == 1 else images[part],
                    labels if self.accumulate == 1 else labels[part],
                    () if alone else ([mine[j] for j in part], whole),
                )
                self.scaler.scale(terms["loss"] / self.accumulate).backward()
            for name, value in terms.items():
                value = value.detach() / self.accumulate
                sums[name] = sums[name] + value if name in sums else value
        self.scaler.unscale_(self.optimizer)
        norm: Any = nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        return sums | {"lr": lr, "grad_norm": norm.full_tensor() if self.fsdp else norm}

    def _part_of_step(self, images: Tensor, labels: Tensor, places: tuple) -> dict[str, Tensor]:
        images, labels = (part.to(self.device, non_blocking=True) for part in (images, labels))
        images, labels = self.task.augmented(self.data, images, labels, self.augment_rng, *places)
        images, batch = self.task.mixed(images, labels, self.augment_rng)
        return self.losses(images, labels, batch)

    def fit(
        self, until: int | None = None, on_step: Callable[[int, dict[str, Any]], None] | None = None
    ) -> None:
        """Trains to step `until` (default: the recipe's last), or until `stop_requested` is set.

        May be called again for more. `on_step(step, terms)` is called after each step. Of several processes
        all stop at a step that is logged, after one was asked to. Raises TrainError when the loss is not
        finite at a logged step or a file can't be written, DataError when an image can't be read.
        """
        until = self.steps if until is None else min(until, self.steps)
        recipe, count = self.recipe, len(self.data.train)
        steps = StepBatches(count, recipe.batch, recipe.seed, self.step, until, self.order)
        shares = Shares(steps, self.processes.rank, self.processes.size, self.data.train.draws)
        batches = batches_of(self.data.train, shares, self.workers, pin_memory=self.device.type == "cuda")
        self.model.train()
        with self._chosen_backend(), contextlib.ExitStack() as ending:
            for part in self.parts:
                part.on_begin(self)
                ending.callback(part.on_end, self)
            for indices in steps if self.step < until else ():
                self._one_step(batches, steps, indices, on_step)
                if self._stops():
                    break

    def _one_step(
        self,
        batches: Iterator[Batch],
        steps: StepBatches,
        indices: list[int],
        on_step: Callable[[int, dict[str, Any]], None] | None,
    ) -> None:
        start = time.perf_counter()
        images, labels = next(batches)
        terms = self.train_step(images, labels)
        measure = self.step == self.steps or self.step % self.eval_every == 0
        log = measure or self.step % self.log_every == 0
        row = self._row(terms, steps.per_epoch) if log else {}
        self.seconds += time.perf_counter() - start
        for part in self.parts:
            part.on_step(self, terms, indices)
        if measure:
            row |= self.evaluate(self.model)
            for part in self.parts:
                part.on_eval(self, row)
        if log:
            self.rows.append(row)
            for part in self.parts:
                part.on_log(self, row)
        if on_step:
            on_step(self.step, terms)
        if self.save_path is not None and self.step % self.save_every == 0:
            self.save(self.save_path)

    def _stops(self) -> bool:
        if self.processes.size == 1:
            return self.stop_requested
        if self.step % self.log_every == 0:
            self.stop_requested = self.processes.total(int(self.stop_requested)) > 0
            return self.stop_requested
        return False

    def _autocast(self) -> torch.autocast:
        dtype = torch.float16 if self.recipe.amp == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.recipe.amp is not None)

    def _chosen_backend(self) -> contextlib.AbstractContextManager[Any]:
        """Sets the backend of the fused operations; `auto` leaves it to VITDIV_BACKEND and the table."""
        return contextlib.nullcontext() if self.backend == "auto" else use_backend(self.backend)

    def _row(self, terms: dict[str, Any], per_epoch: int) -> Row:
        row: Row = {"step": self.step, "epoch": round(self.step / per_epoch, 3)}
        losses = {name: terms[name] for name in self.columns if isinstance(terms.get(name), Tensor)}
        means = self.processes.mean(losses)
        row |= {name: means.get(name, terms[name]) for name in self.columns if name in terms}
        if not math.isfinite(row["loss"]):
            raise TrainError(
                f"the loss is {row['loss']} at step {self.step}: try a smaller --lr or --clip, or no --amp"
            )
        return row | dict.fromkeys(self.evaluated, "")

    def save(self, path: Path) -> None:
        """Writes a checkpoint; one that was there stays whole until then. All processes must call it.

        Raises TrainError, in all of them, where it can't be written, and for weights that are not finite.
        """
        whole = state.gathered(self)
        with self.processes.together():
            if self.processes.main:
                try:
                    self._check_finite(whole["model"])
                    checkpoint.write(path, whole)
                except TrainError as error:
                    last = self.saved_step
                    kept = "" if last is None else f"; the checkpoint of step {last} stays"
                    raise TrainError(f"{error}{kept}") from None
        self.saved_step = self.step
        for part in self.parts:
            part.on_save(self, path)

    def _check_finite(self, weights: dict[str, Tensor]) -> None:
        for name, _ in self.model.named_parameters():
            if not weights[name].isfinite().all():
                raise TrainError(
                    f"{name} is not finite after step {self.step}, and is not saved: try a smaller --lr or "
                    "--clip, or no --amp"
                )

    def load(self, path: Path) -> None:
        """Restores a checkpoint of the same model, recipe and data; otherwise raises TrainError."""
        state.restore(self, path)
        self.saved_step = self.step

    def _prepare(
        self, model: nn.Module, recipe: Recipe, parts: Sequence[Part], resume: bool, task: TaskMaker
    ) -> None:
        """All that needs no other process."""
        self._check(model, recipe)
        self.recipe, self.schedule = recipe, Schedule(recipe, len(self.data.train))
        self.order = augmentation.repeated(recipe, len(self.data.train))
        self.model = model.to(self.device)
        if recipe.weights is not None and not resume:
            start_from(self.model, Path(recipe.weights))
        try:
            with self._chosen_backend():
                for operation in _dispatch.OPERATIONS:
                    _dispatch.resolve(operation, self.device, "auto")
            self.task: Any = task(self.model, recipe, self.device)
        except (RuntimeError, TypeError, ValueError) as error:
            raise TrainError(str(error)) from None
        self.objective = self.task.objective
        self._check_shares()
        self.parts = [part for part in parts if part.takes_part(self)]
        for part in self.parts:
            part.attach(self)

    def _check(self, model: nn.Module, recipe: Recipe) -> None:
        if len(self.data.train) < recipe.batch:
            raise TrainError(
                f"the batch ({recipe.batch}) is larger than the training set ({len(self.data.train)} images)"
            )
        embed: Any = model.patch_embed
        if recipe.losses and not hasattr(embed, "num_patches"):
            raise TrainError(
                "diversity losses need one number of patches, model.patch_embed.num_patches, which "
                f"{type(model).__name__} has not: train it with --losses none"
            )
        if recipe.losses and embed.num_patches < 2:
            raise TrainError("diversity losses need at least two patches, but the model has one")
        if recipe.sync_bn and self.processes.size > 1:
            wrapping.check_sync(model, self.device)
        if self.fsdp and self.processes.size == 1:
            raise TrainError("--fsdp shards a model over several processes: start them with torchrun")
        if self.fsdp and recipe.amp == "fp16":
            raise TrainError("--fsdp takes --amp bf16 or none: torch's loss scaling for fp16 is not sharded")

    def _check_shares(self) -> None:
        """Each process and each part of a step has as many images."""
        number, batch = self.processes.size * self.accumulate, self.recipe.batch
        of = f"{self.processes.size} processes, each in --accumulate {self.accumulate} parts"
        if batch % number:
            raise TrainError(f"--batch {batch} can't be shared by {of}: give a multiple of {number}")
        by = "CutMix" if self.recipe.cutmix_alpha else "mixup" if self.recipe.mixup else ""
        if by and number > 1 and batch // number % 2:
            raise TrainError(
                f"--batch {batch} leaves {batch // number} images for each of {of}, and {by} mixes pairs: "
                f"give a multiple of {2 * number}"
            )

    def _check_processes(self, parts: Sequence[Part]) -> None:
        settings = {name: getattr(self, name) for name in ("accumulate", "fsdp", "log_every", "eval_every")}
        settings["save_every"] = self.save_path and self.save_every
        of_parts = {f"{part.name} {key}": value for part in parts for key, value in chosen(part).items()}
        facts = state.flat(state.made_with(self)) | settings | of_parts | {"torch": torch.__version__}
        self.processes.check_same(facts)
