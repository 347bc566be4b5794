"""Profile: how often is each row looked up, and what would a budget buy?

Reads   preprocess/   train and val parts
Writes  profile/      counts.parquet (table, row, count), curve.parquet (policy, split, budget -> Λ, hits, hot samples)
Keeps   the sum of counts = lookups read; sample_ratio = 1 is exact; padding is no lookup
Costs   one pass over the training rows for the counts, and one for each budget and round of the curve, over at
        most CURVE_SAMPLES samples; memory for a few parts, for these samples, and up to 60 bytes per row
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from slipstream.config import ProfileConfig
from slipstream.engine.choice import open_engine
from slipstream.io.artifacts import Artifact, write_atomically
from slipstream.io.capacity import require_disk, require_memory
from slipstream.io.counts import write_counts
from slipstream.io.figures import CurveFigures, PreprocessFigures, ProfileFigures
from slipstream.io.processors import usable_cores
from slipstream.io.samples import column_offsets, count_samples, read_rows
from slipstream.ops.counting import count_accesses, sample_positions
from slipstream.ops.hot_set import choose_hot_rows, measure_hot_set, table_offsets
from slipstream.ops.npz import read_arrays
from slipstream.ops.parallel import Engine, Threads
from slipstream.progress import Progress
from slipstream.schema import table_name
from slipstream.stage import StageJob

CURVE_SAMPLES = 500_000
"""Training samples the curve is measured on, at most, and validation samples likewise."""

_BLOCK_SAMPLES = 65_536
"""Samples of the curve looked at together."""
_MOST_WORKERS = 4
_WORKER_BYTES, _WORKER_BYTES_PER_ROW = 32 << 20, 48
"""Memory that one budget of the curve takes while it is measured; for as many at once as fit _CURVE_BYTES."""
_CURVE_BYTES = 1 << 30
_BASE_BYTES, _COUNT_BYTES = 128 << 20, 8
_DISK_BYTES_PER_ROW = 14
"""Of counts.parquet, as if nothing could be compressed."""

_READERS = 1
"""Threads of this process that read parts, while the one before is counted."""
_PARTS_PER_GROUP = 16
"""Parts that a worker on another machine counts before it writes down what it found."""


def run_stage(job: StageJob) -> ProfileFigures:
    """Run as a stage of a pipeline."""
    job = job.absolute()
    with open_engine(job.config.engine, job.scratch, job.claim, job.progress) as (engine, progress):
        return run(
            job.config.profile,
            processed=job.inputs["preprocess"],
            sample_aware_power=job.config.segregate.sample_aware_power,
            sample_aware_rounds=job.config.segregate.sample_aware_rounds,
            seed=job.config.seed,
            scratch=job.scratch,
            progress=progress,
            engine=engine,
        )


def run(
    config: ProfileConfig,
    *,
    processed: Artifact,
    sample_aware_power: float,
    sample_aware_rounds: int,
    seed: int,
    scratch: Path,
    progress: Progress,
    engine: Engine | None = None,
) -> ProfileFigures:
    """Count accesses of the training split and measure the hot-set curve.

    Returns:
        Samples and lookups counted, rows, and the curve.

    Raises:
        CapacityError: Memory or disk would not do.
    """
    engine = engine or Threads()
    encoded = PreprocessFigures.of(processed)
    _check_capacity(encoded, scratch)
    offsets = table_offsets(list(encoded.rows_per_table.values()))
    padding_rows = encoded.global_padding_rows()
    reading = _Reading(
        processed=processed,
        columns=[table_name(index) for index in range(len(encoded.column_tables))],
        starts=column_offsets(offsets, encoded.column_tables),
        sample_ratio=config.sample_ratio,
        seed=seed,
        folder=scratch / "work" / "counted",
    )
    counted = _count(reading, progress, engine)
    counts = counted.counts
    counts[padding_rows] = 0
    write_counts(scratch / "counts.parquet", counts, encoded.rows_per_table)
    curve = _Curve(
        counts=counts,
        train=counted.train,
        val=counted.val,
        padding_rows=padding_rows,
        always_hot=np.concatenate([offsets[:-1], padding_rows]),
        power=sample_aware_power,
        rounds=sample_aware_rounds,
    )
    if not engine.shares_memory:
        curve = curve.put_down(scratch / "work" / "curve")
    points = _measure_curve(curve, config.curve, _affordable_workers(len(counts)), progress, engine)
    with write_atomically(scratch / "curve.parquet") as path:
        frame = pl.DataFrame([asdict(point) for point in points])
        frame.select("policy", "split", pl.exclude("policy", "split")).write_parquet(path)
    lookups = int(counts.sum())
    return ProfileFigures(samples_counted=counted.num_counted, lookups=lookups, rows=int(offsets[-1]), curve=points)


def _check_capacity(encoded: PreprocessFigures, scratch: Path) -> None:
    num_rows = sum(encoded.rows_per_table.values())
    id_bytes = len(encoded.column_tables) * (4 if num_rows < 2**31 else 8)
    # samples of the curve stand twice in memory while they are put together
    num_kept = sum(min(encoded.samples[name], CURVE_SAMPLES) for name in ("train", "val"))
    workers = _affordable_workers(num_rows)
    require_memory(
        _BASE_BYTES
        + num_rows * _COUNT_BYTES
        + max(2 * num_kept * id_bytes, num_kept * id_bytes + workers * _worker_bytes(num_rows)),
        purpose="profile",
        hint="make the vocabulary smaller: raise `preprocess.freq_threshold`, or set `preprocess.max_rows`",
    )
    require_disk(
        scratch,
        num_rows * _DISK_BYTES_PER_ROW,
        purpose="profile",
        hint="free some disk, or choose a folder on a larger one with --runs",
    )


# --- counts --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reading:
    """What it takes to read parts."""

    processed: Artifact
    columns: list[str]
    starts: np.ndarray
    """What to add to the rows of each column, and V at the end."""
    sample_ratio: float
    seed: int
    folder: Path
    """Where workers on other machines write down what they found."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """One part to read."""

    path: Path
    first: int
    """Samples of the split before it."""
    stride: int
    """The curve is measured on every how manieth sample."""
    is_counted: bool
    """Whether it is of the training split."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Counted:
    """What was found in all parts."""

    counts: np.ndarray
    """Accesses per global row. Shape (V,), int64."""
    num_counted: int
    train: np.ndarray
    """Global rows of the samples that the curve is measured on. Shape (n, columns)."""
    val: np.ndarray
    """The same, of validation."""


