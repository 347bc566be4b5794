"""The loop every mode shares: rounds of samples, look-ahead over their batches, one step per batch.

Modes differ in how many rows are hot and how far the loop looks ahead, not in what it computes; over the same
batch order they end with the same parameters, to the bit on CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from slipstream.embedding.lookahead import Batch, LookAhead, StagedBatch, StagingOverflowError
from slipstream.embedding.staleness import MovementTracker
from slipstream.embedding.tiers import TieredRows, sum_duplicates, update_rows
from slipstream.errors import CapacityError, TrainingError
from slipstream.io.samples import Samples
from slipstream.training.schedule import BatchMaker, plan_rounds
from slipstream.training.skipping import Skipper
from slipstream.training.stream import SampleStream


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What the loop tells a listener every `log_every` steps."""

    step: int
    loss: float
    """Mean training loss since the last report."""
    samples_seen: int
    samples_dropped: int
    samples_per_second: float
    """Since the start of training, loading included."""
    hot_batch_share: float
    threshold: float | None


@dataclass(kw_only=True, slots=True)
class LoopTotals:
    """What training amounted to."""

    steps: int = 0
    hot_steps: int = 0
    samples_seen: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    """Mean loss of each stretch of `log_every` steps."""


class Trainer:
    """Trains a model over tiered rows.

    Args:
        model: (dense (B, n), pooled (B, T, D)) -> logits (B,).
        rows: The tiers.
        lookahead: Stages batches into `rows`.
        dense_optimizer: Updates the model's parameters.
        lr_schedule: Learning rate of rows and dense layers, from the share of training done, in [0, 1].
        eps: Of row-wise Adagrad.
        skipper: Leaves samples out.
        log_every: Steps between reports.
        on_report: Hears reports.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        rows: TieredRows,
        lookahead: LookAhead,
        dense_optimizer: torch.optim.Optimizer,
        lr_schedule: Callable[[float], float],
        eps: float,
        skipper: Skipper,
        log_every: int,
        on_report: Callable[[StepReport], None] = lambda report: None,
    ) -> None:
        self.totals = LoopTotals()
        self._model, self._rows, self._lookahead = model, rows, lookahead
        self._dense_optimizer = dense_optimizer
        self._lr_schedule, self._eps = lr_schedule, eps
        self._lr = lr_schedule(0.0)
        self._skipper = skipper
        self._tracker = MovementTracker(rows.buffer[: rows.num_hot])
        self._log_every, self._on_report = log_every, on_report
        self._loss_sum = torch.zeros((), device=rows.device)
        self._losses_in_sum = 0
        self._started = time.perf_counter()

    def train_epoch(
        self,
        streams: Mapping[str, SampleStream],
        *,
        batch_size: int,
        order: str,
        segment_steps: int,
        round_samples: int,
        warmup_steps: int,
        window_steps: int,
        rng: np.random.Generator,
        epoch_span: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        """Train on every sample of the streams `hot` and `cold` that the skipper keeps.

        Args:
            streams: Samples of the epoch.
            batch_size: Samples per step.
            order: `interleaved` or `mixed`.
            segment_steps: Steps between staleness checks.
            round_samples: Most samples held at once.
            warmup_steps: Steps before the first window opens.
            window_steps: Length of a window that ends with its segment; 0 is the whole segment.
            rng: Draws the order of batches and the skipper's samples.
            epoch_span: Share of all training done before and after this epoch, for the learning rate.

        Raises:
            TrainingError: The loss became infinite or NaN.
            CapacityError: A batch does not fit the staging half.
        """
        self._started = time.perf_counter()
        maker = BatchMaker(batch_size=batch_size, order=order)
        num_hot, num_cold = streams["hot"].remaining, streams["cold"].remaining
        total = left = num_hot + num_cold
        begin, width = epoch_span[0], epoch_span[1] - epoch_span[0]
        self._model.train()
        for part in plan_rounds(
            num_hot,
            num_cold,
            batch_size=batch_size,
            segment_steps=segment_steps,
            round_samples=round_samples,
        ):
            done, left = total - left, left - part.num_hot - part.num_cold
            hot = self._keep(streams["hot"].take(part.num_hot), rng)
            cold = streams["cold"].take(part.num_cold)
            batches = list(maker.make(hot, cold, rng=rng, last=left == 0))
            opens_at = len(batches) - window_steps if window_steps and part.ends_segment else 0
            may_open = not window_steps or part.ends_segment
            self._run(
                batches,
                opens_at=max(opens_at, 0) if may_open else len(batches),
                warmup=warmup_steps,
                span=(begin + width * done / total, begin + width * (total - left) / total),
            )
            if part.ends_segment:
                movement = self._tracker.close_window() if self._tracker.is_open else None
                if movement is not None or not self._skipper.needs_windows:
                    self._skipper.check(step=self.totals.steps, movement=movement)
        self._report()
        self._lookahead.flush()
        self.totals.seconds += time.perf_counter() - self._started

    def predict(self, shards: Iterable[Samples], *, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Click probabilities and labels of samples; changes nothing.

        Returns:
            (probabilities (n,) float32, labels (n,) float32), in the order given.
        """
        self._model.eval()
        probabilities, labels = [], []
        with torch.inference_mode():
            for samples in shards:
                for start in range(0, len(samples), batch_size):
                    piece = samples.take(slice(start, start + batch_size))
                    slots = torch.from_numpy(np.ascontiguousarray(piece.X_cat))
                    pooled = self._rows.gather(slots.flatten()).view(*slots.shape, -1)
                    dense = torch.from_numpy(np.ascontiguousarray(piece.X_int)).to(self._rows.device)
                    probabilities.append(torch.sigmoid(self._model(dense, pooled)).cpu().numpy())
                    labels.append(piece.y)
        return np.concatenate(probabilities), np.concatenate(labels)

    def _keep(self, hot: Samples | None, rng: np.random.Generator) -> Samples | None:
        if hot is None:
            return None
        keep = self._skipper.keep(hot.X_cat, rng=rng)
        return hot if keep.all() else hot.take(keep)

    def _run(self, batches: list[Batch], *, opens_at: int, warmup: int, span: tuple[float, float]) -> None:
        index = 0

        def step(batch: StagedBatch) -> None:
            nonlocal index
            past_warmup = self.totals.steps >= warmup
            if self._skipper.needs_windows and not self._tracker.is_open and index >= opens_at and past_warmup:
                self._tracker.open_window()
            self._set_lr(span[0] + (span[1] - span[0]) * index / len(batches))
            self._step(batch)
            index += 1

        try:
            self._lookahead.run(iter(batches), step)
        except StagingOverflowError as exc:
            raise CapacityError(
                f"{exc}: `train.staging_rows` = {exc.available} is too small",
                hint=f"raise `train.staging_rows` to at least {exc.needed}, or lower `train.batch_size`",
            ) from exc

    def _set_lr(self, progress: float) -> None:
        self._lr = self._lr_schedule(progress)
        for group in self._dense_optimizer.param_groups:
            group["lr"] = self._lr

    def _step(self, batch: StagedBatch) -> None:
        rows = self._rows
        looked_up = rows.buffer.index_select(0, batch.positions).requires_grad_()
        logits = self._model(batch.dense, looked_up.view(len(batch), -1, rows.embedding_dim))
        loss = binary_cross_entropy_with_logits(logits, batch.labels)
        self._dense_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._dense_optimizer.step()
        assert looked_up.grad is not None
        gradients = sum_duplicates(looked_up.grad, batch.inverse, len(batch.unique))
        update_rows(
            rows.optimizer,
            rows.buffer,
            rows.buffer_state,
            batch.unique,
            gradients,
            lr=self._lr,
            eps=self._eps,
        )
        self._tracker.touch(batch.unique)
        self._loss_sum += loss.detach()
        self._losses_in_sum += 1
        self.totals.steps += 1
        self.totals.hot_steps += batch.is_hot
        self.totals.samples_seen += len(batch)
        if self.totals.steps % self._log_every == 0:
            self._report()

    def _report(self) -> None:
        if not self._losses_in_sum:
            return
        loss = float(self._loss_sum) / self._losses_in_sum
        totals = self.totals
        if not np.isfinite(loss):
            first = totals.steps - self._losses_in_sum + 1
            raise TrainingError(
                f"the loss became {loss} between steps {first} and {totals.steps}",
                hint="lower `train.lr`; look for extreme dense values if preprocess.dense_transform is 'none'",
            )
        self._loss_sum.zero_()
        self._losses_in_sum = 0
        totals.losses.append(loss)
        elapsed = totals.seconds + time.perf_counter() - self._started
        self._on_report(
            StepReport(
                step=totals.steps,
                loss=loss,
                samples_seen=totals.samples_seen,
                samples_dropped=self._skipper.dropped,
                samples_per_second=totals.samples_seen / elapsed,
                hot_batch_share=totals.hot_steps / totals.steps,
                threshold=self._skipper.threshold,
            )
        )


def iter_tables(rows: TieredRows, slot_maps: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Tensor]]:
    """Each table's weights in row order, gathered from wherever its rows live."""
    for name, slots in slot_maps.items():
        yield name, rows.gather(torch.from_numpy(slots)).cpu()
