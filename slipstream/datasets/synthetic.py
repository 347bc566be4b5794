"""Synthetic click logs: raw text like Criteo Kaggle's, with a known best AUC.

A line is a label, 13 integers and 26 tokens of 8 hexadecimal digits between tabs, an empty field where a
value is missing. Ids are Zipf-distributed with long tails, some gain or lose popularity from day to day,
values go missing together, and labels are drawn from a planted teacher whose own AUC says how good a model
can get.

Rows come in blocks of `BLOCK_ROWS`, each from its own random stream keyed by (seed, block), so any range of
rows can be made alone and the bytes do not depend on how the work is cut. Only raw PCG64 words, integer
arithmetic and rounded lookup tables decide them: the same spec gives the same text on every platform and
numpy version.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import IO, TYPE_CHECKING, NamedTuple, cast

import numpy as np

from slipstream.datasets.synthetic_teacher import (
    HEAD_IDS,
    NUM_LEVELS,
    PROBABILITY_BITS,
    Teacher,
    TeacherScore,
    hash_integers,
)
from slipstream.ops.split import chronological_bounds

if TYPE_CHECKING:
    from slipstream.datasets.source import Source, SourceOptions

NUM_INTEGERS = 13
NUM_TABLES = 26
BLOCK_ROWS = 8192
"""Rows that share a random stream. Part of the format: another number makes other logs."""
MISSING_INTEGER = -2
"""Stands for an empty field; below every integer that is written."""
MISSING_ID = -1
"""Stands for an empty field."""

_PILOT_BLOCKS = 4
_MOST_DAYS = 366
_KNOT_BITS = 12  # quantile functions are piecewise linear over this many bits of a 32-bit uniform number
_FRACTION_BITS = 32 - _KNOT_BITS
_FIXED_BITS = 10
_PURPOSE_DRIFT, _PURPOSE_TOKEN = 100, 101
_STEADY_TABLE_SIZE = 64  # a field of fewer values is an enumeration, and does not drift

_CRITEO_SAMPLES = 45_840_617
# Distinct values per table in all of Criteo Kaggle, and the power of the sample count with which they grow.
_CRITEO_SIZES = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194,
    27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip
_CRITEO_GROWTH = (
    0.15, 0.02, 0.8, 0.66, 0.12, 0.13, 0.06, 0.13, 0.0, 0.33, 0.06, 0.78, 0.01,
    0.01, 0.16, 0.75, 0.0, 0.12, 0.08, 0.05, 0.77, 0.07, 0.01, 0.47, 0.11, 0.42,
)  # fmt: skip
# How many times more values a table must have, at full size, for as many to be drawn as Criteo Kaggle has: draws from a
# law this skewed never reach most of its tail. Other tables are used up.
_UNSEEN = {2: 76.2, 3: 1.254, 11: 19.62, 15: 3.461, 20: 7.336}
# Share of the most frequent value, and of missing values (integers, then tokens), as in Criteo Kaggle.
_TOP_SHARES = (
    0.5, 0.11, 0.026, 0.037, 0.67, 0.45, 0.021, 0.6, 0.9, 0.22, 0.032, 0.026, 0.032,
    0.35, 0.016, 0.026, 0.46, 0.032, 0.62, 0.34, 0.026, 0.57, 0.44, 0.055, 0.26, 0.074,
)  # fmt: skip
_MISSING_RATIOS = (
    0.45, 0.0, 0.21, 0.21, 0.026, 0.22, 0.043, 0.001, 0.043, 0.45, 0.043, 0.765, 0.21,
    0.0, 0.0, 0.034, 0.034, 0.0, 0.12, 0.0, 0.0, 0.0, 0.0, 0.0, 0.034, 0.0,
    0.0, 0.0, 0.034, 0.0, 0.0, 0.44, 0.44, 0.034, 0.76, 0.0, 0.034, 0.44, 0.44,
)  # fmt: skip
# Tables where the rest is more skewed than elsewhere: this much is added to the exponent.
_STEEPER = {0: 0.7, 4: 1.0, 7: 0.8, 13: 1.0, 24: 0.7}
# Columns (integers 0 to 12, tokens 13 to 38) that go missing together decide by the bits of the first one.
_MISSING_LEADERS = {9: 0, 3: 2, 5: 2, 12: 2, 8: 6, 10: 6} | {
    13 + column: 13 + leader
    for leader, columns in {2: (3, 11, 15, 20, 23), 18: (19, 24, 25)}.items()
    for column in columns
}
# Tables that describe one thing: with this chance a sample takes its values in them from one popularity, so
# that rare ones come together. Otherwise hardly any sample of 26 lookups would have frequent values only.
_SHARED_TABLES = ((2, 3, 9, 11, 15, 20, 23, 25), (6, 10, 12, 14, 17))
_SHARED_BELOW = round(0.85 * 65536)
_NUM_WORDS = NUM_INTEGERS + NUM_TABLES + len(_SHARED_TABLES) + 1


class _IntegerShape(NamedTuple):
    """Shares of -1 and of 0, then a log-normal: its median and deviation, and the largest value written."""

    minus_one: float
    zero: float
    median: float
    sigma: float
    largest: int


_INTEGER_SHAPES = (
    _IntegerShape(0.0, 0.43, 3.0, 1.1, 5775),
    _IntegerShape(0.1, 0.17, 14.0, 2.0, 9999),
    _IntegerShape(0.0, 0.005, 6.0, 1.3, 9999),
    _IntegerShape(0.0, 0.05, 5.0, 1.0, 969),
    _IntegerShape(0.0, 0.02, 2800.0, 1.9, 4_000_000),
    _IntegerShape(0.0, 0.065, 36.0, 1.5, 233_523),
    _IntegerShape(0.0, 0.22, 6.0, 1.3, 9999),
    _IntegerShape(0.0, 0.11, 10.0, 1.0, 6047),
    _IntegerShape(0.0, 0.03, 42.0, 1.4, 9999),
    _IntegerShape(0.0, 0.48, 1.3, 0.5, 9),
    _IntegerShape(0.0, 0.23, 2.5, 1.0, 231),
    _IntegerShape(0.0, 0.74, 2.0, 1.0, 4008),
    _IntegerShape(0.0, 0.06, 5.0, 1.0, 7393),
)


def default_table_sizes(num_samples: int) -> tuple[int, ...]:
    """Return 26 vocabulary sizes in the proportions of Criteo Kaggle, for a log of this length.

    Small tables stay as they are; large ones grow with the log, each at its own pace. A log uses up only part of its
    largest tables: of those of a million samples about a third is drawn. Towards the size of Criteo Kaggle they get
    more values than that data set has, so that as many are drawn: 33.8 million of all tables.

    Args:
        num_samples: Rows of the log, >= 1.

    Returns:
        26 sizes, none below 3.
    """
    share = min(1.0, num_samples / _CRITEO_SAMPLES)
    in_proportion = (
        max(3, min(num_samples, round(size * share**growth)))
        for size, growth in zip(_CRITEO_SIZES, _CRITEO_GROWTH, strict=True)
    )
    # the third power leaves short logs as they are: less than a thousandth more up to a million samples
    return tuple(
        round(size * _UNSEEN[table] ** share**3) if table in _UNSEEN else size
        for table, size in enumerate(in_proportion)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticSpec:
    """Everything that decides the bytes of a synthetic log; a value out of range is a ValueError."""

    num_samples: int
    """Rows, >= 1."""
    num_days: int = 7
    """Days the rows are spread over evenly, 1 to 366, at most num_samples; earlier days get the remainder."""
    seed: int = 0
    """0 <= seed < 2**32."""
    table_sizes: tuple[int, ...] = ()
    """Possible values of each of the 26 tables, 1 to 2**31 - 1; empty for `default_table_sizes`."""
    zipf_exponent: float = 1.05
    """Popularity falls with this power of the rank, 0 to 4; larger is more skewed. Some tables add to it."""
    missing_ratios: tuple[float, ...] = _MISSING_RATIOS
    """Share of empty fields of each column, 13 integers then 26 tokens, each in [0, 1]."""
    drift_ratio: float = 0.1
    """Share of a table's frequent ids that change popularity overnight, in [0, 1]."""
    ctr: float = 0.26
    """Expected share of clicks, 0.01 to 0.99."""
    signal: float = 1.4
    """Standard deviation of the teacher's logit, 0.001 to 4: the larger, the easier to predict."""
    teacher_dim: int = 4
    """Length of the planted id vectors, 1 to 16."""
    noise_ratio: float = 0.0
    """Share of samples whose label has nothing to do with their features, 0 to 0.999."""

    def __post_init__(self) -> None:
        _check("num_samples", self.num_samples, 1, 2**44)
        _check("num_days", self.num_days, 1, min(self.num_samples, _MOST_DAYS))
        _check("seed", self.seed, 0, 2**32 - 1)
        _check("zipf_exponent", self.zipf_exponent, 0, 4)
        _check("drift_ratio", self.drift_ratio, 0, 1)
        _check("ctr", self.ctr, 0.01, 0.99)
        _check("signal", self.signal, 1e-3, 4)
        _check("teacher_dim", self.teacher_dim, 1, 16)
        _check("noise_ratio", self.noise_ratio, 0, 0.999)
        if not self.table_sizes:
            object.__setattr__(self, "table_sizes", default_table_sizes(self.num_samples))
        _check("number of table_sizes", len(self.table_sizes), NUM_TABLES, NUM_TABLES)
        _check("number of missing_ratios", len(self.missing_ratios), *(2 * [NUM_INTEGERS + NUM_TABLES]))
        for size in self.table_sizes:
            _check("table size", size, 1, 2**31 - 1)
        for ratio in self.missing_ratios:
            _check("missing ratio", ratio, 0, 1)

    def day_starts(self) -> tuple[int, ...]:
        """Return the first row of each day, and num_samples at the end; num_days + 1 entries."""
        return _even_starts(self.num_samples, self.num_days)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogRows:
    """Consecutive rows of a log before they become text."""

    labels: np.ndarray
    """1 for a click. Shape (n,), uint8."""
    integers: np.ndarray
    """Shape (13, n), int64; `MISSING_INTEGER` for an empty field."""
    ids: np.ndarray
    """Value of each table, by popularity on the first day. Shape (26, n), int64; `MISSING_ID` if empty."""
    levels: np.ndarray
    """The teacher's level, an index of its click probabilities. Shape (n,), int64."""
    probabilities: np.ndarray
    """The chance of a click that the label was drawn with, exactly. Shape (n,), float64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogSummary:
    """What was written, and how well the planted teacher predicts it."""

    num_samples: int
    """Rows."""
    positives: int
    """Clicks."""
    text_bytes: int
    """Bytes of text, before any compression."""
    teacher_auc: float | None
    """AUC of the teacher over all rows; None unless both labels occur."""
    teacher_logloss: float | None
    """Logloss of the teacher over all rows, in nats."""
    splits: dict[str, TeacherScore]
    """The teacher's score on `train`, `test` and `val`, split in order of time as `ops.split` does."""

    def to_json(self) -> str:
        """Return the summary as one indented JSON document."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def generate_rows(spec: SyntheticSpec, start: int, stop: int) -> LogRows:
    """Return rows start to stop of a log as arrays, for whoever wants them without the text.

    Args:
        spec: What to generate.
        start: First row, >= 0.
        stop: Row after the last, start <= stop <= num_samples.

    Returns:
        The very rows that `write_log` writes there.

    Raises:
        ValueError: The range is not inside the log.
    """
    if not 0 <= start <= stop <= spec.num_samples:
        raise ValueError(f"rows {start} to {stop} are not inside a log of {spec.num_samples} rows")
    parts = list(_segments(spec, start, stop)) or [_make_rows(_plan(spec), _words(spec, 0)[:, :0], 0)]
    return LogRows(
        labels=np.concatenate([part.labels for part in parts]),
        integers=np.concatenate([part.integers for part in parts], axis=1),
        ids=np.concatenate([part.ids for part in parts], axis=1),
        levels=np.concatenate([part.levels for part in parts]),
        probabilities=np.concatenate([part.probabilities for part in parts]),
    )


def make_tokens(spec: SyntheticSpec, table: int, ids: np.ndarray) -> np.ndarray:
    """Return the tokens that stand for ids of one table in the text.

    A bijection of 32-bit integers, salted by seed and table: no two ids of a table share a token.

    Args:
        spec: The log the ids are from.
        table: 0 to 25.
        ids: Any shape, >= 0.

    Returns:
        Tokens, the shape of `ids`, uint32; written as 8 lower-case hexadecimal digits.

    Source: the integer hash `lowbias32` by Chris Wellons.
    """
    bits = ids.astype(np.uint32)
    bits ^= _token_salts(spec.seed)[table]
    bits ^= bits >> np.uint32(16)
    bits *= np.uint32(0x7FEB352D)
    bits ^= bits >> np.uint32(15)
    bits *= np.uint32(0x846CA68B)
    bits ^= bits >> np.uint32(16)
    return bits


def write_log(
    spec: SyntheticSpec,
    out_path: Path,
    *,
    progress: Callable[[int], None] | None = None,
    chunk_rows: int = 16 * BLOCK_ROWS,
) -> LogSummary:
    """Write the whole log to one file, in bounded memory.

    Args:
        spec: What to write.
        out_path: The file, replaced if it is there; compressed when it ends in `.gz`. The text is the same
            everywhere, compressed bytes are those of the zlib in use.
        progress: Called after each chunk with the number of rows in it.
        chunk_rows: Rows between two calls of `progress`, >= 1. Does not change the bytes.

    Returns:
        Counts and the teacher's scores.

    Raises:
        ValueError: chunk_rows is out of range.
        OSError: The file cannot be written.
    """
    with _open_text(out_path) as file:
        tally = _Tally(spec)
        _write_rows(spec, 0, spec.num_samples, file, tally, progress, chunk_rows)
    return tally.summary()


class _Tally:
    """Labels counted per split and level, as rows are written in order."""

    def __init__(self, spec: SyntheticSpec) -> None:
        self._teacher = _plan(spec).teacher
        train_end, test_end = chronological_bounds(spec.num_samples)
        self._splits = {
            "train": (0, train_end),
            "test": (train_end, test_end),
            "val": (test_end, spec.num_samples),
        }
        self._counts = np.zeros((len(self._splits), NUM_LEVELS, 2), dtype=np.int64)
        self._num_rows = self._text_bytes = 0

    def add(self, rows: LogRows, text_bytes: int) -> None:
        cells = 2 * rows.levels + rows.labels
        for split, (start, stop) in enumerate(self._splits.values()):
            part = cells[max(0, start - self._num_rows) : max(0, stop - self._num_rows)]
            if len(part):
                self._counts[split] += np.bincount(part, minlength=2 * NUM_LEVELS).reshape(NUM_LEVELS, 2)
        self._num_rows += len(cells)
        self._text_bytes += text_bytes

    def summary(self) -> LogSummary:
        total = self._counts.sum(axis=0)
        overall = self._teacher.score(total[:, 1], total[:, 0])
        return LogSummary(
            num_samples=overall.num_samples,
            positives=overall.positives,
            text_bytes=self._text_bytes,
            teacher_auc=overall.auc,
            teacher_logloss=overall.logloss,
            splits={
                name: self._teacher.score(counts[:, 1], counts[:, 0])
                for name, counts in zip(self._splits, self._counts, strict=True)
            },
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What a spec needs ready before the first row: lookup tables, small whatever the vocabulary."""

    rank_knots: tuple[np.ndarray, ...]
    integer_knots: tuple[np.ndarray, ...]
    missing_below: tuple[int, ...]
    ids_by_day: tuple[np.ndarray | None, ...]
    teacher: Teacher


