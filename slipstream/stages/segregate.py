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

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from slipstream.config import SegregateConfig
from slipstream.io.artifacts import Artifact, write_atomically, write_json
from slipstream.io.capacity import require_disk
from slipstream.io.counts import read_counts
from slipstream.io.figures import PreprocessFigures, SegregateFigures
from slipstream.io.samples import Samples, column_offsets, concat_samples, read_part, read_rows, write_shard
from slipstream.ops.hot_set import HotSet, assign_slots, choose_hot_rows, table_offsets, take_above_threshold
from slipstream.ops.parallel import in_order
from slipstream.options import parse_budget
from slipstream.progress import Progress
from slipstream.schema import SHARD_GROUPS, dense_name, table_name
from slipstream.stage import StageJob, affordable_rows, row_bytes_of

_WORKERS = 2


def run_stage(job: StageJob) -> SegregateFigures:
    """Run as a stage of a pipeline."""
    return run(
        job.config.segregate,
        processed=job.inputs["preprocess"],
        counts=read_counts(job.inputs["profile"]),
        row_bytes=row_bytes_of(job.config),
        scratch=job.scratch,
        progress=job.progress,
    )


def run(
    config: SegregateConfig,
    *,
    processed: Artifact,
    counts: np.ndarray,
    row_bytes: int,
    scratch: Path,
    progress: Progress,
) -> SegregateFigures:
    """Choose the hot set under the budget and write shards.

    Args:
        config: Section `segregate`.
        processed: The preprocess artifact.
        counts: Access counts per global row. Shape (V,), int64.
        row_bytes: Accelerator bytes of one hot row, all included.
        scratch: Folder to write to.
        progress: Told how far it is.

    Returns:
        Samples of each group, hot rows, Λ, and what the hot set catches.

    Raises:
        CapacityError: The budget is below the OOV rows, or the disk has no room for the shards.
    """
    encoded = PreprocessFigures.of(processed)
    names = [table_name(index) for index in range(len(encoded.column_tables))]
    _check_disk(encoded, num_rows=len(counts), scratch=scratch)
    offsets = table_offsets(list(encoded.rows_per_table.values()))
    kept = scratch / "work" / "hot_set.npz"
    hot_set = _load_choice(kept, len(counts))
    if hot_set is None:
        hot_set = _choose(config, processed, counts, names, offsets, row_bytes=row_bytes, scratch=scratch)
        _keep_choice(kept, hot_set)
    slots = assign_slots(hot_set.is_hot)
    _write_hot_set(scratch, hot_set, slots, counts, list(encoded.rows_per_table), offsets)
    dense = [dense_name(index) for index in range(encoded.num_dense)]
    slot_maps = [slots[start:stop] for start, stop in pairwise(offsets)]
    padding = dict(enumerate((encoded.padding_rows or {}).get(name) for name in encoded.rows_per_table))
    columns = _Columns(
        dense,
        names,
        [slot_maps[table] for table in encoded.column_tables],
        [None if padding[table] is None else int(slot_maps[table][padding[table]]) for table in encoded.column_tables],
    )
    written, hits, lookups = _write_shards(
        config, processed, columns, hot_set.num_hot, scratch=scratch, progress=progress
    )
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


def _check_disk(encoded: PreprocessFigures, *, num_rows: int, scratch: Path) -> None:
    slot_bytes = 4 if num_rows < 2**31 else 8
    sample_bytes = slot_bytes * len(encoded.column_tables) + 4 * (encoded.num_dense + 1)
    written = sum(file.stat().st_size for file in scratch.rglob("*") if file.is_file())
    require_disk(
        scratch,
        sum(encoded.samples.values()) * sample_bytes + num_rows * slot_bytes - written,
        purpose="segregate",
        hint="free some disk, or choose a folder on a larger one with --runs",
    )


