"""Maps from raw ids on disk, mapped into memory instead of read.

vocab/<table>.lookup.arrow    raw_id int64, ascending; row int32. Raw ids as the source's parser gives them, or buckets.
past/<column>.arrow           the same raw ids, those too rare for a row among them; count and clicks int64

The Parquet file beside the first says the same for people, with raw ids as the source writes them. It takes 12 bytes a
row on disk and, while it is used, only the pages that look-ups touch, shared by all processes that use the model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from slipstream.errors import ArtifactError
from slipstream.io.artifacts import write_atomically
from slipstream.ops.past import PastCounts
from slipstream.ops.vocabulary import RowLookup

_SCHEMA = pa.schema({"raw_id": pa.int64(), "row": pa.int32()})
_PAST_SCHEMA = pa.schema({"raw_id": pa.int64(), "count": pa.int64(), "clicks": pa.int64()})


def write_lookup(path: Path, lookup: RowLookup) -> None:
    """Write the map of one table."""
    _write(path, pa.table([lookup.sorted_raw_ids, lookup.rows], schema=_SCHEMA))


def open_lookup(path: Path) -> RowLookup:
    """Map the map of one table.

    Raises:
        ArtifactError: The file is missing or not such a map.
    """
    raw_ids, rows = _open(
        path,
        _SCHEMA,
        "the look-up of a table's raw ids",
        hint="outputs of preprocess made before there was one need `slipstream preprocess --force`, then train",
    )
    return RowLookup(sorted_raw_ids=raw_ids, rows=rows)


def write_past(path: Path, past: PastCounts) -> None:
    """Write what the training split had of each raw id of a column."""
    _write(path, pa.table([past.sorted_raw_ids, past.counts, past.clicks], schema=_PAST_SCHEMA))


def open_past(path: Path) -> PastCounts:
    """Map what the training split had of each raw id of a column.

    Raises:
        ArtifactError: The file is missing or not such a map.
    """
    raw_ids, counts, clicks = _open(path, _PAST_SCHEMA, "counts of a column's raw ids", hint="train the model again")
    return PastCounts(sorted_raw_ids=raw_ids, counts=counts, clicks=clicks)


def past_path(folder: Path, column: str) -> Path:
    """Where the counts of a column's raw ids lie below a folder that has a `past/`."""
    return folder / "past" / f"{column}.arrow"


def _write(path: Path, table: pa.Table) -> None:
    with (
        write_atomically(path) as partial,
        pa.OSFile(str(partial), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as out,
    ):
        out.write_table(table)


def _open(path: Path, schema: pa.Schema, what: str, *, hint: str) -> list[np.ndarray]:
    """Give the columns of a map, in order."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path), "rb")).read_all()
        if table.schema != schema:
            raise ValueError(f"found columns {table.schema.names}")
    except (OSError, ValueError, pa.ArrowException) as exc:
        raise ArtifactError(f"expected {what} at `{path}`: {exc}", hint=hint) from exc
    # one record batch is written, so each column is one piece, and taking it copies nothing
    return [table.column(name).combine_chunks().to_numpy() for name in schema.names]


def lookup_path(folder: Path, table: str) -> Path:
    """Where the map of a table lies below a folder that has a `vocab/`."""
    return folder / "vocab" / f"{table}.lookup.arrow"