@lru_cache(maxsize=4)
def _plan(spec: SyntheticSpec) -> _Plan:
    plan = _Plan(
        rank_knots=tuple(
            _rank_knots(size, _TOP_SHARES[table], spec.zipf_exponent + _STEEPER.get(table, 0.0))
            for table, size in enumerate(spec.table_sizes)
        ),
        integer_knots=tuple(_integer_knots(shape) for shape in _INTEGER_SHAPES),
        missing_below=tuple(round(ratio * 65536) for ratio in spec.missing_ratios),
        ids_by_day=tuple(_ids_by_day(spec, table) for table in range(NUM_TABLES)),
        teacher=Teacher(
            seed=spec.seed,
            table_sizes=spec.table_sizes,
            dim=spec.teacher_dim,
            noise_ratio=spec.noise_ratio,
            ctr=spec.ctr,
        ),
    )
    words = np.concatenate([_words(spec, block, stream=1) for block in range(_PILOT_BLOCKS)], axis=1)
    starts = _even_starts(words.shape[1], spec.num_days)
    pilot = [_draw(plan, words[:, start:stop], day) for day, (start, stop) in enumerate(pairwise(starts))]
    integers, ids = (np.concatenate(parts, axis=1) for parts in zip(*pilot, strict=True))
    plan.teacher.calibrate(integers, ids, signal=spec.signal)
    return plan


