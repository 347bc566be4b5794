"""What a model needs to read raw lines: the source, the vocabularies, the transforms, as its folder describes them.

Shape suffixes: n samples, F looked-up columns.
"""

from __future__ import annotations

import filecmp
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from slipstream.dataset_schema import TableLayout
from slipstream.datasets.registry import SOURCES
from slipstream.datasets.source import Source, SourceOptions
from slipstream.errors import ArtifactError
from slipstream.io.artifacts import Artifact, link_or_copy
from slipstream.io.figures import PreprocessFigures
from slipstream.io.lookups import lookup_path, open_lookup
from slipstream.ops.dense import DenseEncoding
from slipstream.ops.vocabulary import RowLookup, hash_to_buckets
from slipstream.schema import MISSING_ID, OOV_ROW, dense_name, table_name


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """How raw lines became samples: what preprocess was told, and what it learnt from the training split."""

    source: str
    """Name of the raw format."""
    max_ind_range: int
    """Raw ids were taken modulo this number; 0 kept them."""
    history_length: int | None
    """Past events in a sample, for sources of sequences."""
    points_per_user: int | None
    """Positive samples of one user at most, for sources of sequences."""
    dense_transform: str
    """Transform of dense columns."""
    dense_minima: list[int]
    """Smallest training value of each dense column, for the transform that shifts by it; empty for others."""
    num_buckets: dict[str, int]
    """Tables whose raw ids are hashed, and into how many buckets."""
    columns: dict[str, str] = field(default_factory=dict)
    """What columns such as `cat_3` are called where the data come from."""
    layout: dict[str, Any] | None = None
    """How the lines of source `table` are read: see `TableLayout`, names of fields filled in."""
    dense_means: list[float] | None = None
    """Mean of each dense column's logarithms in the training split, for the transform that subtracts it."""
    dense_deviations: list[float] | None = None
    """Their standard deviation, for the transform that divides by it."""
    flagged_columns: list[int] | None = None
    """Dense columns, by number, whose missing values have a column of flags each."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for model.json; without the fields that came later where they say nothing."""
        said_nothing = {spec.name for spec in fields(self) if spec.default is None and getattr(self, spec.name) is None}
        return {name: value for name, value in asdict(self).items() if name not in said_nothing}

    def dense(self, num_columns: int) -> DenseEncoding:
        """Say how the dense columns of a source, so many, are encoded."""
        return DenseEncoding(
            transform=self.dense_transform,
            num_columns=num_columns,
            minima=self.dense_minima,
            means=self.dense_means or (),
            deviations=self.dense_deviations or (),
            flagged=self.flagged_columns or (),
        )


def describe_encoding(processed: Artifact) -> Encoding:
    """Say how the samples of a preprocess artifact were encoded."""
    config, encoded = processed.manifest["config"], PreprocessFigures.of(processed)
    own = {name: limits.get("num_buckets") for name, limits in config["tables"].items()}
    buckets = {name: config["num_buckets"] if own.get(name) is None else own[name] for name in encoded.rows_per_table}
    return Encoding(
        source=config["source"],
        max_ind_range=config["max_ind_range"],
        history_length=config.get("history_length"),
        points_per_user=config.get("points_per_user"),
        dense_transform=config["dense_transform"],
        dense_minima=encoded.dense_minima or [],
        num_buckets={name: number for name, number in buckets.items() if number},
        columns=encoded.columns or {},
        layout=config["layout"] | {"names": encoded.fields} if "layout" in config else None,
        dense_means=encoded.dense_means,
        dense_deviations=encoded.dense_deviations,
        flagged_columns=encoded.flagged_columns,
    )


def write_vocabularies(processed: Artifact, folder: Path) -> None:
    """Give a model's folder the vocabularies of the samples it was trained on.

    They are links to the files of preprocess where the file system has links: a published artifact never changes.

    Raises:
        ArtifactError: A vocabulary is missing or altered.
    """
    for table in PreprocessFigures.of(processed).rows_per_table:
        for name in (f"vocab/{table}.parquet", f"vocab/{table}.lookup.arrow"):
            if name not in processed.manifest["outputs"]:
                raise ArtifactError(
                    f"`{processed.path}` lacks {name}: it was made by an older slipstream",
                    hint="run `slipstream preprocess --force`, then go on",
                )
            link_or_copy(processed.check(processed.path / name), folder / name)


