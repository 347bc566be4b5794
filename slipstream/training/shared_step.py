"""One training step on one of several ranks: its part of a batch, and what all ranks learn from it together.

    look up, forward, backward      this rank's part, over the B of whole batches
    sum over ranks                  dense gradients, the loss and Σw, Σw²; then gradients of the distinct rows
    update                          the same dense layers and the same rows on every rank

So every rank holds the same parameters, to the bit, and they are those of one process up to the order of additions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import xxhash
from torch import Tensor

from slipstream.distributed.gradients import GradientSums
from slipstream.distributed.ranks import Ranks
from slipstream.embedding.tiers.lookahead import StagedBatch
from slipstream.embedding.tiers.row_access import RowAccess, change_rows
from slipstream.training.skipping.trackers import RowTracker
from slipstream.training.step import TrainStep, mean_by_weight


class SharedTracker:
    """A tracker that sees a part of every batch, and knows of all when a window closes.

    Args:
        tracker: What watches this rank's part.
        ranks: Who watches the other parts.
    """

    def __init__(self, tracker: RowTracker, ranks: Ranks) -> None:
        self._tracker, self._ranks = tracker, ranks
        self.summable = tracker.summable

    @property
    def is_open(self) -> bool:
        """Whether a window is open."""
        return self._tracker.is_open

    def open_window(self) -> None:
        """Forget what came before."""
        self._tracker.open_window()

    def observe(self, rows: Tensor, sum_pulls: Callable[[], Tensor]) -> None:
        """Note a step of an open window."""
        self._tracker.observe(rows, sum_pulls)

    def add_up(self, sum_over_ranks: Callable[[Tensor], None]) -> None:
        """Take in what other ranks saw."""
        self._tracker.add_up(sum_over_ranks)

    def close_window(self) -> np.ndarray:
        """Say what the window showed of each hot row, to all ranks."""
        self.add_up(lambda values: self._ranks.sum(values, "what rows were looked up"))
        return self._tracker.close_window()

    def state(self) -> dict[str, np.ndarray]:
        """Say what an open window holds of this rank's part."""
        return self._tracker.state()

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take over what `state` gave."""
        self._tracker.restore(state)


class SharedStep(TrainStep):
    """Trains on this rank's part of each batch.

    Args:
        sums: What ranks exchange.
        **options: Of `TrainStep`.
    """

    def __init__(self, *, sums: GradientSums, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.sums, self.ranks = sums, sums.ranks
        self.num_steps = 0

    def watch(self, tracker: RowTracker) -> None:
        """Let a tracker watch the rows that steps look up from now on."""
        super().watch(SharedTracker(tracker, self.sums.ranks))

    def count_from(self, num_steps: int) -> None:
        """Go on after so many steps, as an uninterrupted training would."""
        super().count_from(num_steps)
        self.num_steps = num_steps

    def share_peaks(self) -> None:
        """Know the largest weights that any rank looked up, of tables with one scale; as often as one likes."""
        if (grids := self.representations.grids) is not None:
            self.sums.ranks.keep_largest(grids.peak, "largest weights")

    def _begin(self, lr: float) -> None:
        grids = self.representations.grids
        if grids is not None and grids.due_periods():
            self.share_peaks()
        super()._begin(lr)

    def _compute(self, batch: StagedBatch) -> None:
        assert batch.distinct is not None and batch.part is not None
        self._num_steps.add_(1)
        self.num_steps += 1
        access, part, weights = self._access(batch), batch.part, batch.weights
        gradients, loss = self._differentiate_part(batch, access)
        totals = self._sum_dense(loss, weights)
        counted = None if weights is None else totals[2] / totals[1]
        self.dense_optimizer.step(self._lr, num_steps=self._num_steps, sample_weight=counted)
        if len(batch):
            self._observe(batch, gradients, access)
        dim = self.rows.embedding_dim
        summed = self.sums.sum_rows(
            access.sum_by_row(gradients) if len(batch) else gradients,
            self._beside_rows(weights, access, batch.num_lookups()),
            part,
            step=self.num_steps,
        )
        row_weights = mean_by_weight(summed[:, dim:]) if summed.shape[1] > dim else None
        with self._averaging(lambda: part.rows):
            change_rows(
                self.rows,
                part.rows,
                summed[:, :dim].contiguous(),
                self._rule,
                kernels=self._row_kernels,
                lr=self._lr,
                num_steps=self._num_steps,
                sample_weights=row_weights,
            )
        self._loss_sum += totals[0] / (part.num_samples if weights is None else totals[1])

    def _differentiate_part(self, batch: StagedBatch, access: RowAccess) -> tuple[Tensor, Tensor]:
        """(gradient of each lookup (L, D), Σ wᵢ ℓᵢ); zeros where this rank has no sample of the batch."""
        if len(batch):
            return self._differentiate(batch, access)
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        buffer = self.rows.buffer
        return buffer.new_zeros(0, self.rows.embedding_dim), buffer.new_zeros(())

    def _sum_dense(self, loss: Tensor, weights: Tensor | None) -> Tensor:
        """Add up the dense gradients of all ranks where they are; returns (Σ wᵢ ℓᵢ, Σw, Σw²) of the whole batch."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        beside = gradients[0].new_zeros(3)
        beside[0] = loss
        if weights is not None:
            beside[1], beside[2] = weights.sum(), weights.square().sum()
        return self.sums.sum_dense(gradients, beside)

    def _beside_rows(self, weights: Tensor | None, access: RowAccess, num_lookups: int) -> Tensor | None:
        """Give Σw and Σw² over this rank's lookups of each row, for a rule with state. Shape (u, 2)."""
        if weights is None or not self.rows.buffer_state:
            return None
        if not len(weights):
            return self.rows.buffer.new_zeros(0, 2)
        return self._sum_weights(weights, access, num_lookups).to(self.rows.buffer.dtype)


def require_same_model(step: TrainStep) -> None:
    """Make sure that all ranks hold the same dense layers and the same device buffer, to the bit.

    Raises:
        TrainingError: They do not: a device computes wrong, or its software differs.
    """
    if not isinstance(step, SharedStep):
        return
    digest = xxhash.xxh3_64()
    parameters = (*step.model.parameters(), *step.rows.buffer_state, step.rows.buffer)
    for tensor in parameters:
        digest.update(tensor.detach().cpu().contiguous().numpy().view(np.uint8).data)
    step.sums.ranks.require_equal(digest.intdigest() >> 1, f"parameters after step {step.num_steps}")
