"""One training step: forward, backward, dense update, sparse update.

`TrainStep` does it plainly. `FixedShapeStep` first copies a batch into buffers of fixed shape, so that on CUDA hot and
cold batches alike replay one captured graph without the host; on CPU it computes the same from the same buffers, which
is how the tests prove it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from slipstream.distributed.ranks import ALONE, Alone
from slipstream.embedding.tiers.lookahead import StagedBatch
from slipstream.embedding.tiers.row_access import RowAccess, StagedAccess
from slipstream.embedding.tiers.rows import TieredRows
from slipstream.training.averaging import WeightAverage
from slipstream.training.dense_optimizer import DenseOptimizer
from slipstream.training.representations import Representations
from slipstream.training.skipping.trackers import RowTracker, pulls_of_lookups

Precision = Literal["fp32", "tf32", "bf16"]
Kernels = Literal["torch", "triton"]
_EAGER_STEPS = 3
"""Batches trained before the capture, so that every library has set itself up."""


class TrainStep:
    """Trains a model and the rows its batches look up.

    The loss is Σ wᵢ ℓᵢ / B with the B of full batches, so a sample pulls as hard in the few that end an epoch as in any
    other batch; as a mean, 21 samples would step at the full rate. A sample of weight w counts as w samples, in the
    gradients and in what rules keep of their squares alike.

    Args:
        model: (dense (B, n), looked-up rows (B, T, D)) -> logits (B,).
        rows: The tiers.
        dense_optimizer: Updates the model's parameters.
        representations: What the model sees of rows.
        eps: Of the rule that updates rows.
        batch_size: B; None: the samples of each batch, whose mean the loss then is, as published.
        precision: Of the matrix products: `tf32` on CUDA only, `bf16` by autocast; weights and updates stay fp32.
        deterministic: Whether results on CUDA must repeat to the bit.
        kernels: What looks rows up and updates them: plain `torch`, or one `triton` kernel each.
        most_distinct: How many distinct rows a batch can look up at most; None: as many as it has lookups.
        average: The mean of the weights over steps, of those with `is_averaging`; None for none.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        rows: TieredRows,
        dense_optimizer: DenseOptimizer,
        representations: Representations,
        eps: float,
        batch_size: int | None = None,
        precision: Precision = "fp32",
        deterministic: bool = False,
        kernels: Kernels = "torch",
        most_distinct: int | None = None,
        average: WeightAverage | None = None,
    ) -> None:
        self.representations = representations
        self._most_distinct, self._batch_size = most_distinct, batch_size
        self._padding = rows.padding(0)
        self.ranks: Alone = ALONE
        """Who trains this model together."""
        self.tracker: RowTracker | None = None
        """Watches the rows that steps look up, where a rule asks for it."""
        self.average = average
        self.is_averaging = False
        """Whether steps from now on count in the mean of the weights."""
        self._kernels = kernels
        # needs Triton, which only a GPU brings along
        self._row_kernels = import_module("slipstream.embedding.tiers.kernels") if kernels == "triton" else None
        self.model, self.rows, self.dense_optimizer = model, rows, dense_optimizer
        self._eps, self._precision, self._deterministic = eps, precision, deterministic
        self._rule = rows.rule(eps=eps)
        self._lr, self._lr_there = torch.zeros((), device=rows.device), 0.0
        # a tensor, so that a captured step counts on; float64 counts 2⁵³ steps
        self._num_steps = torch.zeros((), dtype=torch.float64, device=rows.device)
        # in float64 a sum of float32 losses is exact, wherever checkpoints cut it
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=rows.device)
        if rows.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"

    def __call__(self, batch: StagedBatch, lr: float) -> None:
        """Train on a batch. Nothing waits for the device."""
        self._begin(lr)
        self._compute(batch)

    def watch(self, tracker: RowTracker) -> None:
        """Let a tracker watch the rows that steps look up from now on."""
        self.tracker = tracker

    def over(self, rows: TieredRows) -> TrainStep:
        """Give the same model, dense optimizer and count of steps over other rows."""
        other = TrainStep(
            model=self.model,
            rows=rows,
            dense_optimizer=self.dense_optimizer,
            eps=self._eps,
            batch_size=self._batch_size,
            precision=self._precision,
            deterministic=self._deterministic,
            kernels=self._kernels,
            representations=self.representations,
            most_distinct=self._most_distinct,
        )
        other._num_steps = self._num_steps
        return other

    def count_from(self, num_steps: int) -> None:
        """Go on after so many steps, as an uninterrupted training would."""
        self._num_steps.fill_(num_steps)

    def look_up(self, slots_BF: np.ndarray) -> Tensor:
        """Look up what the model predicts from, once no row is staged. Shape (B, F, D)."""
        return self.representations.look_up(self.rows, slots_BF)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Let the model and what it looks up be what is served, for as long as this is entered.

        That is the mean of the weights, where there is one, with exact scales of tables on few bits. No row may be
        staged. Afterwards everything is as it was, so that training goes on as if nobody had looked.
        """
        mean = nullcontext() if self.average is None else self.average.in_place()
        with mean, self.representations.exact_scales(self.rows):
            yield

    def take_loss_sum(self) -> float:
        """Sum of the mean losses of the batches since the last call; waits for the device."""
        total = float(self._loss_sum)
        self._loss_sum.zero_()
        return total

    def _begin(self, lr: float) -> None:
        if lr != self._lr_there:
            self._lr.fill_(lr)
            self._lr_there = lr
        self.representations.begin_step(lr)

    def _compute(self, batch: StagedBatch) -> None:
        self._num_steps.add_(1)
        if batch.in_place is not None:
            batch.in_place.begin()
        access = self._access(batch)
        gradients, loss = self._differentiate(batch, access)
        weights = batch.weights
        counted = None if weights is None else _mean_by_weight(weights)
        self.dense_optimizer.step(self._lr, num_steps=self._num_steps, sample_weight=counted)
        self._observe(batch, gradients, access)
        row_weights = None if weights is None else self._weigh_rows(weights, access, batch.num_lookups())
        with self._averaging(access.padded_positions):
            access.update(self._rule, gradients, lr=self._lr, num_steps=self._num_steps, sample_weights=row_weights)
        if batch.in_place is not None:
            batch.in_place.end()
        self._loss_sum += loss / (len(batch) if weights is None else weights.sum())

    def _access(self, batch: StagedBatch) -> RowAccess:
        """Give what gets at the rows of a batch."""
        if batch.in_place is not None:
            return batch.in_place.plan
        return StagedAccess(
            rows=self.rows,
            distinct=batch.find_distinct(padding=self._pad(batch.num_lookups())),
            kernels=self._row_kernels,
            deterministic=self._deterministic,
        )

    def _differentiate(self, batch: StagedBatch, access: RowAccess) -> tuple[Tensor, Tensor]:
        """(gradient of each lookup (L, D); Σ wᵢ ℓᵢ). The gradients of the dense layers are with their parameters."""
        looked_up = access.look_up(batch.num_lookups()).requires_grad_()
        by_sample = looked_up.view(len(batch), batch.num_lookups() // len(batch), self.rows.embedding_dim)
        pooled = self.representations.train(by_sample, batch.tierless, batch.is_value, batch.ranges)
        with self._autocast():
            logits = self.model(batch.dense, pooled)
        loss = binary_cross_entropy_with_logits(logits.float(), batch.labels, weight=batch.weights, reduction="sum")
        self.dense_optimizer.zero_grad()
        (loss / self._divisor(batch)).backward()
        assert looked_up.grad is not None
        return looked_up.grad, loss.detach()

    def _divisor(self, batch: StagedBatch) -> int:
        """B of the loss."""
        return batch.divisor or self._batch_size or batch.num_samples

    def _observe(self, batch: StagedBatch, gradients: Tensor, access: RowAccess) -> None:
        """Let the tracker see the step, where one watches."""
        if self.tracker is None or not self.tracker.is_open:
            return
        divisor = self._divisor(batch)
        self.tracker.observe(
            access.padded_positions(),
            lambda: access.sum_by_row(pulls_of_lookups(gradients, batch.labels, batch.weights, batch_size=divisor)),
        )

    def _pad(self, num_lookups: int) -> Tensor:
        """Say what stands for distinct rows that a batch could have looked up and has not. Shape (U,), int64."""
        count = num_lookups if self._most_distinct is None else min(num_lookups, self._most_distinct)
        if len(self._padding) < count:
            self._padding = self.rows.padding(count)
        return self._padding[:count]

    def _weigh_rows(self, weights: Tensor, access: RowAccess, num_lookups: int) -> Tensor | None:
        """Give the weight of the samples that look up each distinct row, for a rule with state. Shape (U,)."""
        if not self.rows.buffer_state:
            return None
        return mean_by_weight(self._sum_weights(weights, access, num_lookups))

    def _sum_weights(self, weights: Tensor, access: RowAccess, num_lookups: int) -> Tensor:
        """Give Σw and Σw² over the lookups of each distinct row. Shape (U, 2)."""
        per_lookup = weights.new_empty(len(weights), num_lookups // len(weights), 2)
        per_lookup[..., 0] = weights.unsqueeze(1)
        per_lookup[..., 1] = weights.square().unsqueeze(1)
        return access.sum_by_row(per_lookup.flatten(end_dim=1))

    @contextmanager
    def _averaging(self, positions: Callable[[], Tensor]) -> Iterator[None]:
        """Take what is done to rows at distinct positions into the mean, if this step is averaged."""
        if self.average is None or not self.is_averaging:
            yield
            return
        at = positions()
        before = self.rows.buffer.index_select(0, at)
        yield
        self.average.follow_rows(at, before)
        self.average.count()

    def _autocast(self) -> AbstractContextManager[object]:
        if self._precision != "bf16":
            return nullcontext()
        return torch.autocast(self.rows.device.type, dtype=torch.bfloat16)


def mean_by_weight(sums: Tensor) -> Tensor:
    """Give Σw² / Σw of rows: the weight behind a gradient that is mostly noise. (Σw, Σw²) of shape (U, 2) -> (U,)."""
    return (sums[:, 1] / sums[:, 0]).nan_to_num(1.0)  # padding has no samples


def _mean_by_weight(weights: Tensor) -> Tensor:
    """Σw² / Σw: the weight behind a gradient that is mostly noise. No dimensions."""
    return weights.square().sum() / weights.sum()


@dataclass(kw_only=True, slots=True)
class _Variant:
    """One kind of step over the fixed buffers, and its graph."""

    batch: StagedBatch
    num_eager: int = 0
    graph: torch.cuda.CUDAGraph | None = None


class FixedShapeStep(TrainStep):
    """A step whose full batches all have one shape, captured as a CUDA graph after a few of them.

    Steps with weights, steps in a window of the tracker, steps that are averaged and steps of each size that comes
    often enough are graphs of their own, so that no other step pays for what they need.

    Args:
        batch_size: B of full batches; larger ones take the plain path.
        num_dense: Dense columns.
        num_tables: Looked-up columns T.
        **options: Of `TrainStep`; determinism cannot be captured.
    """

    def __init__(self, *, batch_size: int, num_dense: int, num_tables: int, **options: object) -> None:
        super().__init__(batch_size=batch_size, **options)  # type: ignore[arg-type]
        if self._deterministic:
            raise ValueError("expected deterministic = False: the sorted sums cannot be captured; use TrainStep")
        if self.representations.has_cores:
            raise ValueError("expected tables in tiers only: lookups of cores cannot be captured; use TrainStep")
        device, num_lookups = self.rows.device, batch_size * num_tables
        num_padded = len(self.representations.pooling.columns)
        has_ranges = self.representations.range_of_slot is not None
        position_type = torch.int32 if self.rows.positions_fit_32_bits else torch.int64
        self._static = StagedBatch(
            dense=torch.zeros(batch_size, num_dense, device=device),
            labels=torch.zeros(batch_size, device=device),
            positions=torch.zeros(num_lookups, dtype=position_type, device=device),
            is_hot=False,
            weights=torch.zeros(batch_size, device=device),
            is_value=torch.zeros(batch_size, num_padded, dtype=torch.bool, device=device) if num_padded else None,
            ranges=torch.zeros(batch_size, num_tables, dtype=torch.uint8, device=device) if has_ranges else None,
        )
        self._pad(num_lookups)  # once for all: graphs read it where it is
        self._variants: dict[tuple[object, ...], _Variant] = {}
        self._memory: Any = None

    def __call__(self, batch: StagedBatch, lr: float) -> None:
        """Train on a batch. Nothing waits for the device."""
        if len(batch) > len(self._static):
            super().__call__(batch, lr)
            return
        self._begin(lr)
        variant = self._load(batch)
        if self.rows.device.type != "cuda" or variant.num_eager < _EAGER_STEPS:
            variant.num_eager += 1
            self._compute(variant.batch)
            return
        if variant.graph is None:
            variant.graph = self._capture(variant.batch)
        variant.graph.replay()

    def _capture(self, batch: StagedBatch) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        self.dense_optimizer.zero_grad()  # gradients belong to the graph's own memory
        # thread_local: other threads go on copying rows and waiting for copies meanwhile
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            self._compute(batch)
        self._memory = graph.pool()  # graphs run one after the other and keep nothing there in between
        return graph

    def _load(self, batch: StagedBatch) -> _Variant:
        """Copy a batch to where its kind of step reads it."""
        is_watched = self.tracker is not None and self.tracker.is_open
        # rows in place take turns between two halves of the buffer: a graph for each
        kind = (batch.weights is not None, is_watched, self.is_averaging, batch.in_place)
        key = (len(batch), batch.divisor, *kind)
        if batch.in_place is not None and batch.in_place.samples is not None:
            # the step itself fills the batch's memory, which is always the same
            return self._variants.setdefault(key, _Variant(batch=batch))
        if key not in self._variants:
            self._variants[key] = _Variant(batch=self._first_of_static(batch))
        static = self._variants[key].batch
        static.dense.copy_(batch.dense)
        static.labels.copy_(batch.labels)
        if batch.positions is not None and static.positions is not None:
            static.positions.copy_(batch.positions)
        if batch.is_value is not None and static.is_value is not None:
            static.is_value.copy_(batch.is_value)
        if batch.ranges is not None and static.ranges is not None:
            static.ranges.copy_(batch.ranges)
        if batch.weights is not None and static.weights is not None:
            static.weights.copy_(batch.weights)
        return self._variants[key]

    def _first_of_static(self, batch: StagedBatch) -> StagedBatch:
        """Where batches of this size are read: views of the first entries of the fixed buffers."""
        num_samples, static = len(batch), self._static
        assert static.positions is not None and static.weights is not None
        lookups_per_sample = len(static.positions) // len(static)
        return replace(
            static,
            dense=static.dense[:num_samples],
            labels=static.labels[:num_samples],
            positions=static.positions[: num_samples * lookups_per_sample],
            in_place=batch.in_place,
            weights=None if batch.weights is None else static.weights[:num_samples],
            is_value=None if static.is_value is None else static.is_value[:num_samples],
            ranges=None if static.ranges is None else static.ranges[:num_samples],
            divisor=batch.divisor,
        )
