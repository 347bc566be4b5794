"""One training step: forward, backward, dense update, sparse update.

`TrainStep` does it plainly. `FixedShapeStep` first copies a batch into buffers of fixed shape, so that on CUDA hot and
cold batches alike replay one captured graph without the host; on CPU it computes the same from the same buffers, which
is how the tests prove it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib import import_module
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from slipstream.embedding.duplicates import Distinct, sum_duplicates
from slipstream.embedding.tiers.lookahead import StagedBatch
from slipstream.embedding.tiers.rows import TieredRows, update_rows
from slipstream.training.dense_optimizer import DenseOptimizer
from slipstream.training.representations import Representations
from slipstream.training.skipping.staleness import RowTracker, pulls_of_lookups

Precision = Literal["fp32", "tf32", "bf16"]
Kernels = Literal["torch", "triton"]
_EAGER_STEPS = 3
"""Batches trained before the capture, so that every library has set itself up."""


class TrainStep:
    """Trains a model and the rows its batches look up.

    A sample of weight w counts as w samples, in the gradients and in the accumulators of Adagrad alike.

    Args:
        model: (dense (B, n), looked-up rows (B, T, D)) -> logits (B,).
        rows: The tiers.
        dense_optimizer: Updates the model's parameters.
        eps: Of row-wise Adagrad.
        precision: Of the matrix products: `tf32` on CUDA only, `bf16` by autocast; weights and updates stay fp32.
        deterministic: Whether results on CUDA must repeat to the bit.
        kernels: What looks rows up and updates them: plain `torch`, or one `triton` kernel each.
        representations: What the model sees of rows; None for the rows themselves.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        rows: TieredRows,
        dense_optimizer: DenseOptimizer,
        eps: float,
        precision: Precision = "fp32",
        deterministic: bool = False,
        kernels: Kernels = "torch",
        representations: Representations | None = None,
    ) -> None:
        self.representations = representations
        self.tracker: RowTracker | None = None
        """Watches the rows that steps look up, where a rule asks for it."""
        self._kernels = kernels
        # needs Triton, which only a GPU brings along
        self._row_kernels = import_module("slipstream.embedding.tiers.kernels") if kernels == "triton" else None
        self.model, self.rows, self.dense_optimizer = model, rows, dense_optimizer
        self._eps, self._precision, self._deterministic = eps, precision, deterministic
        self._lr = torch.zeros((), device=rows.device)
        self._loss_sum = torch.zeros((), device=rows.device)
        if rows.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"

    def __call__(self, batch: StagedBatch, lr: float) -> None:
        """Train on a batch. Nothing waits for the device."""
        self._begin(lr)
        self._compute(batch)

    def over(self, rows: TieredRows) -> TrainStep:
        """The same model and dense optimizer over other rows."""
        return TrainStep(
            model=self.model,
            rows=rows,
            dense_optimizer=self.dense_optimizer,
            eps=self._eps,
            precision=self._precision,
            deterministic=self._deterministic,
            kernels=self._kernels,
            representations=self.representations,
        )

    def settle(self) -> None:
        """Get ready for evaluation, once no row is staged: scales of tables on few bits become exact."""
        if self.representations is not None:
            self.representations.settle(self.rows)

    def take_loss_sum(self) -> float:
        """Sum of the losses since the last call; waits for the device."""
        total = float(self._loss_sum)
        self._loss_sum.zero_()
        return total

    def _begin(self, lr: float) -> None:
        self._lr.fill_(lr)
        if self.representations is not None:
            self.representations.begin_step(lr)

    def _compute(self, batch: StagedBatch) -> None:
        distinct = batch.find_distinct(padding=self.rows.spare_position)
        values, looked_up = self._look_up(distinct)
        looked_up.requires_grad_()
        pooled = looked_up.view(len(batch), batch.num_lookups() // len(batch), self.rows.embedding_dim)
        if self.representations is not None:
            pooled = self.representations.train(pooled, batch.outside)
        with self._autocast():
            logits = self.model(batch.dense, pooled)
        loss = binary_cross_entropy_with_logits(logits.float(), batch.labels, weight=batch.weights)
        weights = batch.weights
        self.dense_optimizer.zero_grad()
        loss.backward()
        self.dense_optimizer.step(self._lr, sample_weight=None if weights is None else _mean_by_weight(weights))
        gradients = looked_up.grad
        assert gradients is not None
        if self.tracker is not None:
            self.tracker.observe(
                distinct.rows,
                lambda: self._sum_by_row(pulls_of_lookups(gradients, batch.labels, weights), distinct),
            )
        summed = self._sum_by_row(gradients, distinct)
        self._update(values, summed, distinct, None if weights is None else self._weigh_rows(weights, distinct))
        self._loss_sum += loss.detach() if weights is None else loss.detach() / weights.mean()

    def _look_up(self, distinct: Distinct) -> tuple[Tensor | None, Tensor]:
        """(distinct rows (U, D), where the update needs them; rows of all lookups (L, D))."""
        buffer = self.rows.buffer
        if self._row_kernels is not None:
            return None, self._row_kernels.gather_rows(buffer, distinct.rows, distinct.inverse)
        values = buffer.index_select(0, distinct.rows)
        return values, values.index_select(0, distinct.inverse)

    def _sum_by_row(self, per_lookup: Tensor, distinct: Distinct) -> Tensor:
        return sum_duplicates(
            per_lookup,
            distinct.inverse,
            len(distinct.rows),
            order=distinct.order,
            starts=distinct.starts,
            deterministic=self._deterministic,
        )

    def _weigh_rows(self, weights: Tensor, distinct: Distinct) -> Tensor | None:
        """The weight of the samples that look up each distinct row, for an optimizer with state. Shape (U,)."""
        if self.rows.buffer_state is None:
            return None
        per_lookup = weights.new_empty(len(weights), len(distinct.inverse) // len(weights), 2)
        per_lookup[..., 0] = weights.unsqueeze(1)
        per_lookup[..., 1] = weights.square().unsqueeze(1)
        sums = self._sum_by_row(per_lookup.flatten(end_dim=1), distinct)
        return (sums[:, 1] / sums[:, 0]).nan_to_num(1.0)  # padding has no samples

    def _update(self, values: Tensor | None, summed: Tensor, distinct: Distinct, weights: Tensor | None) -> None:
        rows = self.rows
        place = (rows.optimizer, rows.buffer, rows.buffer_state, distinct.rows)
        if self._row_kernels is not None:
            self._row_kernels.update_rows(*place, summed, lr=self._lr, eps=self._eps, sample_weights=weights)
        else:
            assert values is not None
            update_rows(*place, values, summed, lr=self._lr, eps=self._eps, sample_weights=weights)

    def _autocast(self) -> AbstractContextManager[object]:
        if self._precision != "bf16":
            return nullcontext()
        return torch.autocast(self.rows.device.type, dtype=torch.bfloat16)


def _mean_by_weight(weights: Tensor) -> Tensor:
    """Σw² / Σw: the weight behind a gradient that is mostly noise. No dimensions."""
    return weights.square().sum() / weights.sum()


class FixedShapeStep(TrainStep):
    """A step whose full batches all have one shape, captured as a CUDA graph after a few of them.

    Batches of another size, the last of an epoch, take the plain path. The first batch with weights makes room for
    them, so that trainings without weights have none to compute with.

    Args:
        batch_size: B of full batches.
        num_dense: Dense columns.
        num_tables: T.
        **options: Of `TrainStep`; determinism cannot be captured.
    """

    def __init__(self, *, batch_size: int, num_dense: int, num_tables: int, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        if self._deterministic:
            raise ValueError("expected deterministic = False: the sorted sums cannot be captured; use TrainStep")
        if self.representations is not None and self.representations.has_cores:
            raise ValueError("expected tables in tiers only: lookups of cores cannot be captured; use TrainStep")
        device, num_lookups = self.rows.device, batch_size * num_tables
        self._static = StagedBatch(
            dense=torch.zeros(batch_size, num_dense, device=device),
            labels=torch.zeros(batch_size, device=device),
            positions=torch.zeros(num_lookups, dtype=torch.int64, device=device),
            is_hot=False,
        )
        self._num_eager = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: StagedBatch, lr: float) -> None:
        """Train on a batch. Nothing waits for the device."""
        if len(batch) != len(self._static):
            super().__call__(batch, lr)
            return
        self._begin(lr)
        self._load(batch)
        if self.rows.device.type != "cuda" or self._num_eager < _EAGER_STEPS:
            self._num_eager += 1
            self._compute(self._static)
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            self.dense_optimizer.zero_grad()
            with torch.cuda.graph(self._graph):
                self._compute(self._static)
        self._graph.replay()

    def _load(self, batch: StagedBatch) -> None:
        if batch.weights is not None and self._static.weights is None:
            self._static = replace(self._static, weights=torch.empty_like(batch.weights))
            self._graph, self._num_eager = None, 0
        static = self._static
        assert batch.positions is not None and static.positions is not None
        static.dense.copy_(batch.dense)
        static.labels.copy_(batch.labels)
        static.positions.copy_(batch.positions)
        if batch.weights is not None and static.weights is not None:
            static.weights.copy_(batch.weights)
        elif static.weights is not None:
            static.weights.fill_(1.0)
