"""The loop every mode shares: rounds of samples, look-ahead over their batches, one step per batch.

Modes differ in which rows sit on the device and how far the loop looks ahead, not in what it computes; over the same
batch order they end with the same parameters, to the bit on CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from slipstream.embedding.lookahead import Batch, LookAhead, StagedBatch
from slipstream.embedding.placement import StagingOverflowError
from slipstream.embedding.staleness import MovementTracker
from slipstream.errors import CapacityError, TrainingError
from slipstream.io.samples import Samples
from slipstream.training.predict import predict
from slipstream.training.schedule import BatchMaker, Round, plan_rounds
from slipstream.training.skipping import Selection, Skipper
from slipstream.training.step import TrainStep
from slipstream.training.stream import SampleStream

_SCORE_BATCH = 16_384


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How an epoch is cut."""

    epochs: int
    batch_size: int
    order: str
    """`interleaved` or `mixed`."""
    segment_steps: int
    """Steps between staleness checks."""
    round_samples: int
    """Most samples held at once."""
    warmup_steps: int = 0
    """Steps before the first window opens."""
    window_steps: int = 0
    """Length of a window that ends with its segment; 0 is the whole segment."""
    seed: int = 0
    """Draws the order of batches and what is dropped."""


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
    """Wall time of training, loading and scoring included, evaluation left out."""
    losses: list[float] = field(default_factory=list)
    """Mean loss of each stretch of `log_every` steps."""
    loss_sum: float = 0.0
    losses_in_sum: int = 0


@dataclass(kw_only=True, slots=True)
class Position:
    """Where training stands inside its schedule, and what the current round was made of."""

    epoch: int = 0
    round_index: int = 0
    batches_done: int = 0
    """Batches of the current round that are trained."""
    waiting: dict[str, Samples] = field(default_factory=dict)
    """Samples that waited for a batch when the round began."""
    picked: tuple[Selection, Selection] | None = None
    """What the skipper kept of the round; None before it was asked."""


