"""Segregate: choose the hot rows, and split samples by them.

Reads   preprocess/   all parts; profile/ counts.parquet
Writes  segregate/    hot_set.parquet (table, row, slot, count), slots.npz (one slot map per table),
                      {hot,cold,val,test}/part-*.npz (X_int, X_cat as slots, y)
Keeps   the multiset of samples; no cold lookup in a hot shard; hot bytes <= budget
Costs   one pass over the parts, and one a round for `sample-aware`; memory for a few parts and 12 bytes per row
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from slipstream.config import SegregateConfig, parse_budget
from slipstream.errors import CapacityError
from slipstream.io.artifacts import Artifact, write_atomically
from slipstream.io.parallel import in_order
from slipstream.io.samples import Samples, concat_samples, read_part, read_rows, write_shard
from slipstream.ops.hot_set import (
    HotSet,
    assign_slots,
    rank_rows,
    select_sample_aware,
    table_offsets,
    take_above_threshold,
    take_hot_rows,
)
from slipstream.progress import Progress
from slipstream.schema import dense_name

_WORKERS = 2


def run(
    config: SegregateConfig,
    *,
    processed: Artifact,
    counts: np.ndarray,
    row_bytes: int,
    scratch: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Choose the hot set under the budget and write shards.

    Args:
        config: Section `segregate`.
        processed: The preprocess artifact.
        counts: Access counts per global row. Shape (V,), int64.
        row_bytes: Accelerator bytes of one hot row, all included.
        scratch: Folder to write to.
        progress: Told how far it is.

    Returns:
        Counts for the manifest.

    Raises:
        CapacityError: The budget is below the OOV rows or above all rows.
    """
    rows_per_table: dict[str, int] = processed.counts["rows_per_table"]
    tables = list(rows_per_table)
    offsets = table_offsets(list(rows_per_table.values()))
    hot_set = _choose(config, processed, counts, tables, offsets, row_bytes=row_bytes, scratch=scratch)
    slots = assign_slots(hot_set.is_hot)
    _write_hot_set(scratch, hot_set, slots, counts, tables, offsets)
    slot_maps = [slots[start:stop] for start, stop in pairwise(offsets)]
    dense = [dense_name(index) for index in range(processed.counts["num_dense"])]
    written = dict.fromkeys(("hot", "cold", "val", "test"), 0)
    lookups = hits = 0
    with progress.task("write shards", sum(processed.counts["samples"].values()), "samples") as advance:
        for split in ("train", "val", "test"):
            parts = processed.files(f"{split}/", ".parquet")
            groups = ("hot", "cold") if split == "train" else (split,)
            writers = {group: _ShardWriter(scratch / group, config.samples_per_shard) for group in groups}
            loaded = in_order(lambda part: read_part(part, dense, tables, slot_maps), parts, _WORKERS)
            for samples in loaded:
                if split == "train":
                    found = samples.X_cat < hot_set.num_hot
                    is_hot = np.asarray(found.all(axis=1))
                    lookups, hits = lookups + found.size, hits + int(np.count_nonzero(found))
                    writers["hot"].add(samples.take(is_hot))
                    writers["cold"].add(samples.take(~is_hot))
                else:
                    writers[split].add(samples)
                advance(len(samples), "")
            written |= {group: writer.close() for group, writer in writers.items()}
    return {
        "samples": written,
        "hot_rows": hot_set.num_hot,
        "rows": len(counts),
        "lambda": hot_set.access_threshold,
        "hit_ratio": hits / lookups,
        "hot_sample_share": written["hot"] / (written["hot"] + written["cold"]),
        "num_dense": len(dense),
        "tables": rows_per_table,
    }


def _choose(
    config: SegregateConfig,
    processed: Artifact,
    counts: np.ndarray,
    tables: list[str],
    offsets: np.ndarray,
    *,
    row_bytes: int,
    scratch: Path,
) -> HotSet:
    oov_rows = offsets[:-1]
    if config.access_threshold:
        return take_above_threshold(counts, oov_rows, access_threshold=config.access_threshold)
    num_rows = _affordable_rows(config.hot_budget, len(counts), len(oov_rows), row_bytes)
    if config.policy == "frequency":
        ranked = rank_rows(counts, oov_rows)
        return take_hot_rows(ranked, counts, num_rows=num_rows, num_oov=len(oov_rows))
    held = _hold_rows(processed.files("train/", ".parquet"), tables, offsets, scratch / "work" / "rows")
    return select_sample_aware(
        counts,
        oov_rows,
        lambda: (np.load(path, mmap_mode="r", allow_pickle=False) for path in held),
        num_rows=num_rows,
        power=config.sample_aware_power,
        rounds=config.sample_aware_rounds,
    )


def _affordable_rows(budget: str | int, num_rows: int, num_oov: int, row_bytes: int) -> int:
    total = num_rows * row_bytes
    asked = parse_budget(budget, total_bytes=total)
    if asked > total:
        raise CapacityError(
            f"`segregate.hot_budget` = {budget} asks for {asked:,} bytes, "
            f"and all {num_rows:,} rows at {row_bytes} bytes a row take {total:,}",
            hint='lower it, or say "100%" to keep every row on the device',
        )
    affordable = asked // row_bytes
    if affordable < num_oov:
        raise CapacityError(
            f"`segregate.hot_budget` = {budget} is {asked:,} bytes and holds {affordable} rows of {row_bytes} "
            f"bytes; the OOV rows of {num_oov} tables are always hot",
            hint=f"raise it to at least {num_oov * row_bytes} bytes",
        )
    return affordable


def _hold_rows(parts: Sequence[Path], tables: list[str], offsets: np.ndarray, folder: Path) -> list[Path]:
    """Decode the training rows once; the rounds then read them as mapped arrays."""
    held = []
    for part in parts:
        path = folder / f"{part.stem}.npy"
        if not path.exists():
            with write_atomically(path) as partial, partial.open("wb") as stream:
                np.save(stream, read_rows(part, tables, offsets))
        held.append(path)
    return held


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


class _ShardWriter:
    """Cuts a stream of samples into shards of one size; a shard that is there already is not written again."""

    def __init__(self, folder: Path, samples_per_shard: int) -> None:
        self._folder, self._size = folder, samples_per_shard
        self._pieces: list[Samples] = []
        self._held = self._written = self._number = 0

    def add(self, samples: Samples) -> None:
        """Append samples."""
        self._pieces.append(samples)
        self._held += len(samples)
        if self._held < self._size:
            return
        stacked = concat_samples(self._pieces)
        cut = self._held - self._held % self._size
        for start in range(0, cut, self._size):
            self._write(stacked.take(slice(start, start + self._size)))
        self._pieces, self._held = [stacked.take(slice(cut, None))], self._held - cut

    def close(self) -> int:
        """Write what is left; returns the number of samples in all shards."""
        if self._held:
            self._write(concat_samples(self._pieces))
        return self._written

    def _write(self, samples: Samples) -> None:
        path = self._folder / f"part-{self._number:05d}.npz"
        if not path.exists():
            write_shard(path, samples)
        self._number += 1
        self._written += len(samples)
