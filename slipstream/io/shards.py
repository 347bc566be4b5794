"""Shards of segregated samples: written one after another, or each by itself where workers share a folder only.

Either way the same bytes; each finished shard and what each part gave are kept, so a killed run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from slipstream.io.artifacts import Artifact, write_atomically, write_json
from slipstream.io.figures import PreprocessFigures
from slipstream.io.samples import Samples, concat_samples, read_part, write_shard
from slipstream.ops.parallel import Engine
from slipstream.schema import SHARD_GROUPS

_WORKERS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardColumns:
    """Which columns of a part become which arrays of a shard."""

    dense: list[str]
    tables: list[str]
    slots: np.ndarray | Path
    """Of all global rows, or a file that holds them."""
    bounds: list[tuple[int, int]]
    """Of each sparse column, which of the global rows are its table's."""
    padding_slots: list[int | None]
    """Of each sparse column; None where it has no padding."""

    @classmethod
    def of(
        cls, encoded: PreprocessFigures, dense: list[str], names: list[str], slots: np.ndarray, offsets: np.ndarray
    ) -> ShardColumns:
        """Describe the columns of an artifact of preprocess."""
        bounds = [(int(offsets[table]), int(offsets[table + 1])) for table in encoded.column_tables]
        padding = [(encoded.padding_rows or {}).get(name) for name in encoded.rows_per_table]
        rows = [padding[table] for table in encoded.column_tables]
        return cls(
            dense=dense,
            tables=names,
            slots=slots,
            bounds=bounds,
            padding_slots=[
                None if row is None else int(slots[start + row]) for row, (start, _) in zip(rows, bounds, strict=True)
            ],
        )

    def read(self, part: Path) -> Samples:
        """Give samples of a part, `X_cat` as slots."""
        slots = self.slots
        if isinstance(slots, Path):
            slots = np.load(slots, mmap_mode="r", allow_pickle=False)
        return read_part(part, self.dense, self.tables, [slots[start:stop] for start, stop in self.bounds])

    def count_padding(self, samples: Samples) -> int:
        """Count what stands in samples for no value."""
        padded = [(at, slot) for at, slot in enumerate(self.padding_slots) if slot is not None]
        return sum(int(np.count_nonzero(samples.X_cat[:, at] == slot)) for at, slot in padded)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """What it takes to write shards."""

    processed: Artifact
    """Of preprocess."""
    columns: ShardColumns
    num_hot: int
    """H: slots below are hot."""
    samples_per_shard: int
    scratch: Path
    """Folder of the stage."""

    def put_down(self) -> Sharding:
        """Write the slots to a file, which workers on other machines map."""
        path = self.scratch / "work" / "slots.npy"
        with write_atomically(path) as partial, partial.open("wb") as stream:
            np.save(stream, self.columns.slots)  # type: ignore[arg-type]
        return replace(self, columns=replace(self.columns, slots=path))

    def divide(self, split: str, samples: Samples) -> tuple[list[Samples], dict[str, Any]]:
        """Give the samples of a part for each group of its split, and what is noted of the part."""
        found = samples.X_cat < self.num_hot
        is_hot = np.asarray(found.all(axis=1))
        pieces = [samples.take(is_hot), samples.take(~is_hot)] if split == "train" else [samples]
        hits = lookups = 0
        if split == "train":
            num_padding = self.columns.count_padding(samples)
            hits, lookups = int(np.count_nonzero(found)) - num_padding, found.size - num_padding
        return pieces, {"samples": [len(piece) for piece in pieces], "hits": hits, "lookups": lookups}


def _groups(split: str) -> tuple[str, ...]:
    return ("hot", "cold") if split == "train" else (split,)


def _load(sharding: Sharding, part: Path) -> Samples:
    return sharding.columns.read(sharding.processed.check(part))