@lru_cache(maxsize=4)
def _token_salts(seed: int) -> np.ndarray:
    tables = np.arange(NUM_TABLES)
    return hash_integers(seed, _PURPOSE_TOKEN, 0, tables).astype(np.uint32)


def _words(spec: SyntheticSpec, block: int, *, stream: int = 0) -> np.ndarray:
    """Return the random words of a block, shape (_NUM_WORDS, BLOCK_ROWS): per column one run, for speed."""
    source = np.random.PCG64(np.random.SeedSequence([spec.seed, block, stream]))
    return source.random_raw(_NUM_WORDS * BLOCK_ROWS).reshape(_NUM_WORDS, BLOCK_ROWS)


def _draw(plan: _Plan, words: np.ndarray, day: int) -> tuple[np.ndarray, np.ndarray]:
    """Return integers and ids for the words of rows of one day.

    Of a column's word the upper half is where in its distribution the value lies, the next quarter whether
    that is shared with other tables, the last whether the value is missing.
    """
    uniform = (words >> np.uint64(32)).view(np.int64)
    integers = np.empty((NUM_INTEGERS, words.shape[1]), dtype=np.int64)
    for column, knots in enumerate(plan.integer_knots):
        _interpolate(knots, uniform[column], out=integers[column])
    for group, tables in enumerate(_SHARED_TABLES, start=NUM_INTEGERS + NUM_TABLES):
        for column in (NUM_INTEGERS + table for table in tables):
            shared = (words[column] & np.uint64(0xFFFF0000)) < np.uint64(_SHARED_BELOW << 16)
            np.copyto(uniform[column], uniform[group], where=shared)
    ids = np.empty((NUM_TABLES, words.shape[1]), dtype=np.int64)
    for table, (knots, ids_by_day) in enumerate(zip(plan.rank_knots, plan.ids_by_day, strict=True)):
        rank = _interpolate(knots, uniform[NUM_INTEGERS + table], out=ids[table])
        if ids_by_day is not None:
            moved = ids_by_day[day]
            np.copyto(rank, moved.take(rank, mode="clip"), where=rank < len(moved))
    for column, below in enumerate(plan.missing_below):
        if below:
            missing = (words[_MISSING_LEADERS.get(column, column)] & np.uint64(0xFFFF)) < np.uint64(below)
            if column < NUM_INTEGERS:
                np.copyto(integers[column], MISSING_INTEGER, where=missing)
            else:
                np.copyto(ids[column - NUM_INTEGERS], MISSING_ID, where=missing)
    return integers, ids