def _count(reading: _Reading, progress: Progress, engine: Engine) -> _Counted:
    parts = [part for split in ("train", "val") for part in _list_parts(reading.processed, split)]
    kept: dict[bool, list[np.ndarray]] = {True: [], False: []}
    num_rows, num_counted = int(reading.starts[-1]), 0
    with progress.task("count accesses", len(parts), "parts") as advance:
        if engine.shares_memory:

            def blocks() -> Iterator[np.ndarray]:
                nonlocal num_counted
                read = engine.in_order(_read_part, parts, context=reading, workers=_READERS)
                for part, (rows, of_curve) in zip(parts, read, strict=True):
                    kept[part.is_counted].append(of_curve)
                    num_counted += len(rows)
                    yield rows
                    advance(1, "")

            counts = count_accesses(blocks(), num_rows=num_rows)
        else:
            counts = np.zeros(num_rows, np.int64)
            groups = list(enumerate(_group(parts)))
            found = engine.in_order(_count_group, groups, context=reading, workers=_READERS)
            for (_, group), path in zip(groups, found, strict=True):
                with path.open("rb") as stream:
                    rows, uses, counted, of_curve = read_arrays(stream, ("rows", "uses", "num_counted", "of_curve"))
                counts[rows] += uses
                num_counted += int(counted)
                kept[group[0].is_counted].append(of_curve)
                advance(len(group), "")
    train, val = (np.concatenate(kept.pop(is_counted)) for is_counted in (True, False))
    return _Counted(counts=counts, num_counted=num_counted, train=train, val=val)


