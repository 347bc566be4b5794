"""One training step: forward, backward, dense update, sparse update."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from slipstream.embedding.lookahead import StagedBatch
from slipstream.embedding.tiers import TieredRows, sum_duplicates, update_rows
from slipstream.training.dense_optimizer import DenseOptimizer


class TrainStep:
    """Trains a model and the rows its batches look up.

    Args:
        model: (dense (B, n), looked-up rows (B, T, D)) -> logits (B,).
        rows: The tiers.
        dense_optimizer: Updates the model's parameters.
        eps: Of row-wise Adagrad.
    """

    def __init__(self, *, model: nn.Module, rows: TieredRows, dense_optimizer: DenseOptimizer, eps: float) -> None:
        self.model, self.rows, self.dense_optimizer = model, rows, dense_optimizer
        self._eps = eps
        self._lr = torch.zeros((), device=rows.device)
        self._loss_sum = torch.zeros((), device=rows.device)

    def __call__(self, batch: StagedBatch, lr: float) -> None:
        """Train on a batch. Nothing waits for the device."""
        self._lr.fill_(lr)
        self._compute(batch)

    def over(self, rows: TieredRows) -> TrainStep:
        """The same model and dense optimizer over other rows."""
        return TrainStep(model=self.model, rows=rows, dense_optimizer=self.dense_optimizer, eps=self._eps)

    def take_loss_sum(self) -> float:
        """Sum of the losses since the last call; waits for the device."""
        total = float(self._loss_sum)
        self._loss_sum.zero_()
        return total

    def _compute(self, batch: StagedBatch) -> None:
        rows = self.rows
        looked_up = rows.buffer.index_select(0, batch.positions).requires_grad_()
        logits = self.model(batch.dense, looked_up.view(len(batch), -1, rows.embedding_dim))
        loss = binary_cross_entropy_with_logits(logits, batch.labels, weight=batch.weights)
        self.dense_optimizer.zero_grad()
        loss.backward()
        self.dense_optimizer.step(self._lr)
        self._update(looked_up.grad, batch)
        self._loss_sum += loss.detach()

    def _update(self, gradients: Tensor | None, batch: StagedBatch) -> None:
        assert gradients is not None
        rows = self.rows
        summed = sum_duplicates(gradients, batch.inverse, len(batch.unique))
        update_rows(
            rows.optimizer,
            rows.buffer,
            rows.buffer_state,
            batch.unique,
            summed,
            lr=self._lr,
            eps=self._eps,
        )
