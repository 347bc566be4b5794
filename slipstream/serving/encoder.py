"""What a model needs to read raw lines: the source, the vocabularies, the transforms, as its folder describes them.

Shape suffixes: n samples, F looked-up columns.
"""

from __future__ import annotations

import filecmp
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache, cached_property
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from slipstream.dataset_schema import TableLayout
from slipstream.datasets.registry import SOURCES
from slipstream.datasets.source import GroupingSource, Source, SourceOptions
from slipstream.errors import ArtifactError, DataError, did_you_mean
from slipstream.io.artifacts import Artifact, hash_file, link_or_copy
from slipstream.io.figures import PreprocessFigures
from slipstream.io.lookups import lookup_path, open_lookup, open_past, past_path
from slipstream.io.model_folder import WEIGHTS
from slipstream.ops.dense import DenseEncoding
from slipstream.ops.past import PastCounts, PastEncoding, Seen
from slipstream.ops.vocabulary import RowLookup, hash_to_buckets
from slipstream.schema import MISSING_ID, OOV_ROW, dense_name, table_name

_FEW = 256
"""Ids that are looked up one by one sooner than their distinct ones are found."""


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
    past: dict[str, Any] | None = None
    """Dense columns of what was before each line, behind all others: fields of `PastEncoding`."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for model.json; without the fields that came later where they say nothing."""
        said_nothing = {spec.name for spec in fields(self) if spec.default is None and getattr(self, spec.name) is None}
        return {name: value for name, value in asdict(self).items() if name not in said_nothing}

    @property
    def num_added(self) -> int:
        """Dense columns that a model reads beside those of the source."""
        return len(self.flagged_columns or ()) + (PastEncoding(**self.past).width if self.past else 0)

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
        past=encoded.past,
    )


def write_vocabularies(processed: Artifact, folder: Path) -> None:
    """Give a model's folder the vocabularies of the samples it was trained on, and what was counted of the past.

    They are links to the files of preprocess where the file system has links: a published artifact never changes.

    Raises:
        ArtifactError: A vocabulary is missing or altered.
    """
    encoded = PreprocessFigures.of(processed)
    tables = encoded.rows_per_table
    columns = PastEncoding(**encoded.past).columns if encoded.past else []
    files = [lookup_path(Path(), table) for table in tables] + [Path(f"vocab/{table}.parquet") for table in tables]
    files += [past_path(Path(), table_name(column)) for column in columns]
    for name in map(Path.as_posix, files):
        if name not in processed.manifest["outputs"]:
            raise ArtifactError(
                f"`{processed.path}` lacks {name}: it was made by an older slipstream",
                hint="run `slipstream preprocess --force`, then go on",
            )
        link_or_copy(processed.check(processed.path / name), folder / name)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedValues:
    """Samples given by name, encoded; those that are none are left out."""

    dense: np.ndarray
    """Shape (n, dense columns), float32."""
    rows: np.ndarray
    """Shape (n, F), int64."""
    reasons: list[str | None]
    """Of each sample given, why it is none; None where it is one, so that n of them are None."""

    def spread(self, probabilities: Iterable[float]) -> list[float | None]:
        """Give every sample its probability, and None to what is no sample.

        Args:
            probabilities: Of the samples encoded, in order. Shape (n,).
        """
        left = iter(probabilities)
        return [next(left) if reason is None else None for reason in self.reasons]


