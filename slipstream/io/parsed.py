"""Parsed chunks: the numbers of one block of raw lines, kept until every count is known.

00000-000000.arrow              samples, sparse columns dictionary-encoded (see README.md)
00000-000000.rejects.parquet    rejected lines, only where there are any
00000-000000.texts.parquet      what raw ids stand for, only where they do not say it themselves
00000-000000.json               written last: the chunk is whole; holds the hashes of its files
00000.json                      written after the file's last chunk: the file is whole

They depend on the raw files and the source alone, so they outlive the run that made them: another vocabulary limit or
split goes on from them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from slipstream.errors import ArtifactError
from slipstream.io.artifacts import hash_file, write_atomically, write_json
from slipstream.schema import MISSING_ID

FORMAT = 2
"""Of chunks: those of another format are not read. 2: says which dense values were missing."""
_SAMPLES, _REJECTS, _TEXTS = ".arrow", ".rejects.parquet", ".texts.parquet"
_REJECT_SCHEMA = pa.schema({"position": pa.int64(), "reason": pa.string(), "content": pa.binary()})


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedChunk:
    """What is known of one chunk without opening it."""

    file_index: int
    block_index: int
    num_lines: int
    num_samples: int
    num_rejected: int
    end: int
    """Offset in the file's uncompressed stream just after the chunk."""
    day_counts: dict[str, int]
    """Samples per day; one entry, the file index, where the source has no day column."""
    stored: int = 0
    """Bytes of the file, as it is stored, that were read up to here."""
    lists: dict[str, dict[str, int]] = field(default_factory=dict)
    """What it has of lists: see `ParsedBlock.lists`."""