def _segments(spec: SyntheticSpec, start: int, stop: int) -> Iterator[LogRows]:
    """Yield the rows in runs that lie in one block and one day."""
    plan = _plan(spec)
    day_starts = spec.day_starts()
    block = -1
    while start < stop:
        if block != start // BLOCK_ROWS:
            block = start // BLOCK_ROWS
            words = _words(spec, block)
        day = bisect_right(day_starts, start) - 1
        end = min(stop, day_starts[day + 1], (block + 1) * BLOCK_ROWS)
        yield _make_rows(plan, words[:, start % BLOCK_ROWS : (end - 1) % BLOCK_ROWS + 1], day)
        start = end


def _make_rows(plan: _Plan, words: np.ndarray, day: int) -> LogRows:
    integers, ids = _draw(plan, words, day)
    levels = plan.teacher.levels(integers, ids)
    threshold = plan.teacher.probability_of_level.take(levels)
    labels = (words[-1] >> np.uint64(64 - PROBABILITY_BITS)).astype(np.int64) < threshold
    return LogRows(
        labels=labels.astype(np.uint8),
        integers=integers,
        ids=ids,
        levels=levels,
        probabilities=threshold / (1 << PROBABILITY_BITS),
    )


def _interpolate(knots: np.ndarray, uniform: np.ndarray, *, out: np.ndarray) -> np.ndarray:
    """Return the whole part of a quantile function at 32-bit uniform numbers."""
    knot = uniform >> _FRACTION_BITS
    np.bitwise_and(uniform, (1 << _FRACTION_BITS) - 1, out=out)
    out *= np.diff(knots).take(knot)
    out >>= _FRACTION_BITS
    out += knots.take(knot)
    out >>= _FIXED_BITS
    return out


