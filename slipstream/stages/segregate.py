"""Segregate: choose the hot rows, and split samples by them.

Reads   preprocess/   all parts; profile/ counts.parquet
Writes  segregate/    hot_set.parquet (table, row, slot, count), slots.npz (one slot map per table),
                      {hot,cold,val,test}/part-*.npz (X_int, X_cat as slots, y)
Keeps   the multiset of samples; no cold lookup in a hot shard; hot bytes <= budget
Costs   one pass over the parts, and one a round for `sample-aware`; memory for a few parts and 12 bytes per row

The choice, each finished shard and what each part gave are kept, so a killed run goes on at the first part that a
missing shard needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from slipstream.config import SegregateConfig
from slipstream.engine.choice import open_engine
from slipstream.io.artifacts import Artifact, write_atomically
from slipstream.io.capacity import require_disk, require_memory, written_bytes
from slipstream.io.counts import read_counts
from slipstream.io.figures import PreprocessFigures, SegregateFigures
from slipstream.io.samples import column_offsets, read_rows
from slipstream.io.shards import ShardColumns, Sharding, write_shards, write_shards_apart
from slipstream.ops.hot_set import HotSet, assign_slots, choose_hot_rows, table_offsets, take_above_threshold
from slipstream.ops.parallel import Engine, Threads
from slipstream.options import parse_budget
from slipstream.progress import Progress
from slipstream.schema import dense_name, table_name
from slipstream.stage import StageJob, affordable_rows, row_bytes_of

_WORKERS = 2
_BASE_BYTES, _MEMORY_BYTES_PER_ROW = 128 << 20, 60
_PARTS_IN_MEMORY = 3 * _WORKERS
"""Read, turned into samples, and cut into shards."""
_HOT_SET_BYTES_PER_ROW = 18


def run_stage(job: StageJob) -> SegregateFigures:
    """Run as a stage of a pipeline."""
    job = job.absolute()
    with open_engine(job.config.engine, job.scratch, job.claim, job.progress) as (engine, progress):
        return run(
            job.config.segregate,
            processed=job.inputs["preprocess"],
            counts=read_counts(job.inputs["profile"]),
            row_bytes=row_bytes_of(job.config),
            scratch=job.scratch,
            progress=progress,
            engine=engine,
        )


def run(
    config: SegregateConfig,
    *,
    processed: Artifact,
    counts: np.ndarray,
    row_bytes: int,
    scratch: Path,
    progress: Progress,
    engine: Engine | None = None,
) -> SegregateFigures:
    """Choose the hot set under the budget and write shards.

    Args:
        config: Section `segregate`.
        processed: The preprocess artifact.
        counts: Access counts per global row. Shape (V,), int64.
        row_bytes: Accelerator bytes of one hot row, all included.
        scratch: Folder to write to.
        progress: Told how far it is.
        engine: Who reads parts and writes shards; None for threads of this process.

    Returns:
        Samples of each group, hot rows, Λ, and what the hot set catches.

    Raises:
        CapacityError: The budget is below the OOV rows, or memory or disk would not do.
    """
    engine = engine or Threads()
    encoded = PreprocessFigures.of(processed)
    names = [table_name(index) for index in range(len(encoded.column_tables))]
    _check_capacity(config, processed, encoded, num_rows=len(counts), scratch=scratch)
    offsets = table_offsets(list(encoded.rows_per_table.values()))
    kept = scratch / "work" / "hot_set.npz"
    hot_set = _load_choice(kept, len(counts))
    if hot_set is None:
        hot_set = _choose(config, processed, counts, names, offsets, engine, row_bytes=row_bytes, scratch=scratch)
        _keep_choice(kept, hot_set)
    slots = assign_slots(hot_set.is_hot)
    _write_hot_set(scratch, hot_set, slots, counts, list(encoded.rows_per_table), offsets)
    dense = [dense_name(index) for index in range(encoded.num_dense)]
    sharding = Sharding(
        processed=processed,
        columns=ShardColumns.of(encoded, dense, names, slots, offsets),
        num_hot=hot_set.num_hot,
        samples_per_shard=config.samples_per_shard,
        scratch=scratch,
    )
    num_samples = sum(encoded.samples.values())
    with progress.task("write shards", num_samples, "samples") as advance:
        if engine.shares_memory:
            written, hits, lookups = write_shards(sharding, engine, advance)
        else:
            written, hits, lookups = write_shards_apart(sharding.put_down(), engine, advance)
    num_train = written["hot"] + written["cold"]
    return SegregateFigures(
        samples=written,
        hot_rows=hot_set.num_hot,
        rows=len(counts),
        access_threshold=hot_set.access_threshold,
        hit_ratio=hits / lookups if lookups else 0.0,
        hot_sample_share=written["hot"] / num_train,
        num_dense=len(dense),
        rows_per_table=encoded.rows_per_table,
        table_of_column=encoded.table_of_column,
        padding_rows=encoded.padding_rows,
        bags=encoded.bags,
        warnings=_doubt_budget(config, len(counts), row_bytes),
    )


def _check_capacity(
    config: SegregateConfig, processed: Artifact, encoded: PreprocessFigures, *, num_rows: int, scratch: Path
) -> None:
    slot_bytes = 4 if num_rows < 2**31 else 8
    id_bytes = slot_bytes * len(encoded.column_tables)
    sample_bytes = id_bytes + 4 * (encoded.num_dense + 1)
    largest_part = min(max(encoded.samples.values()), processed.manifest["config"]["samples_per_part"])
    require_memory(
        _BASE_BYTES + num_rows * _MEMORY_BYTES_PER_ROW + _PARTS_IN_MEMORY * largest_part * sample_bytes,
        purpose="segregate",
        hint="make the vocabulary smaller: raise `preprocess.freq_threshold`, or set `preprocess.max_rows`",
    )
    # training rows stand decoded beside the shards until the hot set is chosen
    decoded = encoded.samples["train"] * id_bytes if config.policy == "sample-aware" else 0
    require_disk(
        scratch,
        sum(encoded.samples.values()) * sample_bytes
        + decoded
        + num_rows * (slot_bytes + _HOT_SET_BYTES_PER_ROW)
        - written_bytes(scratch),
        purpose="segregate",
        hint="free some disk, or choose a folder on a larger one with --runs",
    )


def _choose(
    config: SegregateConfig,
    processed: Artifact,
    counts: np.ndarray,
    columns: list[str],
    offsets: np.ndarray,
    engine: Engine,
    *,
    row_bytes: int,
    scratch: Path,
) -> HotSet:
    encoded = PreprocessFigures.of(processed)
    always_hot = np.concatenate([offsets[:-1], encoded.global_padding_rows()])
    if config.access_threshold:
        return take_above_threshold(counts, always_hot, access_threshold=config.access_threshold)
    num_padding = len(always_hot) - len(offsets) + 1
    num_rows = affordable_rows(config.hot_budget, len(counts), len(offsets) - 1, row_bytes, num_padding=num_padding)
    decoding = _Decoding(processed, columns, column_offsets(offsets, encoded.column_tables), scratch / "work" / "rows")
    parts = processed.files("train/", ".parquet")

    def samples() -> Iterator[np.ndarray]:
        for path in engine.in_order(_hold_rows, parts, context=decoding, workers=_WORKERS):
            yield np.load(path, mmap_mode="r", allow_pickle=False)

    return choose_hot_rows(
        config.policy,
        counts,
        always_hot,
        samples,
        num_rows=num_rows,
        power=config.sample_aware_power,
        rounds=config.sample_aware_rounds,
    )


def _keep_choice(path: Path, hot_set: HotSet) -> None:
    with write_atomically(path) as partial, partial.open("wb") as stream:
        np.savez(stream, is_hot=np.packbits(hot_set.is_hot), access_threshold=hot_set.access_threshold)


def _load_choice(path: Path, num_rows: int) -> HotSet | None:
    if not path.exists():
        return None
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        is_hot = np.unpackbits(arrays["is_hot"], count=num_rows).astype(bool)
        return HotSet(is_hot=is_hot, access_threshold=int(arrays["access_threshold"]))


def _doubt_budget(config: SegregateConfig, num_rows: int, row_bytes: int) -> list[str]:
    total = num_rows * row_bytes
    if config.access_threshold or parse_budget(config.hot_budget, total_bytes=total) <= total:
        return []
    return [
        f"every row is hot: `segregate.hot_budget` = {config.hot_budget} is more than the {total:,} bytes that all "
        f"{num_rows:,} rows take, so nothing is left for the cold tier to do"
    ]


@dataclass(frozen=True, slots=True)
class _Decoding:
    """What it takes to decode rows."""

    processed: Artifact
    columns: list[str]
    starts: np.ndarray
    folder: Path


def _hold_rows(decoding: _Decoding, part: Path) -> Path:
    """Decode the rows of a training part, where that is not done yet; the rounds read them as mapped arrays."""
    path = decoding.folder / f"{part.stem}.npy"
    if not path.exists():
        with write_atomically(path) as partial, partial.open("wb") as stream:
            np.save(stream, read_rows(decoding.processed.check(part), decoding.columns, decoding.starts))
    return path


def _write_hot_set(
    scratch: Path,
    hot_set: HotSet,
    slots: np.ndarray,
    counts: np.ndarray,
    tables: list[str],
    offsets: np.ndarray,
) -> None:
    hot = np.flatnonzero(hot_set.is_hot)
    table_index = np.searchsorted(offsets, hot, side="right") - 1
    frame = pl.DataFrame(
        {
            "table": table_index.astype(np.int16),
            "row": (hot - offsets[table_index]).astype(np.int32),
            "slot": slots[hot],
            "count": counts[hot],
        }
    )
    with write_atomically(scratch / "hot_set.parquet") as path:
        frame.write_parquet(path, compression="zstd", compression_level=1, statistics=False)
    maps = {name: slots[offsets[index] : offsets[index + 1]] for index, name in enumerate(tables)}
    with write_atomically(scratch / "slots.npz") as path, path.open("wb") as stream:
        np.savez(stream, **maps)  # type: ignore[arg-type]
