"""Between the first and the last pass of preprocess: what the training lines before each line say of its values.

work/past/<column>.counts.npy      of every sample, in the order of the chunks: lines with its value before it
work/past/<column>.log_odds.npy    the same: how the value's click rate differed from that of all lines before
past/<column>.arrow                written last: what the whole training split had of each raw id

Lines stand in order of time where the source tells one (`day`: days or hours), and in the order of the raw files
within it and elsewhere. Memory holds the distinct raw ids of the columns in work, 24 bytes each, never the samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from slipstream.datasets.source import GroupingSource, Source
from slipstream.errors import ConfigError, DataError, did_you_mean
from slipstream.io.artifacts import write_atomically
from slipstream.io.capacity import require_disk
from slipstream.io.lookups import past_path, write_past
from slipstream.io.parsed import dictionary_of
from slipstream.io.split_layout import SplitLayout
from slipstream.ops import split as splits
from slipstream.ops.dense import Moments, logarithms
from slipstream.ops.parallel import Engine
from slipstream.ops.past import PastCounter, PastEncoding, Seen
from slipstream.ops.vocabulary import RawIdCounter, hash_to_buckets
from slipstream.progress import Progress
from slipstream.schema import LABEL, table_name

_ALL = "all"
_MOST_VISITS = 100
"""Times that a chunk is read, on average, to put its lines in order of time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PastFeatures:
    """Columns that were asked for, of a source that can have them."""

    count_columns: list[int]
    target_columns: list[int]
    prior: float
    num_buckets: list[int]
    """Of the table of each sparse column; 0 where raw ids are not hashed."""


def find_past_features(
    source: Source,
    *,
    counts: Sequence[str],
    targets: Sequence[str],
    prior: float,
    buckets: Sequence[int],
) -> PastFeatures | None:
    """Check what was asked for; None where that is nothing.

    Args:
        source: The raw format.
        counts: Sparse columns by number or own name, or `all`: `preprocess.count_features`.
        targets: The same: `preprocess.target_features`.
        prior: `preprocess.target_prior`.
        buckets: Of each table; 0 where raw ids are not hashed.

    Raises:
        ConfigError: There is no such column, or lines of the source have no order to speak of.
    """
    if not counts and not targets:
        return None
    if isinstance(source, GroupingSource):
        raise ConfigError(
            "`preprocess.count_features` and `target_features` take lines in their order, and this source brings the "
            "lines of each user together, so that none is before another",
            hint="leave them out for this source",
        )
    return PastFeatures(
        count_columns=_find_columns(source, counts, "preprocess.count_features"),
        target_columns=_find_columns(source, targets, "preprocess.target_features"),
        prior=prior,
        num_buckets=[buckets[table] for table in source.table_of_column],
    )


def _find_columns(source: Source, names: Sequence[str], key: str) -> list[int]:
    """Numbers of sparse columns, ascending; those that hold lists have no single value, and are none."""
    usable = {
        table_name(column): column
        for column, table in enumerate(source.table_of_column)
        if table not in source.padded_tables
    }
    if list(names) == [_ALL]:
        return list(usable.values())
    own = {name: usable[column] for column, name in source.column_names.items() if column in usable}
    found = set()
    for name in names:
        if name not in usable and name not in own:
            raise ConfigError(
                f"`{key}` names `{name}`, which is no sparse column with one value a line; there are "
                f"{', '.join(own or usable)}",
                hint=did_you_mean(name, [*usable, *own]) or "`all` takes all of them",
            )
        found.add(own.get(name, usable.get(name, -1)))
    return sorted(found)