def _choose(
    config: SegregateConfig,
    processed: Artifact,
    counts: np.ndarray,
    columns: list[str],
    offsets: np.ndarray,
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
    starts = column_offsets(offsets, encoded.column_tables)

    def samples() -> Iterator[np.ndarray]:
        for path in _hold_rows(processed, columns, starts, scratch / "work" / "rows"):
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


def _hold_rows(processed: Artifact, columns: list[str], starts: np.ndarray, folder: Path) -> list[Path]:
    """Decode the training rows, where that is not done yet; the rounds read them as mapped arrays."""
    decoded = []
    for part in processed.files("train/", ".parquet"):
        path = folder / f"{part.stem}.npy"
        if not path.exists():
            with write_atomically(path) as partial, partial.open("wb") as stream:
                np.save(stream, read_rows(processed.check(part), columns, starts))
        decoded.append(path)
    return decoded


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


@dataclass(frozen=True, slots=True)
class _Columns:
    """Which columns of a part become which arrays of a shard."""

    dense: list[str]
    tables: list[str]
    slot_maps: list[np.ndarray]
    padding_slots: list[int | None]
    """Of each sparse column; None where it has no padding."""

    def read(self, part: Path) -> Samples:
        """Give samples of a part, `X_cat` as slots."""
        return read_part(part, self.dense, self.tables, self.slot_maps)

    def count_padding(self, samples: Samples) -> int:
        """Count what stands in samples for no value."""
        padded = [(at, slot) for at, slot in enumerate(self.padding_slots) if slot is not None]
        return sum(int(np.count_nonzero(samples.X_cat[:, at] == slot)) for at, slot in padded)


def _write_shards(
    config: SegregateConfig,
    processed: Artifact,
    columns: _Columns,
    num_hot: int,
    *,
    scratch: Path,
    progress: Progress,
) -> tuple[dict[str, int], int, int]:
    """Write all shards; returns samples per group, training lookups that find a hot row, and all training lookups."""
    written: dict[str, int] = {}
    hits = lookups = 0
    with progress.task("write shards", sum(PreprocessFigures.of(processed).samples.values()), "samples") as advance:
        for split in ("train", "val", "test"):
            groups = ("hot", "cold") if split == "train" else (split,)
            writers = [_ShardWriter(scratch / group, config.samples_per_shard) for group in groups]
            parts = processed.files(f"{split}/", ".parquet")
            tallies = [_tally_path(scratch, part) for part in parts]
            num_done = 0
            while num_done < len(parts) and (tally := _finished_tally(tallies[num_done], writers)) is not None:
                hits, lookups = hits + tally["hits"], lookups + tally["lookups"]
                num_done += 1
                advance(sum(tally["samples"]), "")
            loaded = in_order(lambda part: columns.read(processed.check(part)), parts[num_done:], _WORKERS)
            for samples, path in zip(loaded, tallies[num_done:], strict=True):
                found = samples.X_cat < num_hot
                is_hot = np.asarray(found.all(axis=1))
                pieces = [samples.take(is_hot), samples.take(~is_hot)] if split == "train" else [samples]
                for writer, piece in zip(writers, pieces, strict=True):
                    writer.add(piece)
                found_here = asked_here = 0
                if split == "train":
                    num_padding = columns.count_padding(samples)
                    found_here, asked_here = int(np.count_nonzero(found)) - num_padding, found.size - num_padding
                tally = {"samples": [len(piece) for piece in pieces], "hits": found_here, "lookups": asked_here}
                write_json(path, tally)
                hits, lookups = hits + found_here, lookups + asked_here
                advance(len(samples), "")
            written |= {group: writer.close() for group, writer in zip(groups, writers, strict=True)}
    return {group: written[group] for group in SHARD_GROUPS}, hits, lookups


def _tally_path(scratch: Path, part: Path) -> Path:
    return scratch / "work" / "tallies" / f"{part.parent.name}-{part.stem}.json"


def _finished_tally(path: Path, writers: Sequence[_ShardWriter]) -> dict[str, Any] | None:
    """Say what a part gave, when every shard with its samples is there; the writers then stand behind it."""
    if not path.exists():
        return None
    tally: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    pairs = list(zip(writers, tally["samples"], strict=True))
    if not all(writer.has_next(count) for writer, count in pairs):
        return None
    for writer, count in pairs:
        writer.skip(count)
    return tally


class _ShardWriter:
    """Cuts a stream of samples into shards of one size; a shard that is there already is not written again."""

    def __init__(self, folder: Path, samples_per_shard: int) -> None:
        self._folder, self._size = folder, samples_per_shard
        self._pieces: list[Samples] = []
        self._position = 0

    def add(self, samples: Samples) -> None:
        """Append samples."""
        start = 0
        while start < len(samples):
            stop = min(start + self._size - self._position % self._size, len(samples))
            if not self._shard(self._position).exists():
                self._pieces.append(samples.take(slice(start, stop)))
            self._position += stop - start
            start = stop
            if self._position % self._size == 0:
                self._flush(self._position - 1)

    def has_next(self, count: int) -> bool:
        """Whether every shard that the next `count` samples fall into is there."""
        ends = (*range(self._position, self._position + count, self._size), self._position + count - 1)
        return count == 0 or all(self._shard(position).exists() for position in ends)

    def skip(self, count: int) -> None:
        """Pass over samples whose shards are all there."""
        self._position += count

    def close(self) -> int:
        """Write what is left; returns the number of samples in all shards."""
        self._flush(self._position)
        return self._position

    def _flush(self, position: int) -> None:
        if self._pieces:
            write_shard(self._shard(position), concat_samples(self._pieces))
        self._pieces = []

    def _shard(self, position: int) -> Path:
        return self._folder / f"part-{position // self._size:05d}.npz"