class Trainer:
    """Trains a model over tiered rows.

    Args:
        step: One training step, and the model it trains.
        lookahead: Stages batches for the step.
        lr_schedule: Learning rate of rows and dense layers, from the share of training done, in [0, 1].
        skipper: Leaves samples out.
        schedule: How epochs are cut.
        log_every: Steps between reports.
        on_report: Hears reports.
        between_chunks: Called with the trainer whenever no row is moving, for checkpoints.
    """

    def __init__(
        self,
        *,
        step: TrainStep,
        lookahead: LookAhead,
        lr_schedule: Callable[[float], float],
        skipper: Skipper,
        schedule: Schedule,
        log_every: int,
        on_report: Callable[[StepReport], None] = lambda report: None,
        between_chunks: Callable[[Trainer], None] = lambda trainer: None,
    ) -> None:
        self.totals = LoopTotals()
        self.position = Position()
        self.step, self.lookahead, self.skipper = step, lookahead, skipper
        self.tracker = MovementTracker(step.rows.buffer[: step.rows.num_hot])
        self._lr_schedule, self._schedule = lr_schedule, schedule
        self._log_every, self._on_report, self._between_chunks = log_every, on_report, between_chunks
        self._started = time.perf_counter()

    def train(self, open_streams: Callable[[int], Mapping[str, SampleStream]]) -> None:
        """Train to the end of the schedule, from `position` on.

        Args:
            open_streams: Gives the streams `hot` and `cold` of an epoch, from their beginning.

        Raises:
            TrainingError: The loss became infinite or NaN.
            CapacityError: A batch does not fit the staging area.
        """
        self._started = time.perf_counter()
        self.step.model.train()
        for epoch in range(self.position.epoch, self._schedule.epochs):
            self.position.epoch = epoch
            self._train_epoch(open_streams(epoch))
            self.position = Position(epoch=epoch + 1)
        self._report()
        self.lookahead.flush()
        self.step.settle()
        self.totals.seconds = self.elapsed()

    def snapshot_bytes(self) -> dict[str, int]:
        """Device bytes of the staleness snapshot and of what marks touched rows, where the skipper needs them."""
        if not self.skipper.needs_windows:
            return {}
        rows = self.step.rows
        return {"snapshot": rows.num_hot * (4 * rows.embedding_dim + 1)}

    def elapsed(self) -> float:
        """Wall seconds of training so far, those before an interruption included."""
        return self.totals.seconds + time.perf_counter() - self._started

    def _train_epoch(self, streams: Mapping[str, SampleStream]) -> None:
        schedule, position = self._schedule, self.position
        num_hot, num_cold = streams["hot"].remaining, streams["cold"].remaining
        rounds = plan_rounds(
            num_hot,
            num_cold,
            batch_size=schedule.batch_size,
            segment_steps=schedule.segment_steps,
            round_samples=schedule.round_samples,
        )
        maker = BatchMaker(batch_size=schedule.batch_size, order=schedule.order)
        maker.waiting = dict(position.waiting)
        taken, total = 0, num_hot + num_cold
        for index, part in enumerate(rounds):
            hot, cold = streams["hot"].take(part.num_hot), streams["cold"].take(part.num_cold)
            before, taken = taken, taken + part.num_hot + part.num_cold
            if index < position.round_index:
                continue  # trained before the run was interrupted
            if index > position.round_index:
                position.round_index, position.batches_done, position.picked = index, 0, None
                position.waiting = dict(maker.waiting)
            span = ((position.epoch + before / total), (position.epoch + taken / total))
            self._train_round(part, hot, cold, maker, span=span, is_last=taken == total)

    def _train_round(
        self,
        part: Round,
        hot: Samples | None,
        cold: Samples | None,
        maker: BatchMaker,
        *,
        span: tuple[float, float],
        is_last: bool,
    ) -> None:
        position = self.position
        key = [self._schedule.seed, position.epoch, position.round_index]
        if position.picked is None:
            rng = np.random.default_rng([*key, 0])
            position.picked = self.skipper.select(hot, cold, rng=rng, score=self._score)
        hot, cold = (
            None if group is None else selection.apply(group)
            for group, selection in zip((hot, cold), position.picked, strict=True)
        )
        batches = list(maker.make(hot, cold, rng=np.random.default_rng([*key, 1]), last=is_last))
        self._run(batches, part, span)
        if part.ends_segment:
            movement = self.tracker.close_window() if self.tracker.is_open else None
            if movement is not None or not self.skipper.needs_windows:
                self.skipper.check(step=self.totals.steps, movement=movement)

    def _run(self, batches: Sequence[Batch], part: Round, span: tuple[float, float]) -> None:
        schedule, position = self._schedule, self.position
        opens_at = len(batches)
        if not schedule.window_steps:
            opens_at = 0
        elif part.ends_segment:
            opens_at = max(0, len(batches) - schedule.window_steps)

        def step(batch: StagedBatch) -> None:
            done = position.batches_done
            is_due = done >= opens_at and self.totals.steps >= schedule.warmup_steps
            if self.skipper.needs_windows and is_due and not self.tracker.is_open:
                self.tracker.open_window()
            progress = (span[0] + (span[1] - span[0]) * done / len(batches)) / schedule.epochs
            self._step(batch, self._lr_schedule(progress))
            position.batches_done = done + 1

        remaining = iter(batches[position.batches_done :])
        try:
            self.lookahead.run(remaining, step, between_chunks=lambda: self._between_chunks(self))
        except StagingOverflowError as exc:
            raise CapacityError(
                f"{exc} (`train.batch_size` = {schedule.batch_size})",
                hint=f"make room for {exc.needed} rows: raise `train.staging_rows` or, in mode `cached`, "
                "`train.cache_ratio`; or lower `train.batch_size`",
            ) from exc

    def _step(self, batch: StagedBatch, lr: float) -> None:
        self.step(batch, lr)
        self.tracker.touch(batch.touched())
        totals = self.totals
        totals.losses_in_sum += 1
        totals.steps += 1
        totals.hot_steps += batch.is_hot
        totals.samples_seen += len(batch)
        if totals.steps % self._log_every == 0:
            self._report()

    def _score(self, samples: Samples) -> np.ndarray:
        self.lookahead.flush()
        step = self.step
        predicted, _ = predict(
            step.model, step.rows, [samples], batch_size=_SCORE_BATCH, representations=step.representations
        )
        return predicted

    def _report(self) -> None:
        totals = self.totals
        if not totals.losses_in_sum:
            return
        loss = (totals.loss_sum + self.step.take_loss_sum()) / totals.losses_in_sum
        if not np.isfinite(loss):
            first = totals.steps - totals.losses_in_sum + 1
            raise TrainingError(
                f"the loss became {loss} between steps {first} and {totals.steps}",
                hint="lower `train.lr`; look for extreme dense values if preprocess.dense_transform is 'none'",
            )
        totals.loss_sum, totals.losses_in_sum = 0.0, 0
        totals.losses.append(loss)
        self._on_report(
            StepReport(
                step=totals.steps,
                loss=loss,
                samples_seen=totals.samples_seen,
                samples_dropped=self.skipper.dropped,
                samples_per_second=totals.samples_seen / self.elapsed(),
                hot_batch_share=totals.hot_steps / totals.steps,
                threshold=self.skipper.threshold,
            )
        )