class Encoder:
    """Turns parsed lines into what a model reads.

    Args:
        folder: Folder of the model; its `vocab/` and `past/` are mapped into memory.
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
        self._past = PastEncoding(**self.encoding.past) if self.encoding.past else None
        self._past_counts: dict[int, PastCounts] = {
            column: open_past(past_path(folder, table_name(column)))
            for column in (self._past.columns if self._past else ())
        }
        self._tables: list[str] = description["column_tables"]
        self._lookups: dict[str, RowLookup] = {
            name: open_lookup(lookup_path(folder, name)) for name in dict.fromkeys(self._tables)
        }

    def encodes_like(self, other: Encoder) -> bool:
        """Whether another encoder makes the same of the same samples: vocabularies are one file, or files alike."""
        if self.encoding != other.encoding or self._tables != other._tables:
            return False
        pairs = [(lookup_path(self._folder, name), lookup_path(other._folder, name)) for name in self._lookups]
        names = [table_name(column) for column in self._past_counts]
        pairs += [(past_path(self._folder, name), past_path(other._folder, name)) for name in names]
        return all(mine.samefile(theirs) or _is_alike(mine, theirs) for mine, theirs in pairs)

    def encode(self, parsed: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """Encode samples.

        Args:
            parsed: Columns `int_*` and `cat_*` as `Source.parse` gives them.

        Returns:
            (dense values (n, dense columns) float32, rows (n, F) int64).
        """
        dense = np.empty((self._dense.width, parsed.height), np.float32)
        # one expression for all columns: with a sample or two, calls cost more than values
        numbers = [dense_name(index) for index in range(self.source.num_dense)]
        for index, column in enumerate(parsed.select(pl.col(numbers).fill_null(0)).iter_columns()):
            dense[index] = self._dense.encode(index, column.to_numpy())
        for place, index in enumerate(self._dense.flagged, start=self.source.num_dense):
            dense[place] = parsed.get_column(dense_name(index)).is_null().to_numpy()
        if self._past:
            dense = np.concatenate([dense, self._look_back(self._past, parsed)])
        rows = np.empty((len(self._tables), parsed.height), np.int64)
        names = [table_name(index) for index in range(len(rows))]
        raw_ids = parsed.select(pl.col(names).cast(pl.Int64).fill_null(MISSING_ID)).iter_columns()
        for index, (table, column) in enumerate(zip(self._tables, raw_ids, strict=True)):
            rows[index] = self.rows_of(table, column.to_numpy())
        # filled column by column, then turned: a row at a time would jump through memory
        return np.ascontiguousarray(dense.T), np.ascontiguousarray(rows.T)

    @cached_property
    def field_names(self) -> dict[str, str]:
        """The field of a line by each of its names: the source's own, and `cat_0` where that is a field renamed."""
        own = self.source.fields
        return {name: name for name in own} | {
            column: field for column, field in self.encoding.columns.items() if field in own
        }

    @cached_property
    def weights_hash(self) -> str:
        """Hash of the model's weights. Its ONNX export bears it too, as metadata `slipstream.weights`."""
        return hash_file(self._folder / WEIGHTS)

    def encode_values(self, samples: Sequence[Mapping[str, object]]) -> EncodedValues:
        """Encode samples given by name, as programs that do not keep logs have them.

        Args:
            samples: Values of each sample by the names of the log's fields: text as the log would have it, or numbers.
                None, or a name that is left out, is a missing value. Labels are not looked at.

        Raises:
            DataError: There is no sample, one has a name that is no field or a value that is neither text, number nor
                None, or samples are made of several lines.
        """
        if isinstance(self.source, GroupingSource):
            raise DataError(
                f"source `{self.encoding.source}` makes a sample of several lines, found values of single ones"
            )
        if not samples:
            raise DataError("expected at least one sample, found none")
        lines = self.source.join([self._as_line(sample) for sample in samples])
        parsed = self.source.parse(lines)
        own = lines.split(b"\n")
        reasons: list[str | None] = [None] * len(samples)
        for at in parsed.rejected_lines.tolist():
            reasons[at] = self.source.explain(own[at])
        dense, rows = self.encode(parsed.samples)
        return EncodedValues(dense=dense, rows=rows, reasons=reasons)

    def _as_line(self, sample: object) -> list[str]:
        if not isinstance(sample, Mapping):
            raise DataError(f"expected a sample as values by name, found {sample!r}")
        found = {self._field_of(name): _as_text(name, value) for name, value in sample.items()}
        # `parse` wants a label, and none that is given matters
        return [found.get(name, "") if name != self.source.label_field else "0" for name in self.source.fields]

    def _field_of(self, name: str) -> str:
        if name not in self.field_names:
            raise DataError(
                f"expected values of the fields {', '.join(self.source.fields)}; found `{name}`",
                hint=did_you_mean(name, self.field_names) or "leave out what the log does not have",
            )
        return self.field_names[name]

    def _look_back(self, past: PastEncoding, parsed: pl.DataFrame) -> np.ndarray:
        """Dense columns of what the training split had of the lines' values. Shape (columns, n), float32."""
        seen: dict[int, Seen] = {}
        for column, known in self._past_counts.items():
            buckets = self.encoding.num_buckets.get(self._tables[column], 0)
            raw_ids = parsed.get_column(table_name(column)).cast(pl.Int64).fill_null(MISSING_ID).to_numpy()
            counts, clicks = known(hash_to_buckets(raw_ids, buckets) if buckets else raw_ids)
            seen[column] = Seen(counts=counts, clicks=clicks, lines=past.num_lines, all_clicks=past.num_clicks)
        found = [past.encode_counts(at, seen[column].counts) for at, column in enumerate(past.count_columns)]
        found += [
            past.encode_log_odds(at, seen[column].log_odds(past.prior)) for at, column in enumerate(past.target_columns)
        ]
        return np.stack(found)

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
        if len(raw_ids) <= _FEW:
            few: np.ndarray = self._lookups[table](hash_to_buckets(raw_ids, buckets) if buckets else raw_ids)
            return few
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


def _as_text(name: str, value: object) -> str:
    """Give a value as a log has it."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, Real):
        return str(value)
    raise DataError(f"expected text, a number or nothing for `{name}`, found {value!r}")


def _build_source(encoding: Encoding) -> Source:
    sequences = {
        name: value for name in ("history_length", "points_per_user") if (value := getattr(encoding, name)) is not None
    }
    layout = TableLayout.from_json(encoding.layout) if encoding.layout else None
    options = SourceOptions(max_ind_range=encoding.max_ind_range, layout=layout, **sequences)
    return SOURCES.get(encoding.source)(options)
