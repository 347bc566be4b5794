"""What a source is: the columns of a raw format, and how one block of its lines becomes numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import polars as pl

from slipstream.dataset_schema import TableLayout
from slipstream.ops.delimited import read_fields
from slipstream.schema import LABEL, Bag


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedBlock:
    """The samples of a block, and the lines that are none."""

    samples: pl.DataFrame
    """`label` UInt8; `int_*` Int32, Int64 or Float32, missing null; `cat_*` raw ids, integers within int64, missing
    null or MISSING_ID. Also `day`, Int64, where the format tells one, for splits by time; and the source's extra
    columns."""
    rejected_lines: np.ndarray
    """Positions of rejected lines in the block, ascending. Shape (R,), int64."""
    num_lines: int
    """Lines read: samples and rejects."""
    lists: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Of the first column of each bag: `values` of all samples, `empty` lists, and lists that were `cut` because they
    were longer than the bag has columns."""
    texts: pl.DataFrame | None = None
    """What raw ids stand for that do not say it themselves: `column` (`cat_0`…), `raw_id` Int64, `text` String, each
    pair once; None where `format_raw_ids` can write all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceOptions:
    """What a source may ask of the pipeline when it is made; each takes what concerns it."""

    files: Sequence[str] = ()
    """Raw files, in order."""
    seed: int = 0
    """Of whatever the source draws."""
    max_ind_range: int = 0
    """Raw ids are taken modulo this number; 0 keeps them."""
    history_length: int = 20
    """Past events in a sample, for sources of sequences."""
    points_per_user: int = 10
    """Positive samples of one user at most, for sources of sequences."""
    layout: TableLayout | None = None
    """What the columns are, for sources that are told."""


class Source(Protocol):
    """One raw format. Adding one is adding a module with a class like this to `slipstream.datasets`.

    Inherit from it: what a plain format needs is four members and three methods; the rest has defaults.
    """

    @property
    def num_dense(self) -> int:
        """Number of dense columns."""
        ...

    @property
    def num_tables(self) -> int:
        """Number of sparse columns."""
        ...

    @property
    def table_of_column(self) -> tuple[int, ...]:
        """The table that each sparse column looks up; a table bears the name of its first column.

        By default every column has a table of its own. The first `num_tables` columns must look up the tables
        0, 1, 2, … in this order; later ones may share them.
        """
        return tuple(range(self.num_tables))

    @property
    def padded_tables(self) -> tuple[int, ...]:
        """Tables where MISSING_ID stands for "nothing here": its row stays zero and is never updated."""
        return ()

    @property
    def bags(self) -> tuple[Bag, ...]:
        """Columns whose rows a model sees pooled, first columns ascending; their tables are padded."""
        return ()

    @property
    def extra_columns(self) -> tuple[str, ...]:
        """Columns of `ParsedBlock.samples` that go to the Parquet parts as they are."""
        return ()

    @property
    def column_names(self) -> Mapping[str, str]:
        """What columns such as `cat_3` are called where the data come from; empty when they have no names."""
        return {}

    def parse(self, data: bytes) -> ParsedBlock:
        """Turn whole lines into samples and rejects."""
        ...

    def explain(self, line: bytes) -> str:
        """Say why a line that `parse` rejected is no sample."""
        ...

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields of a line, in order, the label among them where lines have one."""
        return ()

    @property
    def label_field(self) -> str:
        """Which of the fields is the label."""
        return LABEL

    @property
    def separator(self) -> str:
        """What stands between fields."""
        return "\t"

    @property
    def takes_fields_from_files(self) -> bool:
        """Whether the files say what the fields are, so that a model must remember it."""
        return False

    def split(self, data: bytes) -> pl.DataFrame:
        """Give the fields of whole lines as text, named by `fields`; missing ones null. One row a line."""
        return read_fields(data, separator=self.separator, names=list(self.fields))[0]

    def join(self, lines: Sequence[Sequence[str]]) -> bytes:
        """Write fields as lines, in the order of `fields`: the opposite of `split`. Missing ones are empty.

        What would end a field or a line becomes U+FFFD, which makes `parse` reject that line and no other.
        """
        marks = re.compile(f"[{re.escape(self.separator)}\r\n]")
        return "".join(
            self.separator.join(marks.sub("\ufffd", text) for text in line) + "\n" for line in lines
        ).encode()

    def lacks_label(self, line: bytes) -> bool:
        """Whether a line, the first of a file, shows that its lines are samples but for their label."""
        return False

    def add_label(self, data: bytes) -> bytes:
        """Put a label, 0, into lines that lack it, each ended by a newline, so that `parse` takes them."""
        return data

    def format_raw_ids(self, raw_ids: np.ndarray) -> pl.Series:
        """Write raw ids as the source writes them; MISSING_ID as the empty string."""
        ...


@runtime_checkable
class ColumnarSource(Source, Protocol):
    """A raw format that others also store as Parquet columns."""

    def to_lines(self, columns: pl.DataFrame) -> bytes:
        """Write rows of a Parquet file as lines that `parse` accepts or rejects one by one."""
        ...


OWNER = "owner"
"""Column of events that says whose they are, UInt64; owners are laid out in ascending order."""


@runtime_checkable
class GroupingSource(Source, Protocol):
    """A raw format whose samples are made of several lines of one owner, wherever in the files these stand.

    Lines become events; all events of an owner are brought together on disk, whatever their order was; samples are
    made of whole groups of owners. They must depend on the events of a group alone, not on the order these come in.
    """

    def parse_events(self, data: bytes) -> ParsedBlock:
        """Turn whole lines into rejects and events; events stand in the place of samples, integers, by `OWNER`."""
        ...

    def begins_group(self, owners: np.ndarray) -> np.ndarray:
        """Whether a group begins with each of some owners, judged by the owner alone. Same shape, bool."""
        ...

    def make_samples(self, events: pl.DataFrame) -> pl.DataFrame:
        """Give samples of one or more whole groups, in the order of owners; events may stand in any order."""
        ...

    def parse_lines(self, data: bytes) -> ParsedBlock:
        """Turn whole lines into rejects and what is to be scored, by `OWNER`.

        As `parse_events`, with candidates, whose event is yet to come, and the column `line`, the position of each in
        `data`.
        """
        ...

    def make_line_samples(self, lines: pl.DataFrame) -> tuple[pl.DataFrame, np.ndarray]:
        """Give the sample that each line makes with the events of its owner before it.

        Args:
            lines: All of some owners, in any order, with any other number in `line`.

        Returns:
            Samples, and their `line`. Shape (n,), int64. Lines with no event before them have no sample.
        """
        ...

    @property
    def nothing_before(self) -> str:
        """Why a line that has nothing before it is no sample."""
        ...
