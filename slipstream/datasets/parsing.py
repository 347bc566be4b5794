"""The first pass of preprocess: raw lines to chunks of samples on disk, and every line accounted for.

A line that is a sample by itself goes straight into a chunk. Where samples are made of several lines of one owner
(`GroupingSource`), lines first become chunks of events, each sorted by owner; a stretch of owners is then gathered from
all of them, as many at a time as memory is meant to hold. So owners come together whatever the order of lines, and
memory does not grow with the log.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import polars as pl

from slipstream.datasets.source import OWNER, ColumnarSource, GroupingSource, Source
from slipstream.errors import DataError
from slipstream.io.parsed import ParsedChunk, ParsedStore
from slipstream.io.raw import RawBlock, raw_size, read_blocks
from slipstream.io.samples import write_parquet
from slipstream.io.stretches import Stretch, find_stretches, read_stretch
from slipstream.ops.parallel import Engine
from slipstream.progress import Progress
from slipstream.schema import dense_name

_REJECTS_PER_PART = 65_536
_HOPELESS_LINES = 100_000
_BYTES_PER_EVENT = 36
"""Text of one event, so that a stretch of owners has as many events as a chunk of text has lines."""
_ANY_FILE = 0
"""File index of chunks whose samples come from all files."""
_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True)
class ParsedFiles:
    """What became of the lines of all raw files."""

    files: Sequence[str]
    lines: Sequence[ParsedChunk]
    """Chunks of text, in the order of files and lines, with their rejected lines."""
    line_store: ParsedStore
    samples: Sequence[ParsedChunk]
    """Chunks of samples, in order; the chunks of text where each line is a sample by itself."""
    store: ParsedStore
    """Holds the samples."""

    @property
    def num_lines(self) -> int:
        """Lines read."""
        return sum(chunk.num_lines for chunk in self.lines)

    def check_rejects(self, max_ratio: float) -> int:
        """Count rejected lines.

        Raises:
            DataError: More than `max_ratio` of all lines are rejected, all are, or there are none.
        """
        lines, rejected = self.num_lines, sum(chunk.num_rejected for chunk in self.lines)
        # divided, not multiplied: 29 of 100 lines are within a limit of .29, though .29 * 100 is less than 29
        if rejected == lines or rejected / lines > max_ratio:
            found = f"{rejected:,} of {lines:,} lines are no samples" if lines else "the raw files are empty"
            raise DataError(
                "\n  ".join(
                    [f"{found}; `preprocess.max_reject_ratio` allows {max_ratio:.2%}", *self._first_rejects(3)]
                ),
                hint="check `dataset.source` and `dataset.raw`, or raise `preprocess.max_reject_ratio`",
            )
        return rejected

    def write_rejects(self, out_dir: Path) -> None:
        """Write rejected lines with their file, line number and reason as Parquet parts."""
        pieces: list[pl.DataFrame] = []
        number = 0
        for chunk, first_line in _with_first_lines(self.lines):
            if not chunk.num_rejected:
                continue
            frame = self.line_store.rejects(chunk).select(
                pl.lit(Path(self.files[chunk.file_index]).name).alias("file"),
                (pl.col("position") + first_line).alias("line"),
                "reason",
                "content",
            )
            pieces.append(frame)
            while sum(piece.height for piece in pieces) >= _REJECTS_PER_PART:
                stacked = pl.concat(pieces, rechunk=True)
                write_parquet(stacked.head(_REJECTS_PER_PART).to_arrow(), out_dir / f"part-{number:05d}.parquet")
                pieces, number = [stacked.slice(_REJECTS_PER_PART)], number + 1
        if sum(piece.height for piece in pieces):
            write_parquet(pl.concat(pieces, rechunk=True).to_arrow(), out_dir / f"part-{number:05d}.parquet")

    def _first_rejects(self, limit: int) -> list[str]:
        found: list[str] = []
        for chunk, first_line in _with_first_lines(self.lines):
            if chunk.num_rejected:
                for position, reason, _ in self.line_store.rejects(chunk).head(limit).iter_rows():
                    found.append(f"{self.files[chunk.file_index]}, line {first_line + position}: {reason}")
            if len(found) >= limit:
                break
        return found[:limit]


def _with_first_lines(chunks: Iterable[ParsedChunk]) -> Iterator[tuple[ParsedChunk, int]]:
    file_index, line = -1, 1
    for chunk in chunks:
        if chunk.file_index != file_index:
            file_index, line = chunk.file_index, 1
        yield chunk, line
        line += chunk.num_lines


def parse_files(
    source: Source,
    *,
    files: Sequence[str],
    folder: Path,
    chunk_bytes: int,
    max_reject_ratio: float,
    workers: int,
    progress: Progress,
    engine: Engine,
) -> ParsedFiles:
    """Turn raw files into chunks of samples below `folder`; finished ones are not made again.

    Args:
        source: The raw format.
        files: Raw files, in order.
        folder: Where chunks are kept.
        chunk_bytes: Text parsed at once.
        max_reject_ratio: Named when more than half of all lines are rejected; otherwise checked by the caller.
        workers: Chunks worked on at once.
        progress: Told how far it is.
        engine: Who works on them.

    Raises:
        DataError: A file cannot be read, or more than half of its lines are rejected.
    """
    is_grouping = isinstance(source, GroupingSource)
    line_store = ParsedStore(folder / ("events" if is_grouping else "parsed"))
    reading = _Reading(source, line_store, chunk_bytes)
    lines = _read_lines(reading, files, max_reject_ratio, workers=workers, progress=progress, engine=engine)
    if not isinstance(source, GroupingSource):
        return ParsedFiles(files, lines, line_store, lines, line_store)
    store = ParsedStore(folder / "parsed")
    most_events = max(1, chunk_bytes // _BYTES_PER_EVENT)
    gathering = _Gathering(source, lines, line_store, store)
    samples = _gather(gathering, most_events=most_events, workers=workers, progress=progress, engine=engine)
    num_events = sum(chunk.num_samples for chunk in lines)
    if num_events and not any(chunk.num_samples for chunk in samples):
        raise DataError(
            f"no sample came of {num_events:,} events: none has a second event of the same user before it",
            hint="check that the field of the user is one, and that `dataset.raw` names all files",
        )
    return ParsedFiles(files, lines, line_store, samples, store)


# --- lines to chunks -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Reading:
    """What it takes to make chunks of lines."""

    source: Source
    store: ParsedStore
    chunk_bytes: int


def _read_lines(
    reading: _Reading,
    files: Sequence[str],
    max_reject_ratio: float,
    *,
    workers: int,
    progress: Progress,
    engine: Engine,
) -> list[ParsedChunk]:
    store = reading.store
    store.remove_half_written()
    rejected = lines = 0

    sizes = [raw_size(file) for file in files]
    chunks = [store.finished(index) for index in range(len(files))]
    unread = [index for index in range(len(files)) if not store.is_complete(index, len(chunks[index]))]
    # bytes of each file that its chunks so far were made of
    passed = [_stored(chunks[index], size) if index in unread else size for index, size in enumerate(sizes)]
    with progress.task("parse", sum(sizes), "B", done=sum(passed)) as advance:

        def close(file_index: int) -> None:
            store.mark_complete(file_index, len(chunks[file_index]))
            advance(sizes[file_index] - passed[file_index], "")

        starts = [
            (index, files[index], chunks[index][-1].end if chunks[index] else 0, len(chunks[index])) for index in unread
        ]
        for chunk in _make_chunks(reading, starts, workers=workers, engine=engine):
            index = chunk.file_index
            while unread[0] != index:  # results come in order, so the files before have no more
                close(unread.pop(0))
            chunks[index].append(chunk)
            lines, rejected = lines + chunk.num_lines, rejected + chunk.num_rejected
            stored = _stored(chunks[index], sizes[index])
            advance(stored - passed[index], f"{lines:,} lines")
            passed[index] = stored
            if lines >= _HOPELESS_LINES and rejected > lines / 2:
                so_far = [chunk for of_file in chunks[: index + 1] for chunk in of_file]
                ParsedFiles(files, so_far, store, [], store).check_rejects(max_reject_ratio)
        for index in unread:
            close(index)
    return [chunk for of_file in chunks for chunk in of_file]


def _make_chunks(
    reading: _Reading, starts: Sequence[tuple[int, str, int, int]], *, workers: int, engine: Engine
) -> Iterator[ParsedChunk]:
    """Read files on from where their chunks end.

    Args:
        reading: What makes chunks.
        starts: Of each file its number, path, offset to read on from, and number of chunks before.
        workers: Chunks worked on at once.
        engine: Who works on them: given the bytes where it shares memory, told where to read them where it does not.
    """
    if engine.shares_memory:
        made = engine.in_order(_parse_block, _find(read_blocks, reading, starts), context=reading, workers=workers)
    else:
        made = engine.in_order(_parse_stretch, _find(find_stretches, reading, starts), context=reading, workers=workers)
    return itertools.chain.from_iterable(made)


def _find(
    find: Callable[..., Iterator[_Found]], reading: _Reading, starts: Sequence[tuple[int, str, int, int]]
) -> Iterator[_Found]:
    """Find what to work on, file after file."""
    for index, path, offset, num_chunks in starts:
        yield from find(path, file_index=index, block_bytes=reading.chunk_bytes, skip=offset, skip_blocks=num_chunks)


def _parse_stretch(reading: _Reading, stretch: Stretch) -> list[ParsedChunk]:
    """Make chunks of a stretch; those of its first blocks may be there, from a worker that was lost."""
    finished = reading.store.whole_from(stretch.file_index, stretch.block_index) if stretch.end is None else []
    if finished:
        stretch = replace(stretch, start=finished[-1].end, block_index=stretch.block_index + len(finished))
    for block in read_stretch(stretch, block_bytes=reading.chunk_bytes):
        finished += _parse_block(reading, block)
    return finished


def _stored(chunks: Sequence[ParsedChunk], size: int) -> int:
    """Bytes of a file that its chunks so far were made of."""
    return min(chunks[-1].stored, size) if chunks else 0


def _parse_block(reading: _Reading, block: RawBlock) -> list[ParsedChunk]:
    """Make the chunk of a block: one."""
    source, data = reading.source, block.data
    if not isinstance(data, bytes):
        assert isinstance(source, ColumnarSource)
        data = source.to_lines(data)
    parsed = source.parse_events(data) if isinstance(source, GroupingSource) else source.parse(data)
    rejects = []
    if parsed.rejected_lines.size:
        lines = data.split(b"\n")
        for position in parsed.rejected_lines.tolist():
            line = lines[position].removesuffix(b"\r")
            rejects.append((position, source.explain(line), line))
    if isinstance(source, GroupingSource):
        dense, day_counts = parsed.samples.columns, {}
    else:
        dense = [dense_name(index) for index in range(source.num_dense)]
        day_counts = _count_days(parsed.samples, block.file_index)
    chunk = ParsedChunk(
        file_index=block.file_index,
        block_index=block.block_index,
        num_lines=parsed.num_lines,
        num_samples=parsed.samples.height,
        num_rejected=len(rejects),
        end=block.end,
        day_counts=day_counts,
        stored=block.stored,
        lists={name: dict(counts) for name, counts in parsed.lists.items()},
    )
    reading.store.write(chunk, parsed.samples, rejects, dense, parsed.texts)
    return [chunk]


def _count_days(samples: pl.DataFrame, file_index: int) -> dict[str, int]:
    if "day" not in samples.columns:
        return {str(file_index): samples.height}
    return {str(day): count for day, count in samples["day"].value_counts().sort("day").iter_rows()}


# --- events to samples ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Gathering:
    """What it takes to make samples of events."""

    source: GroupingSource
    lines: Sequence[ParsedChunk]
    """Chunks of events, which stand in the order of owners within each."""
    events: ParsedStore
    """Holds them."""
    store: ParsedStore
    """Of samples."""


def _gather(
    gathering: _Gathering, *, most_events: int, workers: int, progress: Progress, engine: Engine
) -> list[ParsedChunk]:
    """Make samples of all events, stretch of owners by stretch; a stretch ends where a group begins."""
    store, lines, events = gathering.store, gathering.lines, gathering.events
    store.remove_half_written()
    finished = store.finished(_ANY_FILE)
    if store.is_complete(_ANY_FILE, len(finished)):
        return finished
    first = finished[-1].end if finished else 0
    num_done = sum(int(np.searchsorted(_owners(events, chunk), np.uint64(first))) for chunk in lines)
    with progress.task("gather", sum(chunk.num_samples for chunk in lines), "events", done=num_done) as advance:
        bounds = _find_bounds(gathering.source, lines, events, first=first, most_events=most_events)
        tasks = enumerate(pairwise(bounds), start=len(finished))
        num_samples = sum(chunk.num_samples for chunk in finished)
        for chunk, num_events in engine.in_order(_make_samples, tasks, context=gathering, workers=workers):
            finished.append(chunk)
            num_samples += chunk.num_samples
            advance(num_events, f"{num_samples:,} samples")
        store.mark_complete(_ANY_FILE, len(finished))
    return finished


def _make_samples(gathering: _Gathering, task: tuple[int, tuple[int, int]]) -> tuple[ParsedChunk, int]:
    """Make the samples of a stretch of owners; returns their chunk and the number of their events."""
    index, (start, stop) = task
    gathered = _read_owners(gathering.lines, gathering.events, start, stop)
    samples = gathering.source.make_samples(gathered)
    chunk = ParsedChunk(
        file_index=_ANY_FILE,
        block_index=index,
        num_lines=0,
        num_samples=samples.height,
        num_rejected=0,
        end=stop,
        day_counts=_count_days(samples, _ANY_FILE),
    )
    dense = [dense_name(number) for number in range(gathering.source.num_dense)]
    gathering.store.write(chunk, samples, [], dense)
    return chunk, gathered.height


def _find_bounds(
    source: GroupingSource, lines: Sequence[ParsedChunk], events: ParsedStore, *, first: int, most_events: int
) -> list[int]:
    """Owners that stretches begin with, from `first` on, and at the end one above the last owner.

    A stretch has whole groups only, so it may have more than `most_events` events when its last group is large.
    """
    heads, last = np.empty(0, np.uint64), first
    for chunk in lines:
        if chunk.num_samples:
            owners = _owners(events, chunk)
            distinct = np.unique(owners)
            heads = np.union1d(heads, distinct[source.begins_group(distinct)])
            last = max(last, int(owners[-1]) + 1)
    heads = heads[heads > first]
    # how many events from `first` on stand before each head, over all chunks
    before = np.zeros(len(heads), np.int64)
    for chunk in lines:
        if chunk.num_samples:
            owners = _owners(events, chunk)
            before += np.searchsorted(owners, heads) - np.searchsorted(owners, np.uint64(first))
    bounds, taken = [first], 0
    for head, count in zip(heads.tolist(), before.tolist(), strict=True):
        if count - taken >= most_events:
            bounds.append(head)
            taken = count
    return [*bounds, last] if last > first else bounds


def _owners(events: ParsedStore, chunk: ParsedChunk) -> np.ndarray:
    return events.open(chunk, [OWNER]).column(OWNER).to_numpy().astype(np.uint64, copy=False)  # type: ignore[no-any-return]


def _read_owners(lines: Sequence[ParsedChunk], events: ParsedStore, start: int, stop: int) -> pl.DataFrame:
    """All events of the owners start..stop-1, chunk after chunk; each chunk has them side by side."""
    pieces = []
    for chunk in lines:
        if chunk.num_samples:
            owners = _owners(events, chunk)
            low, high = np.searchsorted(owners, np.array([start, stop], np.uint64))
            if high > low:
                piece = pl.from_arrow(events.open(chunk).slice(low, high - low))
                assert isinstance(piece, pl.DataFrame)
                # each chunk holds numbers in as few bytes as it can
                pieces.append(piece.with_columns(pl.col(OWNER).cast(pl.UInt64), pl.exclude(OWNER).cast(pl.Int64)))
    return pl.concat(pieces)