def _list_parts(processed: Artifact, split: str) -> list[_Part]:
    """Parts of a split; of their samples the curve takes CURVE_SAMPLES at most, and one a part."""
    paths = processed.files(f"{split}/", ".parquet")
    sizes = [count_samples(path) for path in paths]
    stride = max(1, -(-sum(sizes) // CURVE_SAMPLES))
    firsts = itertools.accumulate(sizes, initial=0)
    return [
        _Part(path=path, first=first, stride=stride, is_counted=split == "train")
        for path, first in zip(paths, firsts, strict=False)
    ]


def _group(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    """Neighbours of one split, _PARTS_PER_GROUP at most."""
    for _, of_split in itertools.groupby(parts, key=lambda part: part.is_counted):
        rest = list(of_split)
        for start in range(0, len(rest), _PARTS_PER_GROUP):
            yield rest[start : start + _PARTS_PER_GROUP]


def _read_part(reading: _Reading, part: _Part) -> tuple[np.ndarray, np.ndarray]:
    """Give global rows of the samples that are counted, and of those that the curve is measured on."""
    rows = read_rows(reading.processed.check(part.path), reading.columns, reading.starts)
    of_curve = rows[:: part.stride].copy()
    if not part.is_counted:
        rows = rows[:0]
    elif reading.sample_ratio < 1:
        rows = rows[sample_positions(part.first, part.first + len(rows), ratio=reading.sample_ratio, seed=reading.seed)]
    return rows, of_curve


def _count_group(reading: _Reading, task: tuple[int, Sequence[_Part]]) -> Path:
    """Count the accesses of some parts on another machine; returns the file that says them."""
    number, parts = task
    path = reading.folder / f"group-{number:05d}.npz"
    if path.exists():
        return path
    kept, num_counted = [], 0

    def blocks() -> Iterator[np.ndarray]:
        nonlocal num_counted
        for part in parts:
            rows, of_curve = _read_part(reading, part)
            kept.append(of_curve)
            num_counted += len(rows)
            yield rows

    counts = count_accesses(blocks(), num_rows=int(reading.starts[-1]))
    rows = np.flatnonzero(counts)
    with write_atomically(path) as partial, partial.open("wb") as stream:
        np.savez(stream, rows=rows, uses=counts[rows], num_counted=num_counted, of_curve=np.concatenate(kept))
    return path


# --- the curve -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Curve:
    """What it takes to measure a budget; arrays, or files that hold them."""

    counts: np.ndarray | Path
    train: np.ndarray | Path
    val: np.ndarray | Path
    padding_rows: np.ndarray
    always_hot: np.ndarray
    power: float
    rounds: int

    def put_down(self, folder: Path) -> _Curve:
        """Write what is large to files, which workers on other machines map."""

        def put(name: str, array: np.ndarray | Path) -> Path:
            with write_atomically(folder / f"{name}.npy") as partial, partial.open("wb") as stream:
                np.save(stream, array)  # type: ignore[arg-type]
            return folder / f"{name}.npy"

        return replace(
            self, counts=put("counts", self.counts), train=put("train", self.train), val=put("val", self.val)
        )


def _measure_curve(
    curve: _Curve, shares: Sequence[float], workers: int, progress: Progress, engine: Engine
) -> list[CurveFigures]:
    choices = list(itertools.product(shares, ("frequency", "sample-aware")))
    points: list[CurveFigures] = []
    with progress.task("hot-set curve", len(choices), "budgets") as advance:
        for found in engine.in_order(_measure, choices, context=curve, workers=workers):
            points += found
            advance(1, f"{found[0].row_share:.1%} {found[0].policy}")
    return points


def _measure(curve: _Curve, choice: tuple[float, str]) -> list[CurveFigures]:
    """Measure a budget and a policy on training and validation samples."""
    share, policy = choice
    counts = _open(curve.counts)
    samples = {"train": _open(curve.train), "val": _open(curve.val)}
    hot_set = choose_hot_rows(
        policy,
        counts,
        curve.always_hot,
        lambda: _in_blocks(samples["train"]),
        num_rows=max(int(len(counts) * share), len(curve.always_hot)),
        power=curve.power,
        rounds=curve.rounds,
    )
    points = {
        split: measure_hot_set(hot_set, _in_blocks(rows), row_share=share, padding_rows=curve.padding_rows)
        for split, rows in samples.items()
    }
    return [CurveFigures(policy=policy, split=split, **asdict(point)) for split, point in points.items()]


def _open(array: np.ndarray | Path) -> np.ndarray:
    return np.load(array, mmap_mode="r", allow_pickle=False) if isinstance(array, Path) else array


def _in_blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[start : start + _BLOCK_SAMPLES] for start in range(0, len(rows), _BLOCK_SAMPLES))


def _affordable_workers(num_rows: int) -> int:
    return max(1, min(usable_cores(), _MOST_WORKERS, _CURVE_BYTES // _worker_bytes(num_rows)))


def _worker_bytes(num_rows: int) -> int:
    return _WORKER_BYTES + _WORKER_BYTES_PER_ROW * num_rows
