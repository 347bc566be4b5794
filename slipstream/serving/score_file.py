"""Scored lines on their way to one file: parts that survive a kill, then Parquet, CSV or JSON lines.

.<name>.partial/key.json              what is being scored; parts of anything else are thrown away
.<name>.partial/00000-000000.parquet  the lines of one block, without `file` and `line`, which its number tells
.<name>.partial/00000-000000.json     written last: the block is whole

One row for each line, in order: `file`, `line` (from 1), `probability` (null where the line is no sample), `reason`
(null where it is one), then the columns kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from slipstream.errors import ConfigError
from slipstream.io.artifacts import write_atomically, write_json

_EMPTY = pl.DataFrame(schema={"file": pl.String, "line": pl.Int64, "probability": pl.Float32, "reason": pl.String})
_PARTS = 2
"""Version of what parts hold."""
FORMATS = {".parquet": "Parquet", ".csv": "CSV", ".jsonl": "JSON lines", ".ndjson": "JSON lines"}
"""What the end of a file's name says of its format."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredBlock:
    """What is known of the scored lines of one block without opening them."""

    file_index: int
    block_index: int
    num_lines: int
    num_samples: int
    is_labelled: bool
    """Whether the lines of its file have labels."""
    end: int
    """Offset in the file's uncompressed stream just after the block."""


class ScoreFile:
    """A file of scored lines, written part by part.

    Args:
        path: The file; its suffix decides the format.
        key: What is being scored: parts that were left by another key are removed.
        files: Names of the files whose lines are scored.

    Raises:
        ConfigError: The suffix names no format.
    """

    def __init__(self, path: Path, *, key: Mapping[str, Any], files: Sequence[str]) -> None:
        if path.suffix not in FORMATS:
            raise ConfigError(
                f"expected --out to end in one of {', '.join(FORMATS)}, found `{path.name}`",
                hint="the end of the name decides the format",
            )
        self.path, self._files = path, list(files)
        key = {**key, "parts": _PARTS}
        self._folder = path.with_name(f".{path.name}.partial")
        known = self._folder / "key.json"
        if known.exists() and json.loads(known.read_text(encoding="utf-8")) != key:
            shutil.rmtree(self._folder)
        write_json(known, key)

    @property
    def work(self) -> Path:
        """Folder for what a scorer keeps until the file is whole."""
        return self._folder / "work"

    def finished(self, file_index: int) -> list[ScoredBlock]:
        """Blocks of a file that are whole, from the first on without a gap."""
        blocks: list[ScoredBlock] = []
        while (path := self._stem(file_index, len(blocks)).with_suffix(".json")).exists():
            blocks.append(ScoredBlock(**json.loads(path.read_text(encoding="utf-8"))))
        return blocks

    def add(self, block: ScoredBlock, lines: pl.DataFrame) -> None:
        """Keep the scored lines of a block.

        Args:
            block: Its figures.
            lines: One row a line; columns that begin with `_` do not get into the file.
        """
        stem = self._stem(block.file_index, block.block_index)
        with write_atomically(stem.with_suffix(".parquet")) as path:
            lines.write_parquet(path, compression="lz4", statistics=False)
        write_json(stem.with_suffix(".json"), asdict(block))

    def read(self, columns: list[str]) -> Iterator[pl.DataFrame]:
        """Columns of the parts, in order."""
        for part in self._parts():
            yield pl.read_parquet(part, columns=columns)

    def finish(self) -> None:
        """Join the parts into the file and remove them."""
        with write_atomically(self.path) as partial:
            if FORMATS[self.path.suffix] == "Parquet":
                self._join_parquet(partial)
            else:
                self._join_text(partial)
        shutil.rmtree(self._folder)

    def _join_parquet(self, path: Path) -> None:
        writer = None
        for lines in self._numbered():
            table = lines.to_arrow()
            writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table)
        if writer is None:
            _EMPTY.write_parquet(path)
        else:
            writer.close()

    def _join_text(self, path: Path) -> None:
        with path.open("wb") as stream:
            for number, lines in enumerate(self._numbered()):
                if FORMATS[self.path.suffix] == "CSV":
                    lines.write_csv(stream, include_header=number == 0)
                else:
                    lines.write_ndjson(stream)

    def _numbered(self) -> Iterator[pl.DataFrame]:
        """Lines of the parts, in order, as the file has them."""
        next_line = [1] * len(self._files)
        for part in self._parts():
            lines, index = without_hidden(pl.read_parquet(part)), int(part.stem.partition("-")[0])
            yield number_lines(lines, file=self._files[index], first_line=next_line[index])
            next_line[index] += lines.height

    def _parts(self) -> list[Path]:
        return sorted(self._folder.glob("*.parquet"))

    def _stem(self, file_index: int, block_index: int) -> Path:
        return self._folder / f"{file_index:05d}-{block_index:06d}"


def number_lines(lines: pl.DataFrame, *, file: str, first_line: int) -> pl.DataFrame:
    """Put `file` and `line` before the columns of scored lines, counted from `first_line`."""
    numbers = pl.int_range(first_line, first_line + lines.height, dtype=pl.Int64, eager=True)
    return lines.select(pl.lit(file).alias("file"), numbers.alias("line"), pl.all())


def without_hidden(lines: pl.DataFrame) -> pl.DataFrame:
    """Leave out columns that no file gets: those whose names begin with `_`."""
    return lines.select(name for name in lines.columns if not name.startswith("_"))