def learn_past(
    features: PastFeatures,
    layout: SplitLayout,
    *,
    transform: str,
    positives: int,
    folder: Path,
    workers: int,
    progress: Progress,
    engine: Engine,
) -> PastEncoding:
    """Count along the training split, and note for every sample what was before; finished columns are not made again.

    Args:
        features: Columns to look at.
        layout: The split of the parsed chunks.
        transform: Name of the dense transform.
        positives: Training samples with label 1.
        folder: Of the stage; what is learnt goes to `past/`, what samples get to `work/past/`.
        workers: Columns worked on at once.
        progress: Told how far it is.
        engine: Who works on them.

    Raises:
        CapacityError: The disk has no room for what samples get.
        DataError: Lines jump in time so much that their order cannot be found, or held-out samples are before training.
    """
    _check_order(layout)
    encoding = PastEncoding(
        transform=transform,
        count_columns=features.count_columns,
        target_columns=features.target_columns,
        prior=features.prior,
        num_lines=layout.totals["train"],
        num_clicks=positives,
    )
    written = sum(file.stat().st_size for file in folder.glob("work/past/*.npy"))
    require_disk(
        folder,
        layout.num_samples * (8 * len(encoding.count_columns) + 4 * len(encoding.target_columns)) - written,
        purpose="counts and click rates of the past",
        hint="free some disk, choose a folder on a larger one with --runs, or take fewer columns",
    )
    columns = encoding.columns
    buckets = [features.num_buckets[column] for column in columns]
    with progress.task("look back", len(columns), "columns") as advance:
        tasks = zip(columns, buckets, strict=True)
        for _ in engine.in_order(_learn_column, tasks, context=_Learning(encoding, layout, folder), workers=workers):
            advance(1, "")
    if transform != "standard":
        return encoding
    moments = [
        *(_measure(layout, counts_path(folder, column), is_count=True) for column in encoding.count_columns),
        *(_measure(layout, log_odds_path(folder, column), is_count=False) for column in encoding.target_columns),
    ]
    return replace(encoding, means=[mean for mean, _ in moments], deviations=[spread for _, spread in moments])


def counts_path(folder: Path, column: int) -> Path:
    """Where the counts before every sample lie. An array of shape (samples,), int64."""
    return folder / "work" / "past" / f"{table_name(column)}.counts.npy"


def log_odds_path(folder: Path, column: int) -> Path:
    """Where the log-odds of every sample lie. An array of shape (samples,), float32."""
    return folder / "work" / "past" / f"{table_name(column)}.log_odds.npy"


def _check_order(layout: SplitLayout) -> None:
    visits = sum(len(chunk.day_counts) for chunk in layout.chunks)
    days = {day for chunk in layout.chunks for day in chunk.day_counts}
    if visits > _MOST_VISITS * len(layout.chunks) + len(days):
        raise DataError(
            f"lines of {len(days):,} days or hours are spread over all of the raw files, so `count_features` and "
            "`target_features` of section `preprocess` cannot go through them in order of time",
            hint="sort the raw files by time",
        )
    last_trained, first_held_out = None, None
    for index in range(len(layout.chunks)):
        days_of_chunk = layout.days_of(index)
        trained = days_of_chunk[layout.members(index, splits.TRAIN)]
        if trained.size:
            last_trained = int(trained.max()) if last_trained is None else max(last_trained, int(trained.max()))
        for code in (splits.VAL, splits.TEST):
            held_out = days_of_chunk[layout.members(index, code)]
            if held_out.size:
                least = int(held_out.min())
                first_held_out = least if first_held_out is None else min(first_held_out, least)
    if last_trained is not None and first_held_out is not None and first_held_out < last_trained:
        raise DataError(
            f"samples held out for validation and test begin on day {first_held_out}, before the last one of training, "
            f"{last_trained}: what `preprocess.count_features` and `target_features` know of them would be the future",
            hint="sort the raw files by time, or set preprocess.split = 'by_day' or 'by_time'",
        )


def _training_in_order(layout: SplitLayout) -> Iterator[tuple[int, slice | np.ndarray]]:
    """(chunk, which of its samples) of the training split, day by day, and in the order of lines within a day."""
    chunks_of: dict[int, list[int]] = {}
    for index, chunk in enumerate(layout.chunks):
        for name in chunk.day_counts:
            chunks_of.setdefault(int(name), []).append(index)
    for day, chunks in sorted(chunks_of.items()):
        for index in chunks:
            members = layout.members(index, splits.TRAIN)
            if len(layout.chunks[index].day_counts) > 1:
                members = np.arange(members.start, members.stop) if isinstance(members, slice) else members
                members = members[layout.days_of(index)[members] == day]
            yield index, members


