"""The map raw id -> row of each table on disk, mapped into memory instead of read.

vocab/<table>.lookup.arrow    raw_id int64, ascending; row int32. Raw ids as the source's parser gives them, or buckets.

The Parquet file beside it says the same for people, with raw ids as the source writes them. This one takes 12 bytes a
row on disk and, while it is used, only the pages that look-ups touch, shared by all processes that use the model.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from slipstream.errors import ArtifactError
from slipstream.io.artifacts import write_atomically
from slipstream.ops.vocabulary import RowLookup

_SCHEMA = pa.schema({"raw_id": pa.int64(), "row": pa.int32()})


def write_lookup(path: Path, lookup: RowLookup) -> None:
    """Write the map of one table."""
    table = pa.table([lookup.sorted_raw_ids, lookup.rows], schema=_SCHEMA)
    with (
        write_atomically(path) as partial,
        pa.OSFile(str(partial), "wb") as sink,
        pa.ipc.new_file(sink, _SCHEMA) as out,
    ):
        out.write_table(table)


def open_lookup(path: Path) -> RowLookup:
    """Map the map of one table.

    Raises:
        ArtifactError: The file is missing or not such a map.
    """
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path), "rb")).read_all()
        if table.schema != _SCHEMA:
            raise ValueError(f"found columns {table.schema.names}")
    except (OSError, ValueError, pa.ArrowException) as exc:
        raise ArtifactError(
            f"expected the look-up of a table's raw ids at `{path}`: {exc}",
            hint="outputs of preprocess made before there was one need `slipstream preprocess --force`, then train",
        ) from exc
    # one record batch is written, so each column is one piece, and taking it copies nothing
    raw_ids, rows = (table.column(name).combine_chunks().to_numpy() for name in _SCHEMA.names)
    return RowLookup(sorted_raw_ids=raw_ids, rows=rows)


def lookup_path(folder: Path, table: str) -> Path:
    """Where the map of a table lies below a folder that has a `vocab/`."""
    return folder / "vocab" / f"{table}.lookup.arrow"