def _rank_knots(size: int, top_share: float, exponent: float) -> np.ndarray:
    """Return the quantile function of popularity ranks: one favourite, then a Zipf-Mandelbrot law.

    Its offset flattens the head until rank 1 is no more popular than the favourite, rank 0.
    """
    uniform = np.arange((1 << _KNOT_BITS) + 1) / (1 << _KNOT_BITS)
    if size == 1:
        return _fixed(uniform, limit=1)
    offset = 0.0
    while (1 - top_share) * _zipf_share(2.0, size, offset, exponent) > top_share and offset < size:
        offset = 2 * offset + 0.25
    rest = np.maximum(0.0, (uniform - top_share) / (1 - top_share))
    low, high = 1 + offset, size + offset
    if abs(exponent - 1) < 1e-6:
        rank = low * (high / low) ** rest - offset
    else:
        power = 1 - exponent
        rank = (low**power + rest * (high**power - low**power)) ** (1 / power) - offset
    return _fixed(np.where(uniform < top_share, uniform / top_share, rank), limit=size)


def _zipf_share(rank: float, size: int, offset: float, exponent: float) -> float:
    """Return the share of ranks from 1 up to `rank` in the law of `_rank_knots`."""
    power = 1 - exponent
    if abs(power) < 1e-6:
        return math.log((rank + offset) / (1 + offset)) / math.log((size + offset) / (1 + offset))
    low, high = math.pow(1 + offset, power), math.pow(size + offset, power)
    return (math.pow(rank + offset, power) - low) / (high - low)


