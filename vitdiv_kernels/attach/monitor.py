"""Is a ViT collapsing? Likeness of patches, heads and layers, entropy, rank and residual, block by block."""

import contextlib
import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks, _vectors
from .._vectors import matrices_near_one
from ..losses import layer_similarity
from ..ops.maps.attention_gram import attention_cosine
from ..ops.pairs.pairwise_cosine import pairwise_cosine
from . import _blocks, _recorder, _sharded, _tokens
from .parts import ModelParts

QUANTILES = (0.05, 0.5, 0.95)
BINS = 4096  # of the cosines in [-1, 1], interpolated: quantiles are exact to 5e-4
MEASURES = (
    "patch_cosine",
    "patch_abs_cosine",
    *(f"patch_cosine_q{round(100 * level):02d}" for level in QUANTILES),
    "head_cosine",
    "attention_entropy",
    "effective_rank",
    "residual",
)
Record = dict[str, Any]
_LAYER = "attention_cosine_"  # a column for each block in the CSV


def cosine_quantiles(x: Tensor, levels: Sequence[float] = QUANTILES, *, rows: int = 64) -> list[float]:
    """Quantiles of the cosines between the vectors of each set, i < j, over all sets together.

    Args:
        x: vectors, [B, N, D], N > 1.
        levels: numbers from 0 to 1.
        rows: vectors whose cosines are held at a time.

    Returns:
        a list of numbers, one per level, from a histogram of 4096 bins with interpolation; nan where x has
        an entry that is not finite.

    Cost: rows in turn, N^2 D / 2 multiply-adds per set; B `rows` N numbers at a time.
    """
    _checks.vectors("x", x, at_least=2)
    x_hat = _vectors.unit(x.detach(), 1e-8)
    if not x_hat.isfinite().all():
        return [math.nan] * len(levels)
    counts = torch.zeros(BINS, dtype=torch.int64, device=x.device)
    for start in range(0, x.shape[-2], rows):
        with _checks.autocast_off(x):
            cosine = x_hat[:, start : start + rows] @ x_hat[:, start:].mT
        later = torch.ones(cosine.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        bins = ((cosine[:, later] + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)
        counts += torch.bincount(bins.flatten(), minlength=BINS)
    counts, below = counts.double().cpu(), counts.cumsum(0).double().cpu()
    ranks = torch.tensor(levels, dtype=torch.float64, device="cpu") * below[-1]
    # the first bin that reaches the rank, and is not empty for rank 0
    found = torch.searchsorted(below, ranks.clamp_min(1e-9))
    inside = (ranks - (below - counts)[found]) / counts[found]
    return ((found + inside) * (2 / BINS) - 1).tolist()


def attention_entropy(q: Tensor, k: Tensor, *, rows: int = 64) -> Tensor:
    """Mean entropy of the rows of the attention maps, in nats, from 0 (one key) to log M (all alike).

    Args:
        q, k: [B, H, N, d] and [B, H, M, d]; the maps are softmax(d^-1/2 q k^T).
        rows: queries whose maps are held at a time.

    Returns:
        a scalar, float32 (float64 for float64 input): the mean over images, heads and queries.

    Cost: rows in turn, B H N M d multiply-adds; B H `rows` M numbers at a time.
    """
    _checks.queries_and_keys(q, k)
    q, k = _vectors.full_precision(q, k)
    total: Any = 0
    for start in range(0, q.shape[2], rows):
        with _checks.autocast_off(q):
            maps = (q[:, :, start : start + rows] * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)
        total = total + torch.special.entr(maps).sum()
    return total / (q.shape[0] * q.shape[1] * q.shape[2])


def effective_rank(tokens: Tensor) -> Tensor:
    """exp(entropy of the squared singular values) of the unit-length patches [B, N, D], mean over images: 0
    where all are zero, a matrix of rank 0; nan where an entry is not finite."""
    x_hat = _vectors.unit(tokens, 1e-12)
    if not x_hat.isfinite().all():  # svdvals raises
        return x_hat.new_full((), math.nan)
    values = torch.linalg.svdvals(x_hat) ** 2
    total = values.sum(-1)
    share = values / total.clamp_min(torch.finfo(values.dtype).tiny).unsqueeze(-1)
    return (torch.special.entr(share).sum(-1).exp() * (total > 0)).mean()


def residual(x: Tensor) -> Tensor:
    """|X - 1 mean(X)^T| / |X| of the vectors [B, N, D] of each image, mean over images: 0 where all are
    equal, also where they are zero. Source: Dong et al. 2021 (arXiv 2103.03404), in the Frobenius norm."""
    x = matrices_near_one(*_vectors.full_precision(x))
    away = torch.linalg.vector_norm(x - x.mean(-2, keepdim=True), dim=(-2, -1))
    return (away / torch.linalg.vector_norm(x, dim=(-2, -1)).clamp_min(torch.finfo(x.dtype).tiny)).mean()


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and then each module in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class CollapseMonitor:
    """Measures, per block, how alike the patches, heads and layers of a ViT are.

    Args:
        model: of a family that is known, as for `DiversityObjective`; also compiled, in
            DistributedDataParallel, or sharded by fully_shard or FullyShardedDataParallel: then all processes
            must measure, each its own images.
        every: `step` measures at every so many calls.
        images: at most so many of the images given are measured.
        csv: a file that is written anew with the first measurement, and that each later one is appended to;
            its folder must exist.
        mixed: whether layers are compared by the maps that re-attention mixes and normalises; False takes
            their softmax maps.
        num_prefix_tokens: class and register tokens in front, which measures of patches drop; None as for
            `DiversityObjective`.
        maps: False measures patches alone, for a model whose attention maps can't be taken; head_cosine,
            attention_entropy and attention_cosine are then nan.
        parts: where the blocks, tokens and attentions of the model are, as for `DiversityObjective.attach`.

    Each measurement adds one record per block to `records`, a dict:

    - step, block: from 0;
    - patch_cosine, patch_abs_cosine: mean cosine and mean |cosine| of the patches that leave the block,
      i != j; patch_cosine_q05, _q50, _q95: quantiles of the cosine;
    - head_cosine: mean cosine of the softmax maps of its heads, g != h (0 for one head);
    - attention_entropy: mean entropy of the rows of these maps, nats; at most log N;
    - effective_rank: of the patches, at most min(N, D);
    - residual: |X - 1 mean^T| / |X| of the patches;
    - attention_cosine: list, the mean cosine of its maps with those of each block, per head, whole maps.

    All are means over images.

    A measurement is one more forward pass, in evaluation mode and without gradients, of the model as it is
    without torch.compile; hooks are there only during it, and the mode of each module is restored. It draws
    no random numbers and changes no statistics: training goes on as without it.

    Cost, of L blocks, H heads of width d, N tokens of D features, per image: the forward pass; L N^2 D for
    the cosines of patches; L H N^2 (2 d + H / 2) for heads and entropy and L H N^2 (d + L / 2) for layers,
    all multiply-adds; a singular value decomposition of N x D per block. Fused kernels where there are;
    else 64 rows in turn: the largest intermediate is 64 L H max(N, 256) numbers. Of talking heads, maps cost
    about H times as much. All this is half the multiply-adds of a training step of as many images, and took
    0.6 (DeiT-S) to 1.0 (DeiT-Ti) of its time on one CPU thread: with `every` 50, at most 2 % where the batch
    has 8 images, and 0.3 % where it has 64.

    Example:
        >>> import torch
        >>> from vitdiv_kernels import CollapseMonitor
        >>> from vitdiv_kernels.vit import CONFIGS, ViT
        >>> model = ViT(CONFIGS["digits24"])
        >>> monitor = CollapseMonitor(model, every=50)
        >>> for _ in range(100):
        ...     images = torch.rand(8, 1, 8, 8)
        ...     _ = monitor.step(images)  # once in each training step
        >>> [record["step"] for record in monitor.records if record["block"] == 23]
        [50, 100]
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 50,
        images: int = 8,
        csv: str | Path | None = None,
        mixed: bool = True,
        num_prefix_tokens: int | None = None,
        maps: bool = True,
        parts: ModelParts | None = None,
    ) -> None:
        every, images = _checks.count("every", every, 1), _checks.count("images", images, 1)
        self.model = _blocks.plain_model(model)
        self.parts = _blocks.parts_of(self.model, parts)
        self.maps = maps
        for attention in self._attentions().values():
            attention.check_maps()
        self.every, self.images, self.mixed = every, images, mixed
        self.csv = None if csv is None else Path(csv)
        _tokens.check_prefix(self.model, num_prefix_tokens)
        self.num_prefix_tokens = num_prefix_tokens
        self.records: list[Record] = []
        self.calls = 0

    def step(self, images: Tensor, step: int | None = None) -> list[Record] | None:
        """Counts a training step, or takes its number; measures where `every` divides it.

        images: the batch, [B, C, S, S]; its first ones are measured. Returns the new records or None.
        """
        self.calls = self.calls + 1 if step is None else step
        return None if self.calls % self.every else self.measure(images, self.calls)

    @torch.no_grad()
    def measure(self, images: Tensor, step: int = 0) -> list[Record]:
        """Measures now, on at most `self.images` of the images [B, C, S, S]; returns the new records."""
        _checks.floating_tensor("images", images)
        if images.dim() != 4 or len(images) == 0:
            raise ValueError(f"images must have shape [B, C, S, S], B > 0, got {_checks.shape_of(images)}")
        parameter = next(self.model.parameters(), images)
        images = images[: self.images].to(parameter.device)
        # in the model's own precision, also in the middle of training
        with _checks.autocast_off(images), _sharded.restored(self.model), _evaluation(self.model):
            new = self._records(images, step)
        if self.csv is not None:
            write_records(self.csv, new, append=bool(self.records))
        self.records += new
        return new

    def _records(self, images, step):
        depth, attentions = len(self.parts.blocks), self._attentions()
        kept = self._forward(images, attentions)
        layout = _tokens.Layout(self.model, self.parts, kept, self.num_prefix_tokens)
        layout.check_masks(maps=self.maps)
        patches = []
        for i in range(depth):
            tokens = kept["tokens", i]
            prefix = layout.prefix(i, tokens)
            if tokens.shape[1] - prefix < 2:
                raise ValueError(
                    f"measures of patches need two at least, but the model has {tokens.shape[1]} tokens, the "
                    f"first {prefix} of which are dropped (num_prefix_tokens)"
                )
            patches.append(tokens[:, prefix:])
        new = [{"step": step, "block": i} | self._patches(patches[i]) for i in range(depth)]
        likeness = [[math.nan] * depth] * depth
        if self.maps:
            with _sharded.whole(self.model):
                layers = [attentions[i].query_key(kept["heads", i]) for i in range(depth)]
                for record, qk in zip(new, layers, strict=True):
                    record |= self._heads(*qk)
                likeness = self._likeness(attentions, layers)
        for record, row in zip(new, likeness, strict=True):
            record["attention_cosine"] = row
        return new

    def _likeness(self, attentions, layers):
        """The mean cosine of the maps of every two blocks, a list of lists."""
        if self.mixed:
            layers = [attentions[i].mixed_layer(*qk) for i, qk in enumerate(layers)]
        # some images at a time: 64 rows of the maps of all layers are held together
        images, _, n, _ = layers[0][0].shape
        some, similarity = max(1, 64 * 256 // (min(64, n) * n)), 0
        for i in range(0, images, some):
            these = [_images(layer, i, i + some) for layer in layers]
            mean = layer_similarity(these, along="maps", reduction="mean")
            similarity = similarity + len(these[0][0]) * mean
        return (similarity / images).tolist()

    def _attentions(self):
        if not self.maps:
            return {}
        depth = len(self.parts.blocks)
        return {i: _blocks.attention_of(self.model, self.parts, i) for i in range(depth)}

    def _forward(self, images, attentions):
        blocks = range(len(self.parts.blocks))
        recorder = _recorder.Recorder(self.model, self.parts, blocks, attentions, without_grad=True)
        try:
            self.model(images)
            return recorder.take()
        finally:
            recorder.remove()

    def _patches(self, patches):
        values = [
            pairwise_cosine(patches, penalty="signed").item(),
            pairwise_cosine(patches).item(),
            *cosine_quantiles(patches),
            math.nan,
            math.nan,
            effective_rank(patches).item(),
            residual(patches).item(),
        ]
        return dict(zip(MEASURES, values, strict=True))

    def _heads(self, q, k):
        heads = attention_cosine(q, k)
        count = heads.shape[-1]
        between = heads.sum((-2, -1)) - heads.diagonal(dim1=-2, dim2=-1).sum(-1)
        return {
            "head_cosine": (between.mean() / max(1, count * (count - 1))).item(),
            "attention_entropy": attention_entropy(q, k).item(),
        }


def _images(layer, start, stop):
    """A layer of some images; the mix and its bias are those of all."""
    q, k, *mixing = layer
    return q[start:stop], k[start:stop], *mixing


def write_records(path: str | Path, records: Sequence[Record], append: bool = False) -> None:
    """Records as CSV, a row for each, attention_cosine in a column for each block; no records, no file."""
    if not records:
        Path(path).unlink(missing_ok=True)
        return
    rows = [_flat(record) for record in records]
    with open(path, "a" if append else "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if not append:
            writer.writeheader()
        writer.writerows(rows)


def read_records(path: str | Path) -> list[Record]:
    """The records of a CSV file that `CollapseMonitor` wrote. Raises ValueError for another file."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        absent = {"step", "block", *MEASURES} - set(reader.fieldnames or ())
        if absent:
            raise ValueError(f"{path} is no file of CollapseMonitor: it has no {', '.join(sorted(absent))}")
        try:
            return [_record(row) for row in reader]
        except (TypeError, ValueError):  # a cut line has no value in its last columns
            raise ValueError(
                f"line {reader.line_num} of {path} is no record of CollapseMonitor, or half of one: remove it"
            ) from None


def _record(row):
    return (
        {"step": int(row["step"]), "block": int(row["block"])}
        | {name: float(row[name]) for name in MEASURES}
        | {"attention_cosine": [float(v) for name, v in row.items() if name.startswith(_LAYER)]}
    )


def _flat(record):
    plain = {name: value for name, value in record.items() if name != "attention_cosine"}
    return plain | {f"{_LAYER}{i}": value for i, value in enumerate(record["attention_cosine"])}