@dataclass(frozen=True, slots=True)
class _Learning:
    """What it takes to learn the past of a column."""

    encoding: PastEncoding
    layout: SplitLayout
    folder: Path


def _learn_column(learning: _Learning, task: tuple[int, int]) -> None:
    """Learn the past of a column, whose raw ids are hashed into so many buckets, 0 for none."""
    encoding, layout, folder = learning.encoding, learning.layout, learning.folder
    column, num_buckets = task
    finished = past_path(folder, table_name(column))
    if finished.exists():
        return

    def values_of(chunk_index: int) -> tuple[np.ndarray, np.ndarray]:
        name = table_name(column)
        raw_ids, codes = dictionary_of(layout.store.open(layout.chunks[chunk_index], [name]), name)
        if not num_buckets:
            return raw_ids, codes
        # several raw ids may share a bucket, and a code must stand for one value
        distinct, places = np.unique(hash_to_buckets(raw_ids, num_buckets), return_inverse=True)
        return distinct, places[codes]

    ids = RawIdCounter()
    for index in range(len(layout.chunks)):
        raw_ids, codes = values_of(index)
        ids.add(raw_ids, np.bincount(codes[layout.members(index, splits.TRAIN)], minlength=len(raw_ids)))
    counter = PastCounter(ids.result()[0])
    with ExitStack() as stack:
        columns = _SampleColumns(encoding, column, layout, folder, stack)
        for index, members in _training_in_order(layout):
            raw_ids, codes = values_of(index)
            labels = layout.store.open(layout.chunks[index], [LABEL]).column(LABEL).to_numpy()
            columns.put(index, members, counter.add(raw_ids, codes[members], labels[members]))
        past = counter.result()
        for index in range(len(layout.chunks)):
            raw_ids, codes = values_of(index)
            counts, clicks = past(raw_ids)
            for code in (splits.VAL, splits.TEST):
                members = layout.members(index, code)
                found = codes[members]
                seen = Seen(
                    counts=counts[found],
                    clicks=clicks[found],
                    lines=encoding.num_lines,
                    all_clicks=encoding.num_clicks,
                )
                columns.put(index, members, seen)
    write_past(finished, past)


class _SampleColumns:
    """What samples get of one column: arrays on disk, in the order of the chunks, whole when the stack is left."""

    def __init__(
        self, encoding: PastEncoding, column: int, layout: SplitLayout, folder: Path, stack: ExitStack
    ) -> None:
        self._layout, self._prior = layout, encoding.prior

        def make(path: Path, dtype: type) -> np.memmap[Any, Any]:
            partial = stack.enter_context(write_atomically(path))
            array = np.lib.format.open_memmap(partial, "w+", dtype, (layout.num_samples,))
            stack.callback(array.flush)
            return array

        is_counted, has_rate = column in encoding.count_columns, column in encoding.target_columns
        self._counts = make(counts_path(folder, column), np.int64) if is_counted else None
        self._log_odds = make(log_odds_path(folder, column), np.float32) if has_rate else None

    def put(self, chunk_index: int, members: slice | np.ndarray, seen: Seen) -> None:
        """Note what was before some samples of a chunk."""
        here = self._layout.samples_of(chunk_index)
        if self._counts is not None:
            self._counts[here][members] = seen.counts
        if self._log_odds is not None:
            self._log_odds[here][members] = seen.log_odds(self._prior)


def _measure(layout: SplitLayout, path: Path, *, is_count: bool) -> tuple[float, float]:
    """Mean and deviation over the training split."""
    moments, values = Moments(), np.load(path, mmap_mode="r", allow_pickle=False)
    for index in range(len(layout.chunks)):
        own = values[layout.samples_of(index)][layout.members(index, splits.TRAIN)]
        moments.add(logarithms(own) if is_count else own.astype(np.float64))
    return moments.result()