class Encoder:
    """Turns parsed lines into what a model reads.

    Args:
        folder: Folder of the model; its `vocab/` is mapped into memory.
        description: What its model.json says.

    Raises:
        ArtifactError: The folder does not say how lines are encoded, or lacks a vocabulary.
    """

    def __init__(self, folder: Path, description: Mapping[str, Any]) -> None:
        if "encoding" not in description:
            raise ArtifactError(
                f"the model in `{folder}` does not say how raw lines are encoded: it lacks `encoding` and `vocab/`",
                hint="it was made by an older slipstream; train it again, or predict from encoded rows",
            )
        self._folder = folder
        self.encoding = Encoding(**description["encoding"])
        self.source = _build_source(self.encoding)
        self._dense = self.encoding.dense(self.source.num_dense)
        self._tables: list[str] = description["column_tables"]
        self._lookups: dict[str, RowLookup] = {
            name: open_lookup(lookup_path(folder, name)) for name in dict.fromkeys(self._tables)
        }

    def encodes_like(self, other: Encoder) -> bool:
        """Whether another encoder makes the same of the same samples: vocabularies are one file, or files alike."""
        if self.encoding != other.encoding or self._tables != other._tables:
            return False
        pairs = [(lookup_path(self._folder, name), lookup_path(other._folder, name)) for name in self._lookups]
        return all(mine.samefile(theirs) or _is_alike(mine, theirs) for mine, theirs in pairs)

    def encode(self, parsed: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """Encode samples.

        Args:
            parsed: Columns `int_*` and `cat_*` as `Source.parse` gives them.

        Returns:
            (dense values (n, dense columns) float32, rows (n, F) int64).
        """
        dense = np.empty((self._dense.width, parsed.height), np.float32)
        for index in range(self.source.num_dense):
            dense[index] = self._dense.encode(index, parsed.get_column(dense_name(index)).fill_null(0).to_numpy())
        for place, index in enumerate(self._dense.flagged, start=self.source.num_dense):
            dense[place] = parsed.get_column(dense_name(index)).is_null().to_numpy()
        rows = np.empty((len(self._tables), parsed.height), np.int64)
        for index, table in enumerate(self._tables):
            raw_ids = parsed.get_column(table_name(index)).cast(pl.Int64).fill_null(MISSING_ID).to_numpy()
            rows[index] = self.rows_of(table, raw_ids)
        # filled column by column, then turned: a row at a time would jump through memory
        return np.ascontiguousarray(dense.T), np.ascontiguousarray(rows.T)

    def rows_of(self, table: str, raw_ids: np.ndarray) -> np.ndarray:
        """Rows of raw ids in a table; unknown ones get row 0.

        Args:
            table: Its name.
            raw_ids: As the source's parser gives them. Shape (n,), int64.

        Returns:
            Shape (n,), int32.

        Raises:
            ValueError: There is no such table.
        """
        if table not in self._lookups:
            raise ValueError(f"expected one of the tables {', '.join(self._lookups)}; found `{table}`")
        buckets = self.encoding.num_buckets.get(table, 0)
        # each distinct id is looked up once, and then stands for all its places: a few ids are most of the column
        encoded = pa.array(raw_ids).dictionary_encode()
        distinct = encoded.dictionary.to_numpy()
        rows: np.ndarray = self._lookups[table](hash_to_buckets(distinct, buckets) if buckets else distinct)
        places: np.ndarray = encoded.indices.to_numpy()
        return np.take(rows, places)

    def find_rows(self, table: str, raw_ids: Sequence[str]) -> np.ndarray:
        """Rows of raw ids as the source writes them; unknown ones get row 0. Shape (n,), int32.

        Raises:
            ValueError: There is no such table, or it hashes raw ids, so that their written form is not kept.
        """
        if table not in self._lookups or table in self.encoding.num_buckets:
            known = [name for name in self._lookups if name not in self.encoding.num_buckets]
            raise ValueError(f"expected a table with a vocabulary: {', '.join(known) or 'none'}; found `{table}`")
        vocabulary = pl.read_parquet(self._folder / "vocab" / f"{table}.parquet", columns=["raw_id", "row"])
        asked = pl.DataFrame({"raw_id": list(raw_ids)}, schema={"raw_id": pl.String})
        found = asked.join(vocabulary.drop_nulls(), on="raw_id", how="left", maintain_order="left")
        return found.get_column("row").fill_null(OOV_ROW).to_numpy(writable=True)


@cache
def _is_alike(first: Path, second: Path) -> bool:
    return filecmp.cmp(first, second, shallow=False)


def _build_source(encoding: Encoding) -> Source:
    sequences = {
        name: value for name in ("history_length", "points_per_user") if (value := getattr(encoding, name)) is not None
    }
    layout = TableLayout.from_json(encoding.layout) if encoding.layout else None
    options = SourceOptions(max_ind_range=encoding.max_ind_range, layout=layout, **sequences)
    return SOURCES.get(encoding.source)(options)