def write_shards(
    sharding: Sharding, engine: Engine, advance: Callable[[int, str], None]
) -> tuple[dict[str, int], int, int]:
    """Write all shards, one sample after another.

    Args:
        sharding: What it takes.
        engine: Who reads parts.
        advance: Told how many samples were written since the last call.

    Returns:
        Samples per group, training lookups that find a hot row, and all training lookups.
    """
    written: dict[str, int] = {}
    hits = lookups = 0
    for split in ("train", "val", "test"):
        groups = _groups(split)
        writers = [_ShardWriter(sharding.scratch / group, sharding.samples_per_shard) for group in groups]
        parts = sharding.processed.files(f"{split}/", ".parquet")
        tallies = [_tally_path(sharding.scratch, part) for part in parts]
        num_done = 0
        while num_done < len(parts) and (tally := _finished_tally(tallies[num_done], writers)) is not None:
            hits, lookups = hits + tally["hits"], lookups + tally["lookups"]
            num_done += 1
            advance(sum(tally["samples"]), "")
        loaded = engine.in_order(_load, parts[num_done:], context=sharding, workers=_WORKERS)
        for samples, path in zip(loaded, tallies[num_done:], strict=True):
            pieces, tally = sharding.divide(split, samples)
            for writer, piece in zip(writers, pieces, strict=True):
                writer.add(piece)
            write_json(path, tally)
            hits, lookups = hits + tally["hits"], lookups + tally["lookups"]
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
        return _shard_path(self._folder, position // self._size)


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.npz"


# --- shards, by workers on other machines ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    """Samples of one part that go to one shard."""

    part: Path
    first: int
    """Position among the part's samples of the group."""
    stop: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shard:
    """One shard to write."""

    path: Path
    split: str
    place: int
    """Of its group in the split."""
    pieces: list[_Piece]


def write_shards_apart(
    sharding: Sharding, engine: Engine, advance: Callable[[int, str], None]
) -> tuple[dict[str, int], int, int]:
    """Write all shards, each by itself: parts are read once to count what they give, and again for their shards.

    Args:
        sharding: What it takes, put down.
        engine: Who reads parts and writes shards.
        advance: Told how many samples were written since the last call.

    Returns:
        As `write_shards`.
    """
    written: dict[str, int] = {}
    hits = lookups = 0
    for split in ("train", "val", "test"):
        parts = sharding.processed.files(f"{split}/", ".parquet")
        tallies = list(engine.in_order(_tally, [(split, part) for part in parts], context=sharding, workers=_WORKERS))
        hits += sum(tally["hits"] for tally in tallies)
        lookups += sum(tally["lookups"] for tally in tallies)
        for place, group in enumerate(_groups(split)):
            sizes = [tally["samples"][place] for tally in tallies]
            written[group] = sum(sizes)
            shards = _cut(sharding, split, place, parts, sizes)
            for num_samples in engine.in_order(_write_shard, shards, context=sharding, workers=_WORKERS):
                advance(num_samples, "")
    return {group: written[group] for group in SHARD_GROUPS}, hits, lookups


def _tally(sharding: Sharding, task: tuple[str, Path]) -> dict[str, Any]:
    """Count what a part gives to each group; noted for an interrupted run."""
    split, part = task
    path = _tally_path(sharding.scratch, part)
    if path.exists():
        tally: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return tally
    _, tally = sharding.divide(split, _load(sharding, part))
    write_json(path, tally)
    return tally


def _cut(sharding: Sharding, split: str, place: int, parts: Sequence[Path], sizes: Sequence[int]) -> Iterator[_Shard]:
    """Say for each shard of a group which samples of which parts it has.

    Args:
        sharding: How many samples a shard has, and where it goes.
        split: Of the parts.
        place: Of the group in the split.
        parts: In order.
        sizes: Samples that each gives to the group.
    """
    folder = sharding.scratch / _groups(split)[place]
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    for start in range(0, total, sharding.samples_per_shard):
        stop = min(start + sharding.samples_per_shard, total)
        pieces = []
        # from the first part that ends behind the shard's start to the first that reaches its stop
        for at in range(int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(ends, stop)) + 1):
            before = int(ends[at]) - sizes[at]
            piece = _Piece(part=parts[at], first=max(start - before, 0), stop=min(stop - before, sizes[at]))
            if piece.stop > piece.first:
                pieces.append(piece)
        path = _shard_path(folder, start // sharding.samples_per_shard)
        yield _Shard(path=path, split=split, place=place, pieces=pieces)


def _write_shard(sharding: Sharding, shard: _Shard) -> int:
    """Write a shard, where that is not done yet; returns its samples."""
    if not shard.path.exists():
        pieces = []
        for piece in shard.pieces:
            of_group = sharding.divide(shard.split, _load(sharding, piece.part))[0][shard.place]
            pieces.append(of_group.take(slice(piece.first, piece.stop)))
        write_shard(shard.path, concat_samples(pieces))
    return sum(piece.stop - piece.first for piece in shard.pieces)