class ParsedStore:
    """A folder of parsed chunks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(
        self,
        chunk: ParsedChunk,
        samples: pl.DataFrame,
        rejects: list[tuple[int, str, bytes]],
        dense: list[str],
        texts: pl.DataFrame | None = None,
    ) -> None:
        """Keep a chunk.

        Args:
            chunk: Its figures.
            samples: Its samples; every column that starts with `cat_` is dictionary-encoded.
            rejects: (position in the chunk, reason, line) of each rejected line.
            dense: Dense columns; missing values become 0, in as few bytes as hold them, and it is noted which.
            texts: What raw ids stand for: see `ParsedBlock.texts`.
        """
        stem = self._stem(chunk.file_index, chunk.block_index)
        with write_atomically(stem.with_suffix(_SAMPLES)) as path:
            table = _encode(samples, dense)
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
        if rejects:
            columns = [
                pa.array(column, type=kind)
                for column, kind in zip(zip(*rejects, strict=True), _REJECT_SCHEMA.types, strict=True)
            ]
            with write_atomically(stem.with_suffix(_REJECTS)) as path:
                pq.write_table(pa.Table.from_arrays(columns, schema=_REJECT_SCHEMA), path)
        if texts is not None:
            with write_atomically(stem.with_suffix(_TEXTS)) as path:
                texts.write_parquet(path, compression="zstd", statistics=False)
        is_written = {_SAMPLES: True, _REJECTS: bool(rejects), _TEXTS: texts is not None}
        written = [stem.with_suffix(suffix) for suffix, is_there in is_written.items() if is_there]
        hashes = {path.name: hash_file(path) for path in written}
        write_json(stem.with_suffix(".json"), {"chunk": asdict(chunk), "xxh3": hashes})

    def finished(self, file_index: int) -> list[ParsedChunk]:
        """Chunks of a file that are whole and unaltered, from the first on without a gap; later ones are removed."""
        chunks = self.whole_from(file_index, 0)
        for path in self._folder.glob(f"{file_index:05d}-*"):
            if int(path.name[6:12]) >= len(chunks):
                path.unlink()
        return chunks

    def whole_from(self, file_index: int, block_index: int) -> list[ParsedChunk]:
        """Chunks of a file that are whole and unaltered, from one on without a gap."""
        chunks: list[ParsedChunk] = []
        while (chunk := self._read(self._stem(file_index, block_index + len(chunks)).with_suffix(".json"))) is not None:
            chunks.append(chunk)
        return chunks

    def remove_half_written(self) -> None:
        """Remove what killed processes left in the middle of writing."""
        for path in self._folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)

    def mark_complete(self, file_index: int, num_chunks: int) -> None:
        """Say that a file has no further chunks."""
        write_json(self._folder / f"{file_index:05d}.json", {"num_chunks": num_chunks})

    def is_complete(self, file_index: int, num_chunks: int) -> bool:
        """Whether a file was read to its end, and that many chunks are all it has."""
        try:
            said = json.loads((self._folder / f"{file_index:05d}.json").read_text(encoding="utf-8"))
            return bool(said["num_chunks"] == num_chunks)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _read(self, path: Path) -> ParsedChunk | None:
        """Say what is known of a chunk; None where it is missing or damaged, or its files are not what was written."""
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            if any(hash_file(self._folder / name) != digest for name, digest in said["xxh3"].items()):
                return None
            return ParsedChunk(**said["chunk"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def open(self, chunk: ParsedChunk, columns: list[str] | None = None) -> pa.Table:
        """Map columns of a chunk, None for all, into memory; nothing is copied until it is used."""
        path = self._stem(chunk.file_index, chunk.block_index).with_suffix(_SAMPLES)
        try:
            source = pa.memory_map(str(path), "rb")
        except OSError as exc:
            raise ArtifactError(f"expected a parsed chunk at `{path}`", hint="run again: it is made anew") from exc
        table = pa.ipc.open_file(source).read_all()
        return table if columns is None else table.select(columns)

    def missing(self, chunk: ParsedChunk, column: str) -> np.ndarray | None:
        """Which values of a dense column were missing, and became 0; None where none was. Shape (n,), bool."""
        table, name = self.open(chunk), _missing_name(column)
        return table.column(name).to_numpy() if name in table.column_names else None

    def rejects(self, chunk: ParsedChunk) -> pl.DataFrame:
        """Rejected lines of a chunk: position, reason, content."""
        path = self._stem(chunk.file_index, chunk.block_index).with_suffix(_REJECTS)
        return pl.from_arrow(pq.read_table(path))  # type: ignore[return-value]

    def texts(self, chunks: Sequence[ParsedChunk], columns: Sequence[str]) -> pl.DataFrame:
        """Say what raw ids of sparse columns stand for: `raw_id`, `text`, each pair once; empty where they say it."""
        stems = [self._stem(chunk.file_index, chunk.block_index) for chunk in chunks]
        paths = [path for path in (stem.with_suffix(_TEXTS) for stem in stems) if path.exists()]
        found = pl.DataFrame(schema={"raw_id": pl.Int64, "text": pl.String})
        for path in paths:
            piece = pl.read_parquet(path).filter(pl.col("column").is_in(columns)).select("raw_id", "text")
            found = pl.concat([found, piece]).unique()
        return found

    def _stem(self, file_index: int, block_index: int) -> Path:
        return self._folder / f"{file_index:05d}-{block_index:06d}"


def dictionary_of(table: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    """(distinct raw ids int64, code of each sample, an integer) of a sparse column of a mapped chunk."""
    array = table.column(column)
    array = array.chunk(0) if array.num_chunks == 1 else array.combine_chunks()
    return array.dictionary.to_numpy(zero_copy_only=False), array.indices.to_numpy(zero_copy_only=False)


def _encode(samples: pl.DataFrame, dense: list[str]) -> pa.Table:
    columns, missing = {}, {}
    for column in samples.rechunk().iter_columns():
        if column.name in dense:
            columns[column.name] = column.fill_null(0).shrink_dtype().to_arrow()
            if column.null_count():
                missing[_missing_name(column.name)] = column.is_null().to_arrow()
        elif column.name.startswith("cat_"):
            columns[column.name] = _encode_raw_ids(column.to_arrow())
        else:
            columns[column.name] = column.to_arrow()
    return pa.table(columns | missing)


def _missing_name(column: str) -> str:
    return f"{column}_is_missing"


def _encode_raw_ids(raw_ids: pa.Array) -> pa.DictionaryArray:
    """Each distinct raw id once, as int64, a missing one as MISSING_ID; and per sample the place it stands at."""
    encoded = raw_ids.dictionary_encode(null_encoding="encode")
    distinct = encoded.dictionary.cast(pa.int64()).fill_null(MISSING_ID)
    codes = encoded.indices.cast(_smallest_type(len(distinct)))
    return pa.DictionaryArray.from_arrays(codes, distinct)


def _smallest_type(num_codes: int) -> pa.DataType:
    return pa.uint8() if num_codes <= 1 << 8 else pa.uint16() if num_codes <= 1 << 16 else pa.int32()
