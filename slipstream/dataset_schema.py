"""Section `[dataset]` of a pipeline: where samples come from, and what the columns of a table of one's own are."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from slipstream.errors import ConfigError
from slipstream.options import build, later, require, to_dict
from slipstream.registry import ChoiceOf
from slipstream.schema import LABEL, Pooling

_RESERVED = re.compile(rf"{LABEL}|day|(cat|int)_.*")


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelRule:
    """A label that a number gives: 1 where a column reaches a value."""

    column: str
    """The column, of numbers."""
    at_least: float
    """Label 1 from this value on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ListColumn:
    """A column with several ids in a field, such as `Action|Comedy`; all of them have one embedding table."""

    separator: str = "|"
    """What stands between the values of a field. Values are taken as they are; empty ones are passed over."""
    length: int
    """Values that a sample keeps at most, the first ones; the report counts the lists that were longer."""
    pooling: Pooling = "mean"
    """How the rows of the values become one vector: `sum` or `mean`. That of an empty list is zero."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnsConfig:
    """Columns of source `table`, by the names in the header, in `dataset.names` or in the Parquet files."""

    label: str | LabelRule = ""
    """Column that holds 0 or 1 (or true, false); or a threshold, `{column = "rating", at_least = 4}`."""
    sparse: tuple[str, ...] = ()
    """Columns of ids, integers or text: each has an embedding table. An empty field is a value like any other."""
    dense: tuple[str, ...] = ()
    """Columns of numbers; an empty field and NaN count as 0, and values have the precision of float32."""
    lists: Mapping[str, ListColumn] = later({})
    """Columns with several ids in a field, by name: `{genres = {separator = "|", length = 6, pooling = "mean"}}`.
    Whatever order they are written in, they come after `sparse`, by name."""
    time: str = ""
    """Column that splits `by_day` and `by_time` go by: Unix time (seconds; milliseconds and finer are known by their
    size) or ISO text such as `2024-05-01T12:30:00Z`; in UTC where it names no zone."""
    period: Literal["day", "hour", "minute"] = "day"
    """Periods that `time` is counted in; `by_day` holds out the last, `by_time` as many as make up a seventh."""
    keep: tuple[str, ...] = ()
    """Columns that go to the Parquet parts of preprocess as they are, such as a key to join with."""

    def __post_init__(self) -> None:
        """Check names against each other."""
        for key in ("sparse", "dense", "keep"):
            twice = [name for name, count in Counter(getattr(self, key)).items() if count > 1]
            require(not twice, f"dataset.columns.{key}", "a list that names no column twice", twice)
        twice = [name for name in self.lists if name in self.sparse]
        require(not twice, "dataset.columns.lists", "columns that `sparse` does not name", twice)
        for name, column in self.lists.items():
            key = f"dataset.columns.lists.{name}"
            require(column.length >= 1, f"{key}.length", "at least 1", column.length)
            is_text = bool(column.separator) and not set(column.separator) & set("\r\n")
            require(is_text, f"{key}.separator", "text without line breaks", column.separator)
        if self.label_column in {*self.sparse, *self.dense, *self.lists}:
            raise ConfigError(
                f"`dataset.columns` has `{self.label_column}` both as label and as feature: a model would read off "
                "the answer",
                hint="take it out of `sparse`, `dense` and `lists`",
            )
        reserved = [name for name in self.keep if _RESERVED.fullmatch(name)]
        require(
            not reserved,
            "dataset.columns.keep",
            "free of label, day and names that begin with int_ or cat_, which are taken",
            reserved,
        )

    @property
    def label_column(self) -> str:
        """The column that the label is made of."""
        return self.label if isinstance(self.label, str) else self.label.column

    @property
    def used(self) -> list[str]:
        """Every column that is read, each once."""
        features = [*self.sparse, *self.dense, *sorted(self.lists)]
        return list(dict.fromkeys([self.label_column, *features, *([self.time] if self.time else []), *self.keep]))


@dataclass(frozen=True, kw_only=True, slots=True)
class TableLayout:
    """How the lines of a table are to be read."""

    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    """What each column is."""
    separator: str = ","
    """What stands between fields."""
    names: tuple[str, ...] = ()
    """Names of the fields of a line; empty where they are still to be taken from the files."""
    has_header: bool = True
    """Whether files begin with a line of names."""

    def __post_init__(self) -> None:
        """Check the separator and the names."""
        is_character = len(self.separator) == 1 and self.separator.isascii() and self.separator not in '"\r\n'
        require(is_character, "dataset.separator", "one ASCII character other than a quote", self.separator)
        twice = [name for name, count in Counter(self.names).items() if count > 1]
        require(not twice, "dataset.names", "a list without repetitions", twice)
        missing = [name for name in self.columns.used if self.names and name not in self.names]
        require(not missing, "dataset.columns", f"columns of `dataset.names` ({', '.join(self.names)})", missing)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for fingerprints and model.json."""
        return to_dict(self, execution=False)

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> TableLayout:
        """Read what `to_json` gave.

        Raises:
            ConfigError: It is something else.
        """
        return build(cls, plain, "layout.")

    def with_names(self, names: tuple[str, ...]) -> TableLayout:
        """Give the same with names of fields that were found in files."""
        return dataclasses.replace(self, names=names)


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetConfig:
    """Where samples come from."""

    source: Annotated[str, ChoiceOf("slipstream.datasets.registry:SOURCES")]
    """Format of the raw files."""
    raw: tuple[str, ...] = ()
    """Raw files: a path, a glob or a list of them, read in this order (globs in name order)."""
    num_samples: int = 100_000
    """Lines that `synthetic` writes."""
    num_days: int = 7
    """Days that `synthetic` spreads its lines over; popularity drifts from day to day."""
    max_ind_range: int = 0
    """Raw ids are taken modulo this number before they are counted, as DLRM does; 0 keeps them whole."""
    negative_keep_ratio: float = 1.0
    """Share of the training split's negatives that are kept, drawn by seed; test and validation stay whole."""
    history_length: int = 20
    """Past events in each sample of `taobao`; shorter histories are padded."""
    points_per_user: int = 10
    """Positive samples that `taobao` takes of one user at most; each has a negative beside it."""
    separator: str = ","
    """What stands between the fields of source `table`: one ASCII character."""
    names: tuple[str, ...] = ()
    """Names of the columns of source `table` where its text files have no header; empty takes their first line."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.num_samples >= 100, "dataset.num_samples", "at least 100", self.num_samples)
        require(self.num_days >= 1, "dataset.num_days", "at least 1", self.num_days)
        require(self.max_ind_range >= 0, "dataset.max_ind_range", "at least 0", self.max_ind_range)
        require(0 < self.negative_keep_ratio <= 1, "dataset.negative_keep_ratio", "in (0, 1]", self.negative_keep_ratio)
        require(self.history_length >= 1, "dataset.history_length", "at least 1", self.history_length)
        require(self.points_per_user >= 1, "dataset.points_per_user", "at least 1", self.points_per_user)
        if self.source != "synthetic" and not self.raw:
            raise ConfigError(
                f"`dataset.raw` must name the raw files of source `{self.source}`, found nothing",
                hint="set it in the pipeline file, or pass --set dataset.raw=/path/to/train.txt",
            )
        _check_table(self.source, self.columns, layout=self.layout, max_ind_range=self.max_ind_range)

    @property
    def layout(self) -> TableLayout:
        """How the lines of source `table` are to be read."""
        return TableLayout(columns=self.columns, separator=self.separator, names=self.names, has_header=not self.names)


def _check_table(source: str, columns: ColumnsConfig, *, layout: TableLayout, max_ind_range: int) -> None:
    """Check that a table's keys are there with source `table`, and with no other.

    Raises:
        ConfigError: They are not.
    """
    if source != "table":
        if layout != TableLayout():
            raise ConfigError(
                f"`dataset.columns`, `dataset.separator` and `dataset.names` are for source table, found "
                f"`dataset.source` = '{source}'",
                hint='leave them out, or set dataset.source = "table"',
            )
        return
    if not columns.label_column:
        raise ConfigError(
            "missing key `dataset.columns.label`",
            hint="source table must be told its columns; `slipstream init FILE` writes a pipeline that does",
        )
    require(bool(columns.sparse or columns.lists), "dataset.columns.sparse", "a list of at least one column", [])
    require(max_ind_range == 0, "dataset.max_ind_range", "left out with source table", max_ind_range)
