"""How fast a pipeline would train here: a few seconds of real steps, and what has to move.

The loop that always trains is run on samples drawn from the access counts with all rows hot: what a sample takes with
its rows at hand. What else there is to do shows when hardly any rows are hot, or a tenth, and when the criterion of the
pipeline is at work; that is tried around hardly any network, for beside layers it is lost in their noise. It gives the
cost of a row that is fetched and written back, of a row that two chunks have in common, and of a sample that the
criterion decides about. How many rows move under a hot set follows from the counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from slipstream.config import PipelineConfig
from slipstream.io.capacity import available_memory
from slipstream.io.figures import PreprocessFigures
from slipstream.io.samples import Samples
from slipstream.models.model import Model
from slipstream.ops.hit_curve import HitCurve, Moves
from slipstream.ops.hot_set import assign_slots, rank_rows, table_offsets, take_hot_rows
from slipstream.stage import trained_row_bytes
from slipstream.training.device import resolve_device
from slipstream.training.order.rounds import OpenStreams
from slipstream.training.order.schedule import default_segment_steps
from slipstream.training.order.stream import SampleStream
from slipstream.training.representations import lay_out
from slipstream.training.skipping.registry import CRITERIA
from slipstream.training.threads import torch_threads
from slipstream.wiring import choose_tables, make_trainer, num_threads, put_together

MOST_TABLE_BYTES = 256 << 20
"""Of the tables that steps are tried on; larger ones are folded, and their rarest rows share places."""
ALL, FEW, TENTH = "all rows hot", "few rows hot", "a tenth of rows hot"
_SECONDS = 0.6
"""Of one trial, about."""
_ROUNDS = 3
"""Trials of each kind, in turn; medians count."""
_WARM_UP_STEPS, _LEAST_STEPS, _MOST_STEPS = 4, 16, 400


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Seconds, of the wall and of all processors."""

    wall: float
    cpu: float

    def __add__(self, other: Cost) -> Cost:
        """Add both."""
        return Cost(wall=self.wall + other.wall, cpu=self.cpu + other.cpu)

    def __mul__(self, times: float) -> Cost:
        """Multiply both."""
        return Cost(wall=self.wall * times, cpu=self.cpu * times)

    def less(self, other: Cost) -> Cost:
        """Take away another cost, of each as much as there is."""
        return Cost(wall=max(0.0, self.wall - other.wall), cpu=max(0.0, self.cpu - other.cpu))


