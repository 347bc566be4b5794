"""Lines whose samples take other lines of the same owner, in any order, in bounded memory.

    events    lines become events, each block sorted by owner, with the number of every line
    score     a stretch of owners at a time is gathered from all blocks: samples, probabilities
    place     probabilities go to the numbers of their lines, 4 bytes each in a file that is mapped into memory

Then the raw lines are read once more, in order, and get what has come of them. All but the last step is kept in files
beside the scores, so that a killed run goes on.

    <folder>/events/00000-000000.arrow    lines of a block by owner; the .json beside it is written last
    <folder>/scored/000000.parquet        `line` and `probability` of a stretch
    <folder>/probabilities.f32            of every line; NaN where it is no sample
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from slipstream.datasets.source import OWNER, GroupingSource, ParsedBlock
from slipstream.errors import DataError
from slipstream.io.artifacts import write_atomically, write_json
from slipstream.io.processors import usable_cores
from slipstream.io.raw import RawBlock, raw_size, read_blocks
from slipstream.ops.parallel import in_order
from slipstream.progress import Progress
from slipstream.serving.ensemble import Ensemble, average
from slipstream.serving.line_scorer import KeptFields, ScoredLines

_EVENTS_AT_ONCE = 1 << 16
"""Of a stretch, about: whole owners are taken."""
_SAMPLED = 256
"""One in so many events of a block is looked at to find where stretches end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """Events of a block."""

    num_lines: int
    end: int
    """Offset in the file's uncompressed stream just after the block."""


