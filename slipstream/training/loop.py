"""The loop every mode shares: rounds of samples, look-ahead over their batches, one step per batch.

Modes differ in which rows sit on the device and how far the loop looks ahead, not in what it computes; over the same
batch order they end with the same parameters, to the bit on CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np

from slipstream.embedding.tiers.in_place import InPlace, Runner
from slipstream.embedding.tiers.lookahead import Batch, StagedBatch
from slipstream.embedding.tiers.placement import StagingOverflowError
from slipstream.errors import CapacityError, TrainingError
from slipstream.io.figures import FitFigures
from slipstream.io.samples import Samples
from slipstream.training.order.rounds import OpenStreams, Position, PreparedRound, RoundPreparer
from slipstream.training.order.schedule import Schedule
from slipstream.training.predict import predict
from slipstream.training.skipping.skipper import Skipper
from slipstream.training.step import TrainStep
from slipstream.training.validation import Validation

_SCORE_BATCH = 16_384


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
    samples_dropped: int = 0
    """Of rounds that have begun."""
    seconds: float = 0.0
    """Wall time of training, loading and scoring included, evaluation left out."""
    cpu_seconds: float = 0.0
    """Processor time of the same, of all threads of the process."""
    input_seconds: float = 0.0
    """Of `seconds`, waiting for samples: reading them, and choosing which to skip."""
    losses: list[float] = field(default_factory=list)
    """Mean loss of each stretch of `log_every` steps."""
    loss_sum: float = 0.0
    losses_in_sum: int = 0


def fit_figures(
    totals: LoopTotals,
    lookahead: Runner,
    *,
    classified: int,
    dropped: int,
    asked: float,
    threshold: float | None,
    bytes_per_tier: dict[str, int],
    averaged_steps: int | None = None,
    sync_bytes: int | None = None,
    sync_seconds: float | None = None,
) -> FitFigures:
    """Sum up a training."""
    return FitFigures(
        steps=totals.steps,
        hot_steps=totals.hot_steps,
        samples_seen=totals.samples_seen,
        samples_dropped=dropped,
        samples_classified=classified,
        drop_asked=asked,
        drop_achieved=dropped / classified if classified else 0.0,
        threshold=threshold,
        samples_per_second=totals.samples_seen / totals.seconds,
        train_seconds=totals.seconds,
        cpu_seconds=totals.cpu_seconds,
        bytes_to_device=lookahead.bytes_to_device,
        bytes_to_host=lookahead.bytes_to_host,
        hit_ratio=1 - lookahead.cold_lookups / max(lookahead.lookups, 1),
        bytes_per_tier=bytes_per_tier,
        averaged_steps=averaged_steps,
        sync_bytes=sync_bytes,
        sync_seconds=sync_seconds,
    )


class Trainer:
    """Trains a model over tiered rows.

    Args:
        step: One training step, and the model it trains.
        lookahead: Stages batches for the step.
        lr_schedule: Learning rate of rows and dense layers, from the share of training done, in [0, 1].
        skipper: Leaves samples out.
        schedule: How epochs are cut.
        log_every: Steps between reports.
        average: Share of training, its last part, whose weights are averaged by the step.
        validation: Measures what would be served at the end of every epoch, and more often; None does not.
        padding_slots: Hot slots that stand for no id, for criteria that watch rows; None for none.
        on_report: Hears reports.
        on_batch: Hears every batch that is trained on, as it was before it was staged, and its learning rate.
        between_chunks: Called with the trainer whenever no row is moving, for checkpoints.
        most_steps: Steps after which training ends, whatever the schedule says; None for none.
    """

    def __init__(
        self,
        *,
        step: TrainStep,
        lookahead: Runner,
        lr_schedule: Callable[[float], float],
        skipper: Skipper,
        schedule: Schedule,
        log_every: int,
        average: float = 0.0,
        validation: Validation | None = None,
        padding_slots: np.ndarray | None = None,
        on_report: Callable[[StepReport], None] = lambda report: None,
        on_batch: Callable[[Batch, float], None] | None = None,
        between_chunks: Callable[[Trainer], None] = lambda trainer: None,
        most_steps: int | None = None,
    ) -> None:
        self.totals = LoopTotals()
        self.position = Position()
        self._preparer: RoundPreparer | None = None
        self.step, self.lookahead, self.skipper = step, lookahead, skipper
        if skipper.criterion.watches_rows:
            hot_rows = step.rows.buffer[: step.rows.num_hot]
            step.watch(skipper.criterion.make_tracker(hot_rows, padding_slots=padding_slots))
        self._lr_schedule, self._schedule = lr_schedule, schedule
        self._averages_from = 1.0 - average
        self.validation = validation
        self._log_every, self._on_report, self._between_chunks = log_every, on_report, between_chunks
        self._on_batch, self._most_steps = on_batch, most_steps
        self._started, self._cpu_started = time.perf_counter(), time.process_time()

    def train(self, open_streams: OpenStreams) -> None:
        """Train to the end of the schedule, from `position` on.

        Args:
            open_streams: Gives the streams of an epoch.

        Raises:
            TrainingError: The loss became infinite or NaN.
            CapacityError: A batch does not fit the staging area.
        """
        self._started, self._cpu_started = time.perf_counter(), time.process_time()
        self.step.model.train()
        ring = self.lookahead.ring if isinstance(self.lookahead, InPlace) else None
        preparer = RoundPreparer(self._schedule, self.skipper, score=self._score, position=self.position, ring=ring)
        self._preparer = preparer
        with closing(preparer.run(open_streams)) as rounds:
            asked = time.perf_counter()
            for prepared in rounds:
                self.totals.input_seconds += time.perf_counter() - asked
                self._train_round(prepared)
                if self._is_over():
                    break
                asked = time.perf_counter()
        self.position = Position(epoch=self._schedule.epochs)
        self._report()
        self.lookahead.flush()
        self.totals.seconds, self.totals.cpu_seconds = self.elapsed(), self.elapsed_cpu()

    def decided_position(self) -> Position:
        """Give the position with all that is decided; until the next step nothing more is. While training."""
        assert self._preparer is not None
        self.position.picked_ahead = self._preparer.wait()
        return self.position

    def has_decided(self) -> bool:
        """Whether `decided_position` would return at once."""
        return self._preparer is not None and self._preparer.is_idle()

    def figures(self) -> FitFigures:
        """Sum up what training amounted to."""
        figures = fit_figures(
            self.totals,
            self.lookahead,
            classified=self.skipper.classified,
            dropped=self.skipper.dropped,
            asked=self.skipper.rule.target_drop if self.skipper.criterion.drops else 0.0,
            threshold=self.skipper.threshold,
            bytes_per_tier=self._bytes_per_tier(),
            averaged_steps=None if self.step.average is None else self.step.average.num_steps(),
        )
        return replace(
            figures,
            input_seconds=self.totals.input_seconds,
            move_seconds=self.lookahead.move_seconds,
            compute_seconds=self.lookahead.compute_seconds,
        )

    def _bytes_per_tier(self) -> dict[str, int]:
        rows, representations = self.step.rows, self.step.representations
        tiers = rows.bytes_per_tier()
        if per_row := self.skipper.criterion.tracker_bytes(embedding_dim=rows.embedding_dim):
            tiers["staleness"] = rows.num_hot * per_row
        if representations.has_cores:
            tiers["tt"] = representations.core_bytes()
        return tiers

    def elapsed(self) -> float:
        """Wall seconds of training so far, those before an interruption included."""
        return self.totals.seconds + time.perf_counter() - self._started

    def elapsed_cpu(self) -> float:
        """Processor seconds of training so far, those before an interruption included."""
        return self.totals.cpu_seconds + time.process_time() - self._cpu_started

    def _train_round(self, prepared: PreparedRound) -> None:
        position = self.position
        is_resumed = position.picked is not None and (position.epoch, position.round_index) == (
            prepared.epoch,
            prepared.index,
        )
        if not is_resumed:
            self.position = Position(
                epoch=prepared.epoch, round_index=prepared.index, waiting=prepared.waiting, picked=prepared.picked
            )
            self.totals.samples_dropped += prepared.num_dropped()
        self._run(prepared)
        if prepared.ends_epoch and not self._is_over():
            self._validate()
        tracker = self.step.tracker
        if prepared.ends_segment and tracker is not None and tracker.is_open:
            self.skipper.check(step=self.totals.steps, movement=tracker.close_window())

    def _run(self, prepared: PreparedRound) -> None:
        schedule, position = self._schedule, self.position
        batches, span = prepared.batches, prepared.span
        tracker, opens_at = self.step.tracker, len(batches)
        if not schedule.window_steps:
            opens_at = 0
        elif prepared.ends_segment:
            opens_at = max(0, len(batches) - schedule.window_steps)

        def train(batch: StagedBatch) -> None:
            done = position.batches_done
            is_due = done >= opens_at and self.totals.steps >= schedule.warmup_steps
            if tracker is not None and is_due and not tracker.is_open:
                tracker.open_window()
            progress = (span[0] + (span[1] - span[0]) * done / len(batches)) / schedule.epochs
            self.step.is_averaging = self.step.average is not None and progress >= self._averages_from
            lr = self._lr_schedule(progress)
            if self._on_batch is not None:
                self._on_batch(batches[done], lr)
            self._train_batch(batch, lr)
            position.batches_done = done + 1

        steps_left = None if self._most_steps is None else self._most_steps - self.totals.steps
        remaining = batches[position.batches_done :][:steps_left]
        try:
            for stretch in self._stretches(remaining):
                self.lookahead.run(iter(stretch), train, between_chunks=lambda: self._between_chunks(self))
                if self.validation is not None and self.validation.is_due(self.totals.steps):
                    self._validate()
                if self._is_over():
                    return
        except StagingOverflowError as exc:
            raise CapacityError(
                f"{exc} (`train.batch_size` = {schedule.batch_size})",
                hint=f"make room for {exc.needed} rows: raise `train.staging_rows` or, in mode `cached`, "
                "`train.cache_ratio`; or lower `train.batch_size`",
            ) from exc

    def _stretches(self, batches: Sequence[Batch]) -> Iterator[Sequence[Batch]]:
        """Give batches up to the next measurement, then up to the one after it."""
        while batches:
            left = None if self.validation is None else self.validation.steps_left(self.totals.steps)
            yield batches[:left]
            batches = batches[len(batches) if left is None else left :]

    def _validate(self) -> None:
        """Measure what would be served now; the time it takes is no time of training."""
        if self.validation is None:
            return
        started, cpu_started = time.perf_counter(), time.process_time()
        self.lookahead.flush()
        with self.step.serving():
            self.validation(step=self.totals.steps, epoch=self.position.epoch)
        self._started += time.perf_counter() - started
        self._cpu_started += time.process_time() - cpu_started

    def _is_over(self) -> bool:
        """Whether training ends here, before the schedule does."""
        says_stop = self.validation is not None and self.validation.says_stop
        return says_stop or self.totals.steps == self._most_steps

    def _train_batch(self, batch: StagedBatch, lr: float) -> None:
        self.step(batch, lr)
        totals = self.totals
        totals.losses_in_sum += 1
        totals.steps += 1
        totals.hot_steps += batch.is_hot
        totals.samples_seen += batch.num_samples
        if totals.steps % self._log_every == 0:
            self._report()

    def _score(self, samples: Samples) -> np.ndarray:
        self.lookahead.flush()
        step = self.step
        predicted, _ = predict(step.model, step.look_up, [samples], batch_size=_SCORE_BATCH, ranks=step.ranks)
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
                samples_dropped=totals.samples_dropped,
                samples_per_second=totals.samples_seen / self.elapsed(),
                hot_batch_share=totals.hot_steps / totals.steps,
                threshold=self.skipper.threshold,
            )
        )