NOTHING = Cost(wall=0.0, cpu=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What this machine takes."""

    per_sample: Cost
    """A sample trained on, its rows at hand."""
    per_fetched_row: Cost
    """A row that is fetched, staged and written back."""
    per_forwarded_row: Cost
    """A row that stays for the next chunk."""
    per_offered_sample: Cost
    """What the criterion takes of a sample: deciding about it, and watching the rows that it looks up."""
    row_bytes: int
    """Of a row that moves, one way."""
    num_rows: int
    """Of the tables that steps were tried on."""
    device: str
    threads: int
    seconds: float
    """That calibrating took."""

    @property
    def bytes_per_second(self) -> float:
        """Rate at which rows move, there and back; 0 where that takes no time that shows."""
        return 2 * self.row_bytes / self.per_fetched_row.wall if self.per_fetched_row.wall else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """How fast a hot set would train."""

    samples_per_second: float
    """Samples trained on, dropped ones not among them, over seconds of training; as a trained model reports."""
    train_seconds: float
    """Of the whole training."""
    cpu_seconds: float
    """The same of all processors."""
    samples_trained: int
    samples_dropped: int
    bytes_to_device: int
    """Rows fetched; as many go back."""


def forecast_speed(
    calibration: Calibration,
    config: PipelineConfig,
    *,
    num_samples: int,
    hot_sample_share: float,
    fetched_per_sample: float,
    forwarded_per_sample: float,
) -> Speed:
    """Say how fast a hot set would train.

    Args:
        calibration: Of this machine.
        config: The pipeline, in the mode that is asked about.
        num_samples: Training samples of an epoch.
        hot_sample_share: Samples whose every lookup finds a hot row.
        fetched_per_sample: Rows fetched, per sample trained on.
        forwarded_per_sample: Rows that stay for the next chunk, likewise.
    """
    offered = num_samples * config.train.epochs
    criterion, classified, dropped = CRITERIA.get(config.criterion), 0.0, 0
    if criterion.drops:
        classified = offered * (hot_sample_share if config.skip_rule.scope == "hot" else 1.0)
        first = segment_samples(config, num_samples) / offered  # of the first segment nothing is dropped
        dropped = round(classified * config.skip.target_drop * max(0.0, 1 - first))
    trained = offered - dropped
    moving = calibration.per_fetched_row * fetched_per_sample + calibration.per_forwarded_row * forwarded_per_sample
    # rows are watched at every step, whatever is hot; other criteria do their work where they decide
    attended = offered if criterion.watches_rows else classified
    total = (calibration.per_sample + moving) * trained + calibration.per_offered_sample * attended
    return Speed(
        samples_per_second=trained / total.wall,
        train_seconds=total.wall,
        cpu_seconds=total.cpu,
        samples_trained=trained,
        samples_dropped=dropped,
        bytes_to_device=round(trained * fetched_per_sample * calibration.row_bytes),
    )


def calibrate(config: PipelineConfig, figures: PreprocessFigures, counts: np.ndarray) -> Calibration:
    """Train a few seconds, on samples drawn from access counts, and see what takes how long.

    Args:
        config: The pipeline.
        figures: What preprocess says of its tables.
        counts: Access counts per global row. Shape (V,).
    """
    started = time.perf_counter()
    tables = _cut_tables(config, figures, counts)
    own = replace(config, train=replace(config.train, epochs=1))
    plain = replace(own, train=replace(own.train, mode="fae"))
    bare, bare_own = (replace(one, model=Bare(embedding_dim=config.model.row_width)) for one in (plain, own))
    hot_sets = _hot_sets(tables)
    whole = _Trial(plain, figures, tables, hot_sets[ALL])
    trials = {name: _Trial(bare, figures, tables, is_hot) for name, is_hot in hot_sets.items()}
    moved = [name for name in trials if name != ALL]
    steps, bare_steps = whole.choose_steps(plain), trials[ALL].choose_steps(bare)
    for name in moved:
        trials[name].run(bare, _LEAST_STEPS)
    samples: list[Cost] = []
    skipping: list[Cost] = []
    beyond: dict[str, list[Cost]] = {name: [] for name in moved}
    for _ in range(_ROUNDS):
        samples.append(whole.run(plain, steps).per_sample)
        at_hand = trials[ALL].run(bare, bare_steps).per_sample
        for name in moved:
            beyond[name].append(trials[name].run(bare, bare_steps).per_sample.less(at_hand))
        if CRITERIA.get(config.criterion).drops:
            skipping.append(trials[ALL].run(bare_own, bare_steps).beyond(at_hand))
    fetched, forwarded = _attribute(
        [trials[name].moves(plain) for name in moved], [_median(beyond[name]) for name in moved]
    )
    return Calibration(
        per_sample=_median(samples),
        per_fetched_row=fetched,
        per_forwarded_row=forwarded,
        per_offered_sample=_median(skipping) if skipping else NOTHING,
        row_bytes=trained_row_bytes(config),
        num_rows=len(tables.counts),
        device=whole.parts.rows.device.type,
        threads=whole.threads,
        seconds=time.perf_counter() - started,
    )


def _median(tries: Sequence[Cost]) -> Cost:
    return Cost(wall=statistics.median(one.wall for one in tries), cpu=statistics.median(one.cpu for one in tries))


def _attribute(moves: Sequence[tuple[float, float]], beyond: Sequence[Cost]) -> tuple[Cost, Cost]:
    """Say what a fetched row and a forwarded one take, from what trials took beyond that with all rows at hand.

    Args:
        moves: (fetched, forwarded) rows per sample of each trial.
        beyond: Cost per sample of each.
    """
    wall, cpu = (solve_costs(moves, [getattr(one, name) for one in beyond]) for name in ("wall", "cpu"))
    return Cost(wall=wall[0], cpu=cpu[0]), Cost(wall=wall[1], cpu=cpu[1])


def solve_costs(moves: Sequence[tuple[float, float]], beyond: Sequence[float]) -> tuple[float, float]:
    """Fit two costs, neither below zero, by least squares."""
    features, target = np.array(moves), np.array(beyond)
    best, least = (0.0, 0.0), float(np.square(target).sum())
    for used in ([0, 1], [0], [1]):
        fitted = np.linalg.lstsq(features[:, used], target, rcond=None)[0]
        left = float(np.square(features[:, used] @ fitted - target).sum())
        if (fitted >= 0).all() and left < least:
            costs = np.zeros(2)
            costs[used] = fitted
            best, least = (float(costs[0]), float(costs[1])), left
    return best


def segment_samples(config: PipelineConfig, num_samples: int) -> int:
    """Count the samples before the first check, of which none is dropped."""
    steps = config.skip.refresh_steps or default_segment_steps(num_samples, config.train.batch_size)
    return min(num_samples, max(steps, config.skip.warmup_steps) * config.train.batch_size)


def moves_per_sample(
    curve: HitCurve, policy: str, num_rows: int, *, room: int, config: PipelineConfig, num_samples: int
) -> tuple[float, float]:
    """Say how many rows move per sample trained on: (fetched, forwarded), on average.

    Cold rows are fetched together for the batches of a chunk, or for fewer where those have no room.

    Args:
        curve: Of the counts.
        policy: That chose the hot rows.
        num_rows: H.
        room: Cold rows that a half of the staging area holds.
        config: The pipeline.
        num_samples: That the counts are of.
    """
    batch_size = config.train.batch_size

    def moves(batches: float) -> Moves:
        return curve.moves(policy, num_rows, samples_per_chunk=batches * batch_size, num_samples=num_samples)

    low, high = 1.0, float(1 if config.train.mode == "baseline" else config.train.chunk_batches)
    if moves(high).staged > room:
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if moves(middle).staged <= room else (low, middle)
        high = low
    found = moves(high)
    return found.fetched / (high * batch_size), (found.staged - found.fetched) / (high * batch_size)


# --- trials --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tables:
    """Tables to try steps on: those of the pipeline, or their most used rows where they are larger."""

    rows_per_table: dict[str, int]
    counts: np.ndarray
    num_samples: int
    """That the counts are of."""

    @property
    def offsets(self) -> np.ndarray:
        """Global row of each table's row 0, and V at the end."""
        return table_offsets(list(self.rows_per_table.values()))


def _cut_tables(config: PipelineConfig, figures: PreprocessFigures, counts: np.ndarray) -> _Tables:
    most_bytes = min(MOST_TABLE_BYTES, available_memory() // 16)
    kept = min(1.0, most_bytes / (trained_row_bytes(config) * len(counts)))
    sizes = {name: max(2, int(kept * size)) if kept < 1 else size for name, size in figures.rows_per_table.items()}
    cuts = pairwise(table_offsets(list(figures.rows_per_table.values())))
    pieces = [_fold(counts[start:stop], size) for (start, stop), size in zip(cuts, sizes.values(), strict=True)]
    num_columns = max(1, len(figures.column_tables))
    return _Tables(
        rows_per_table={name: len(piece) for name, piece in zip(sizes, pieces, strict=True)},
        counts=np.concatenate(pieces),
        num_samples=int(counts.sum()) // num_columns,
    )


def _fold(counts: np.ndarray, size: int) -> np.ndarray:
    """Let the rows beyond a size be looked up as rows within it, in turn, from row 1 on."""
    if size >= len(counts):
        return counts
    folded = counts[:size].copy()
    where = 1 + (np.arange(size, len(counts)) - size) % (size - 1)
    folded += np.bincount(where, counts[size:], size).astype(folded.dtype)
    return folded


def _hot_sets(tables: _Tables) -> dict[str, np.ndarray]:
    """Give the hot sets that are tried, as masks over global rows."""
    oov = tables.offsets[:-1]
    ranked = rank_rows(tables.counts, oov)

    def first(num_rows: int) -> np.ndarray:
        return take_hot_rows(ranked, tables.counts, num_rows=max(num_rows, len(oov)), num_always=len(oov)).is_hot

    return {ALL: np.ones(len(ranked), bool), FEW: first(len(oov)), TENTH: first(len(ranked) // 10)}


@dataclass(frozen=True, slots=True)
class _Tried:
    """What became of a trial."""

    cost: Cost
    trained: int
    """Samples."""
    offered: int
    """Samples, those that were dropped among them."""

    @property
    def per_sample(self) -> Cost:
        """Cost of a sample trained on."""
        return self.cost * (1 / self.trained)

    def beyond(self, per_sample: Cost) -> Cost:
        """Cost of a sample offered, beyond what those trained on take anyway."""
        return self.cost.less(per_sample * self.trained) * (1 / self.offered)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bare(Model):
    """Hardly any network: what moving and watching rows takes is not lost in the noise of layers."""

    def check(self) -> None:
        """Check nothing: there are no options."""

    def build(self, *, num_dense: int, num_columns: int) -> nn.Module:
        """Make a network that adds up what it is given, and one weight of it."""

        class Network(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.ones(1))

            def forward(self, dense: Tensor, rows_BFD: Tensor) -> Tensor:
                logits: Tensor = (dense.sum(dim=1) + rows_BFD.sum(dim=(1, 2))) * self.weight
                return logits

        return Network()


class _Trial:
    """A hot set, and trainings over it.

    Args:
        config: The pipeline, in mode `fae`.
        figures: What preprocess says of its tables.
        tables: What is looked up.
        is_hot: Of each global row.
    """

    def __init__(self, config: PipelineConfig, figures: PreprocessFigures, tables: _Tables, is_hot: np.ndarray) -> None:
        self._config, self._figures, self._tables = config, figures, tables
        self._slots, self._num_hot = assign_slots(is_hot), int(is_hot.sum())
        specs = choose_tables(config, replace(figures, rows_per_table=tables.rows_per_table), tables.counts)
        cuts = pairwise(tables.offsets)
        layout = lay_out(
            {name: self._slots[start:stop] for name, (start, stop) in zip(tables.rows_per_table, cuts, strict=True)},
            specs,
            num_hot=self._num_hot,
            table_of_column=figures.column_tables,
        )
        self.parts = put_together(
            config,
            layout=layout,
            specs=specs,
            figures=replace(figures, padding_rows=None),
            counts=tables.counts,
            device=resolve_device(config.train.device),
        )
        self.threads = num_threads(config, self.parts)

    def choose_steps(self, config: PipelineConfig) -> int:
        """Count the steps of a trial that takes long enough."""
        self.run(config, _WARM_UP_STEPS)
        step_seconds = self.run(config, _LEAST_STEPS).cost.wall / _LEAST_STEPS
        return int(np.clip(_SECONDS / step_seconds, _LEAST_STEPS, _MOST_STEPS))

    def run(self, config: PipelineConfig, steps: int) -> _Tried:
        """Train on so many batches of samples."""
        drawn = self._draw(steps * config.train.batch_size)
        is_hot = np.asarray((drawn.X_cat < self._num_hot).all(axis=1))
        samples = self.parts.layout.translate(drawn)
        self.parts.step.tracker = None  # one of an earlier trial
        trainer = make_trainer(config, self.parts, num_train=len(samples))
        with torch_threads(self.threads), _streams(samples.take(is_hot), samples.take(~is_hot)) as open_streams:
            trainer.train(open_streams)
        totals = trainer.totals
        return _Tried(Cost(wall=totals.seconds, cpu=totals.cpu_seconds), totals.samples_seen, len(samples))

    def moves(self, config: PipelineConfig) -> tuple[float, float]:
        """(rows fetched, rows forwarded) per sample, on average."""
        tables = self._tables
        curve = HitCurve(tables.counts, tables.offsets, self._figures.column_tables, {"frequency": []})
        return moves_per_sample(
            curve,
            "frequency",
            self._num_hot,
            room=self.parts.rows.num_staged // 2,
            config=config,
            num_samples=tables.num_samples,
        )

    def _draw(self, num_samples: int) -> Samples:
        """Draw each lookup by itself, as often as its row is counted."""
        rng = np.random.default_rng(0)
        X_cat = np.empty((num_samples, len(self._figures.column_tables)), self._slots.dtype)
        cuts = list(pairwise(self._tables.offsets))
        for column, table in enumerate(self._figures.column_tables):
            start, stop = cuts[table]
            upto = np.cumsum(self._tables.counts[start:stop])
            rows = np.searchsorted(upto, rng.integers(0, max(int(upto[-1]), 1), num_samples), side="right")
            X_cat[:, column] = self._slots[start + np.minimum(rows, stop - start - 1)]
        return Samples(
            X_int=rng.normal(size=(num_samples, self._figures.num_dense)).astype(np.float32),
            X_cat=X_cat,
            y=(rng.random(num_samples) < 0.25).astype(np.float32),
        )


@contextmanager
def _streams(hot: Samples, cold: Samples) -> Iterator[OpenStreams]:
    """Give samples in memory as the loop takes them."""

    def stream(samples: Samples, workers: ThreadPoolExecutor) -> SampleStream:
        pieces = [(lambda: samples, len(samples))] if len(samples) else []
        return SampleStream(
            [load for load, _ in pieces],
            [size for _, size in pieces],
            seed=(0,),
            window_samples=max(1, len(samples)),
            workers=workers,
        )

    with ThreadPoolExecutor(2) as workers:
        yield lambda epoch: {"hot": stream(hot, workers), "cold": stream(cold, workers)}