class GroupScorer:
    """Scores lines of a source that groups them.

    Args:
        models: One or more.
        source: Theirs.
        files: Raw files, in order, that can be read twice; all of them are one log.
        folder: Where to keep what is between lines and their probabilities.
        keep: Columns to pass on.
        block_bytes: Text parsed at once.
        progress: Told how far it is.

    Raises:
        ConfigError: A column to keep is none of the source's.
        DataError: A file is no text.
    """

    def __init__(
        self,
        models: Ensemble,
        source: GroupingSource,
        *,
        files: Sequence[str],
        folder: Path,
        keep: Sequence[str],
        block_bytes: int,
        progress: Progress,
    ) -> None:
        self._models, self._source, self._folder = models, source, folder
        self._block_bytes, self._progress = block_bytes, progress
        self._kept = KeptFields(models.encoder, keep)
        self._first_lines = np.concatenate([[0], np.cumsum(self._read_events(files))])
        self._score_stretches()
        self._probabilities = self._place()

    def is_labelled(self, block: RawBlock) -> bool:
        """Say that lines have no labels: what an event was chosen from is not in a log."""
        return False

    def score(self, block: RawBlock, *, is_labelled: bool) -> ScoredLines:
        """Say which lines of a block are none to score; `number` gives the others their probabilities."""
        parsed = self._parse(block)
        assert isinstance(block.data, bytes)
        own = block.data.split(b"\n")
        reasons: list[str | None] = [None] * parsed.num_lines
        for at in parsed.rejected_lines.tolist():
            reasons[at] = self._source.explain(own[at].removesuffix(b"\r"))
        lines = pl.DataFrame({"reason": pl.Series(reasons, dtype=pl.String)})
        return ScoredLines(lines=lines.hstack(self._kept.of(block.data)), num_samples=0)

    def number(self, scored: ScoredLines, *, file_index: int, first_line: int) -> ScoredLines:
        """Give lines their probabilities, once their numbers are known; `first_line` counts from 1."""
        start = int(self._first_lines[file_index]) + first_line - 1
        probability = pl.Series("probability", self._probabilities[start : start + scored.lines.height]).fill_nan(None)
        is_alone = probability.is_null() & scored.lines["reason"].is_null()
        why = pl.when(is_alone).then(pl.lit(self._source.nothing_before)).otherwise("reason").alias("reason")
        label = pl.lit(None, pl.UInt8).alias("_label")
        lines = scored.lines.select(probability, why, label, pl.exclude("reason"))
        return ScoredLines(lines=lines, num_samples=len(probability) - probability.null_count())

    # --- lines to events ---

    def _read_events(self, files: Sequence[str]) -> list[int]:
        """Lines of each file."""
        counts, before = [], 0
        with self._progress.task("events", sum(map(raw_size, files)), "B") as advance:
            for index, file in enumerate(files):
                parts = list(self._finished(index))
                advance(raw_size(file) if self._is_complete(index) else 0, "")
                lines = sum(part.num_lines for part in parts)
                if not self._is_complete(index):
                    blocks = read_blocks(
                        file,
                        file_index=index,
                        block_bytes=self._block_bytes,
                        skip=parts[-1].end if parts else 0,
                        skip_blocks=len(parts),
                    )
                    read = 0
                    for block, parsed in in_order(lambda one: (one, self._parse(one)), blocks, usable_cores() + 1):
                        self._write_events(block, parsed, first_line=before + lines)
                        lines += parsed.num_lines
                        advance(block.stored - read, f"{lines:,} lines")
                        read = block.stored
                    write_json(self._complete_path(index), {"lines": lines})
                counts.append(lines)
                before += lines
        return counts

    def _parse(self, block: RawBlock) -> ParsedBlock:
        if not isinstance(block.data, bytes):
            raise DataError("this model's source reads text only, found columns", hint="give its lines")
        return self._source.parse_lines(block.data)

    def _write_events(self, block: RawBlock, parsed: ParsedBlock, *, first_line: int) -> None:
        stem = self._folder / "events" / f"{block.file_index:05d}-{block.block_index:06d}"
        table = parsed.samples.with_columns(pl.col("line") + first_line).to_arrow()
        with (
            write_atomically(stem.with_suffix(".arrow")) as path,
            pa.OSFile(str(path), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as out,
        ):
            out.write_table(table)
        write_json(stem.with_suffix(".json"), asdict(_Part(num_lines=parsed.num_lines, end=block.end)))

    def _finished(self, file_index: int) -> Iterator[_Part]:
        number = 0
        while (path := self._folder / "events" / f"{file_index:05d}-{number:06d}.json").exists():
            yield _Part(**json.loads(path.read_text(encoding="utf-8")))
            number += 1

    def _complete_path(self, file_index: int) -> Path:
        return self._folder / "events" / f"{file_index:05d}.complete"

    def _is_complete(self, file_index: int) -> bool:
        return self._complete_path(file_index).exists()

    # --- events to probabilities ---

    def _score_stretches(self) -> None:
        paths = sorted((self._folder / "events").glob("*.arrow"))
        parts = [pa.ipc.open_file(pa.memory_map(str(path), "rb")).read_all() for path in paths]
        owners = [part.column(OWNER).combine_chunks().to_numpy() for part in parts]
        bounds = _find_bounds(owners)
        with self._progress.task("score", sum(map(len, owners)), "lines") as advance:

            def score(task: tuple[int, tuple[int, int]]) -> tuple[Path, pl.DataFrame | None, int]:
                number, (start, stop) = task
                path = self._folder / "scored" / f"{number:06d}.parquet"
                ends = [np.searchsorted(own, np.array([start, stop], np.uint64)) for own in owners]
                count = sum(int(high - low) for low, high in ends)
                if path.exists():
                    return path, None, count
                pieces = [part.slice(low, high - low) for part, (low, high) in zip(parts, ends, strict=True)]
                gathered = pl.from_arrow(pa.concat_tables(pieces))
                assert isinstance(gathered, pl.DataFrame)
                samples, line = self._source.make_line_samples(gathered)
                probability = average(self._models.predict_each(samples))
                return path, pl.DataFrame({"line": line, "probability": probability}), count

            for path, scored, count in in_order(score, enumerate(pairwise(bounds)), usable_cores()):
                if scored is not None:
                    with write_atomically(path) as partial:
                        scored.write_parquet(partial, statistics=False)
                advance(count, "")

    def _place(self) -> np.ndarray:
        """Probabilities by the number of their line, mapped into memory; NaN where there is none."""
        path, num_lines = self._folder / "probabilities.f32", int(self._first_lines[-1])
        if not num_lines:
            return np.empty(0, np.float32)
        placed: np.ndarray = np.memmap(path, np.float32, mode="w+", shape=(num_lines,))
        placed[:] = np.nan
        for part in sorted((self._folder / "scored").glob("*.parquet")):
            scored = pl.read_parquet(part)
            placed[scored["line"].to_numpy()] = scored["probability"].to_numpy()
        return placed


def _find_bounds(owners: Sequence[np.ndarray]) -> list[int]:
    """Owners that stretches begin with, and at the end one above the last.

    Each of the sampled owners stands for `_SAMPLED` events of its block, so stretches are about equally long, whatever
    the order of lines; one longer than asked has few owners, each with many lines.
    """
    if not any(map(len, owners)):
        return []
    sampled = np.sort(np.concatenate([own[::_SAMPLED] for own in owners]))
    inner = np.unique(sampled[:: _EVENTS_AT_ONCE // _SAMPLED])[1:]
    first = min(int(own[0]) for own in owners if len(own))
    last = max(int(own[-1]) for own in owners if len(own))
    return [first, *(bound for bound in inner.tolist() if bound > first), last + 1]