def _integer_knots(shape: _IntegerShape) -> np.ndarray:
    uniform = np.arange((1 << _KNOT_BITS) + 1) / (1 << _KNOT_BITS)
    normal = NormalDist(math.log(shape.median), shape.sigma)
    below = shape.minus_one + shape.zero
    positive = np.clip((uniform - below) / (1 - below), 1e-6, 1 - 1e-5)
    value = np.exp([normal.inv_cdf(share) for share in positive.tolist()])
    value = np.where(uniform < below, 0.0, np.maximum(value, 1.0))
    value[uniform < shape.minus_one] = -1.0
    return _fixed(value, limit=shape.largest + 1)


def _fixed(values: np.ndarray, limit: int) -> np.ndarray:
    """Return fixed-point numbers below limit; 16 significant bits, to be the same on every platform."""
    mantissa, exponent = np.frexp(values)
    rounded = np.ldexp(np.rint(np.ldexp(mantissa, 16)), exponent - 16)
    fixed = np.rint(np.ldexp(rounded, _FIXED_BITS)).astype(np.int64)
    below: np.ndarray = np.minimum(fixed, (limit << _FIXED_BITS) - 1)
    return below


def _ids_by_day(spec: SyntheticSpec, table: int) -> np.ndarray | None:
    """Return the ids of the first popularity ranks on each day, shape (num_days, ranks); None if steady.

    Overnight some ranks are picked and their ids change places: each moves as if it had become up to eight
    times less popular, or moves up as others fall. Rank 0, the usual value of a field, stays.
    """
    size = spec.table_sizes[table]
    if size < _STEADY_TABLE_SIZE or not spec.drift_ratio:
        return None
    ranks = np.arange(min(size, HEAD_IDS))
    ids = np.empty((spec.num_days, len(ranks)), dtype=np.int64)
    ids[0] = ranks
    for day in range(1, spec.num_days):
        bits = hash_integers(spec.seed, _PURPOSE_DRIFT + 2 * day, table, ranks)
        chance = (bits >> np.uint64(32)).astype(np.int64)
        picked = ranks[(chance < round(spec.drift_ratio * 2**32)) & (ranks > 0)]
        fall = 64 + (bits & np.uint64(0xFFFF)).astype(np.int64)[picked] * 448 // 65536
        order = np.argsort(picked * fall, kind="stable")
        ids[day] = ids[day - 1]
        ids[day, picked] = ids[day - 1, picked[order]]
    return ids


def _even_starts(total: int, parts: int) -> tuple[int, ...]:
    """Cut a total into parts that differ by at most one, larger ones first."""
    size, extra = divmod(total, parts)
    return tuple(part * size + min(part, extra) for part in range(parts + 1))


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, expected {low} to {high}")


