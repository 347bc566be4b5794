"""The published order of FAE and Slipstream, for comparison with the papers.

    1. all cold batches, every row on the host, no look-ahead
    2. copy all hot rows to the device
    3. hot batches 0..E; snapshots at S and E
    4. T by bisection on [0, 0.1]; rows not looked up count as stale; T = 0 when no step lands within the tolerance
    5. classify the remaining hot samples once; the dropped ones are gone for the epoch
    6. train the rest; copy all hot rows back

A row has two copies here, and whole tables move between phases; the loss is the mean over a batch, however few samples
it has. The published code's crashes are not reproduced, nor its second training of batch E. Source: the released code
of both systems (FAE, arXiv 2103.00686; Slipstream, arXiv 2404.04270), which has no shuffle scheduler.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from slipstream.embedding.tiers.lookahead import Batch, LookAhead, StagedBatch
from slipstream.embedding.tiers.placement import StagingHalves
from slipstream.embedding.tiers.rows import TieredRows
from slipstream.io.figures import FitFigures
from slipstream.io.samples import Samples
from slipstream.training.loop import LoopTotals, fit_figures
from slipstream.training.order.batches import cut_batches
from slipstream.training.order.rounds import OpenStreams
from slipstream.training.order.stream import SampleStream
from slipstream.training.skipping.staleness import PADDING, bisect_threshold, sample_movement
from slipstream.training.step import TrainStep


@dataclass(frozen=True, kw_only=True, slots=True)
class FaithfulRule:
    """The published parameters of dropping."""

    target_drop: float
    """D; 0 drops nothing, which is FAE."""
    alpha: float
    """Share of lookups that must be stale; 1 is the published count of all 26."""
    alpha_tables: tuple[int, ...] = ()
    """Table of each column, where every table is to have that share by itself, as published for TBSM; empty: not."""
    first_snapshot: int
    """S: hot batch before which the first snapshot is taken."""
    probe_share: float = 0.015
    """p: the second snapshot follows batch E = round(p * hot batches) + S."""
    tolerance: float = 0.08
    """How far from D the bisection may stop."""
    sample_size: int = 65_536
    """Remaining hot samples that T is searched on, drawn with replacement."""
    sample_ratio: float = 0.0
    """The same as a share of all hot samples of the epoch; 0 takes `sample_size`."""


class FaithfulTrainer:
    """Trains one model in the published order.

    Args:
        step: Step over all rows on the host; `step.rows` has no hot tier.
        num_hot: Slots below this are hot.
        rule: When to drop.
        epochs: Passes over the samples.
        batch_size: Samples per step.
        lr: Learning rate.
        seed: Draws the samples that T is searched on.
        padding_slots: Hot slots that stand for no id: their lookups are not counted; None for none.
    """

    def __init__(
        self,
        *,
        step: TrainStep,
        num_hot: int,
        rule: FaithfulRule,
        epochs: int,
        batch_size: int,
        lr: float,
        seed: int,
        padding_slots: np.ndarray | None = None,
    ) -> None:
        self.totals = LoopTotals()
        self.step = step
        padding = step.representations.padded
        self.lookahead = LookAhead(step.rows, StagingHalves(step.rows), chunk_batches=1, padding=padding)
        self.classified = self.dropped = 0
        self.threshold: float | None = None
        self.sync_bytes = 0
        """Bytes of the whole-table copies."""
        self.sync_seconds = 0.0
        self._rule, self._epochs, self._batch_size, self._lr, self._seed = rule, epochs, batch_size, lr, seed
        self._padding_slots = padding_slots
        host = step.rows
        self._hot_rows = TieredRows(
            num_rows=num_hot,
            num_hot=num_hot,
            embedding_dim=host.embedding_dim,
            num_staged=0,
            optimizer=host.optimizer,
            device=host.device,
        )
        self._hot_step = step.over(self._hot_rows)
        placement = StagingHalves(self._hot_rows)
        self._hot_lookahead = LookAhead(self._hot_rows, placement, chunk_batches=1, padding=padding)

    def figures(self) -> FitFigures:
        """Sum up what training amounted to."""
        return fit_figures(
            self.totals,
            self.lookahead,
            classified=self.classified,
            dropped=self.dropped,
            asked=self._rule.target_drop,
            threshold=self.threshold,
            bytes_per_tier=self.bytes_per_tier(),
            sync_bytes=self.sync_bytes,
            sync_seconds=self.sync_seconds,
        )

    def bytes_per_tier(self) -> dict[str, int]:
        """Bytes on the device and on the host; hot rows count twice, as they are there twice."""
        hot, host = self._hot_rows.bytes_per_tier(), self.step.rows.bytes_per_tier()
        snapshots = 2 * self._hot_rows.buffer.nbytes if self._rule.target_drop else 0
        return {"hot": hot["hot"] + snapshots, "staging": host["staging"], "cold": host["cold"]}

    def train(self, open_streams: OpenStreams) -> None:
        """Train all epochs."""
        started, cpu_started = time.perf_counter(), time.process_time()
        self.step.model.train()
        for epoch in range(self._epochs):
            streams = open_streams(epoch)
            cold = self._batches(_drain(streams["cold"]), is_hot=False)
            self.lookahead.run(cold, lambda batch: self._train(batch, self.step))
            self.lookahead.flush()
            self._sync(to_device=True)
            self._train_hot(_drain(streams["hot"]), streams["hot"].remaining, epoch)
            self._sync(to_device=False)
        self.totals.losses.append((self.step.take_loss_sum() + self._hot_step.take_loss_sum()) / self.totals.steps)
        self.totals.seconds, self.totals.cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started

    def _train_hot(self, samples: Iterator[Samples], num_hot_samples: int, epoch: int) -> None:
        rule = self._rule
        batches = list(self._batches(samples, is_hot=True))
        end = round(rule.probe_share * len(batches)) + rule.first_snapshot
        if not rule.target_drop or end >= len(batches):
            self._run_hot(batches)
            return
        self._run_hot(batches[: rule.first_snapshot])
        hot_rows = self._hot_rows.buffer[: self._hot_rows.num_hot]
        before = hot_rows.clone()
        self._run_hot(batches[rule.first_snapshot : end + 1])
        moved = (hot_rows - before).abs_().amax(dim=1).cpu().numpy()
        if self._padding_slots is not None:
            moved[self._padding_slots] = PADDING
        rest = batches[end + 1 :]
        if rest:
            self._run_hot(self._drop(rest, moved, epoch, num_hot_samples))

    def _drop(self, batches: Sequence[Batch], moved: np.ndarray, epoch: int, num_hot_samples: int) -> list[Batch]:
        rule = self._rule
        slots = np.concatenate([batch.slots for batch in batches])
        statistic = sample_movement(moved, slots, alpha=rule.alpha, tables=rule.alpha_tables)
        size = max(int(rule.sample_ratio * num_hot_samples), 1) if rule.sample_ratio else rule.sample_size
        drawn = np.random.default_rng([self._seed, epoch]).choice(statistic, min(size, len(statistic)))
        self.threshold = bisect_threshold(drawn, target_drop=rule.target_drop, tolerance=rule.tolerance)
        keep = statistic >= self.threshold
        self.classified += len(keep)
        self.dropped += int(np.count_nonzero(~keep))
        kept = Samples(
            X_int=np.concatenate([batch.dense for batch in batches])[keep],
            X_cat=slots[keep],
            y=np.concatenate([batch.labels for batch in batches])[keep],
        )
        return cut_batches(kept, batch_size=self._batch_size, is_hot=True)

    def _run_hot(self, batches: Sequence[Batch]) -> None:
        self._hot_lookahead.run(iter(batches), lambda batch: self._train(batch, self._hot_step))

    def _train(self, batch: StagedBatch, step: TrainStep) -> None:
        step(batch, self._lr)
        self.totals.steps += 1
        self.totals.hot_steps += batch.is_hot
        self.totals.samples_seen += len(batch)

    def _sync(self, *, to_device: bool) -> None:
        """Copy every hot row, and its optimizer state, between its two homes."""
        started = time.perf_counter()
        num_hot = self._hot_rows.num_hot
        for (buffer, _), (_, host_rows) in zip(self._hot_rows.pairs, self.step.rows.pairs, strict=True):
            device_rows, master = buffer[:num_hot], host_rows[:num_hot]
            if to_device:
                device_rows.copy_(master)
            else:
                master.copy_(device_rows)
            self.sync_bytes += device_rows.nbytes
        if self._hot_rows.device.type == "cuda":
            torch.cuda.synchronize(self._hot_rows.device)
        self.sync_seconds += time.perf_counter() - started

    def _batches(self, samples: Iterator[Samples], *, is_hot: bool) -> Iterator[Batch]:
        left: Samples | None = None
        for piece in samples:
            whole = piece if left is None else left.followed_by(piece)
            stop = len(whole) - len(whole) % self._batch_size
            yield from cut_batches(whole.take(slice(0, stop)), batch_size=self._batch_size, is_hot=is_hot)
            left = whole.take(slice(stop, None))
        if left is not None and len(left):
            yield from cut_batches(left, batch_size=self._batch_size, is_hot=is_hot)


def _drain(stream: SampleStream) -> Iterator[Samples]:
    while (samples := stream.take(1 << 18)) is not None:
        yield samples