@contextmanager
def _open_text(path: Path) -> Iterator[IO[bytes]]:
    with path.open("wb") as file:
        if path.suffix != ".gz":
            yield file
            return
        # Without name and time the header does not betray where and when.
        with gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as packed:
            yield cast(IO[bytes], packed)


def _write_rows(
    spec: SyntheticSpec,
    start: int,
    stop: int,
    file: IO[bytes],
    tally: _Tally,
    progress: Callable[[int], None] | None,
    chunk_rows: int,
) -> None:
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}, expected at least 1")
    for first in range(start, stop, chunk_rows):
        end = min(first + chunk_rows, stop)
        for rows in _segments(spec, first, end):
            text = _format(spec, rows)
            file.write(text)
            tally.add(rows, len(text))
        if progress is not None:
            progress(end - first)


# One line at its widest: fields hold ASCII or zero bytes, and the zero bytes are taken out at the end.
_FIELDS = {"label": "u1"}
for _column, _shape in enumerate(_INTEGER_SHAPES):
    _FIELDS[f"int_{_column}"] = "<u8"  # a tab and four digits
    if _shape.largest > 9999:
        _FIELDS[f"int_{_column}_low"] = "<u4"  # four more
for _table in range(NUM_TABLES):
    _FIELDS |= {f"tab_{_table}": "u1", f"cat_{_table}": "<u8"}
_LINE = np.dtype([*_FIELDS.items(), ("end", "u1")])


@lru_cache(maxsize=1)
def _numbers() -> tuple[np.ndarray, np.ndarray]:
    """Return ASCII of small numbers, as little-endian words.

    First a tab and then nothing, -1, or 0 to 9999: -2 to 9999 after adding 2. Then 0 to 9999 as four digits.
    """
    plain = [b"", b"-1", *(b"%d" % value for value in range(10_000))]
    padded = [b"%04d" % value for value in range(10_000)]
    return _as_words([b"\t" + number for number in plain]), _as_words(padded)


def _as_words(texts: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(text.ljust(8, b"\0") for text in texts), dtype="<i8").astype(np.int64)


def _as_hexadecimal(tokens: np.ndarray) -> np.ndarray:
    """Return 8 ASCII digits per token as little-endian words.

    All digits of a token at once: halves, then bytes, then nibbles swap places and move apart.
    """
    text = tokens.astype(np.uint64)
    for bits, mask in ((16, 0xFFFF), (8, 0xFF_0000_00FF), (4, 0xF_000F_000F_000F)):
        low = text & np.uint64(mask)
        low <<= np.uint64(2 * bits)
        text >>= np.uint64(bits)
        text &= np.uint64(mask)
        text |= low
    letters = text + np.uint64(0x0606060606060606)
    letters >>= np.uint64(4)
    letters &= np.uint64(0x0101010101010101)
    letters *= np.uint64(ord("a") - ord("0") - 10)
    text += letters
    text += np.uint64(0x3030303030303030)
    return text


def _format(spec: SyntheticSpec, rows: LogRows) -> bytes:
    plain, padded = _numbers()
    template = np.zeros(1, dtype=_LINE)
    template["end"] = ord("\n")
    for table in range(NUM_TABLES):
        template[f"tab_{table}"] = ord("\t")
    lines = np.frombuffer(bytearray(template.tobytes() * len(rows.labels)), dtype=_LINE)
    lines["label"] = rows.labels + ord("0")
    for column, values in enumerate(rows.integers):
        text = plain.take(values + 2, mode="clip")
        if f"int_{column}_low" in _FIELDS:
            large = np.flatnonzero(values > 9999)
            upper, lower = np.divmod(values[large], 10_000)
            text[large] = plain[upper + 2]
            lines[f"int_{column}_low"][large] = padded[lower]
        lines[f"int_{column}"] = text
    for table, ids in enumerate(rows.ids):
        token = _as_hexadecimal(make_tokens(spec, table, ids))
        np.copyto(token, 0, where=ids < 0)
        lines[f"cat_{table}"] = token
    return lines.tobytes().translate(None, b"\0")


def build(options: SourceOptions) -> Source:
    """Make the reader of what this module writes, which is Criteo's format."""
    from slipstream.datasets import criteo

    return criteo.build(options)
