"""Any CSV or Parquet table: the pipeline says what its columns are, in `[dataset.columns]`.

Lines are CSV as Python's `csv` module reads it, but that a quoted field ends on its line. A file's header is found by
its names and counted as a rejected line, so that lines = samples + rejects. Parquet files are read by column names.

    int_0…  the dense columns as they were listed
    cat_0…  the sparse ones, then the first value of each list, lists by name; then their second and later values
    day     periods since 1970, of `time`

The raw id of a whole number from 0 up, written plainly, is that number; that of any other text is a negative 63-bit
hash of it, and what it stands for goes along. So 7 and "007" are two values, in integers and in text alike. Values of
a list are ids of the same kind; what a list has fewer of than it may is MISSING_ID.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import islice

import numpy as np
import polars as pl
import xxhash

from slipstream.dataset_schema import LabelRule, ListColumn, TableLayout
from slipstream.datasets.columns import as_text
from slipstream.datasets.source import ColumnarSource, ParsedBlock, SourceOptions
from slipstream.datasets.times import EXPECTED_TIME, count_periods
from slipstream.errors import DataError, did_you_mean
from slipstream.io.raw import is_parquet, read_blocks
from slipstream.ops.delimited import read_fields
from slipstream.ops.quoting import unquote
from slipstream.schema import LABEL, MISSING_ID, Bag, dense_name, table_name

_LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1, "False": 0, "True": 1, "FALSE": 0, "TRUE": 1}
_FIELD = rb'(?:"(?:[^"\n]|"")*"(?=%s|\r?$)|[^%s\n]*)'
_CR = b"\r"
_LOST = "\ufffd"
_LINE_BREAK = re.compile(r"\r\n|\n|\r")
_NO_LINE = "\r\u23ce"
"""Stands for a line break in a value: the carriage return makes `parse` reject it, for no line can hold it."""
_FIRST_BYTES, _FIRST_LINES = 1 << 18, 1000


class TableSource(ColumnarSource):
    """A table whose columns the pipeline declares.

    Args:
        layout: What its columns are, with the names of all fields of a line.
    """

    takes_fields_from_files = True

    def __init__(self, layout: TableLayout) -> None:
        self._layout, self._columns = layout, layout.columns
        self._lists = dict(sorted(layout.columns.lists.items()))
        self._bags = _make_bags(list(self._lists.values()), first=len(self._columns.sparse))
        field = _FIELD % ((re.escape(self.separator.encode()),) * 2)
        before = (field + re.escape(self.separator.encode())) * self.fields.index(self.label_field)
        self._before_label = re.compile(rb"^(?!\Z)" + before, re.MULTILINE)

    @property
    def num_dense(self) -> int:
        """Number of dense columns."""
        return len(self._columns.dense)

    @property
    def num_tables(self) -> int:
        """Number of sparse columns and lists."""
        return len(self._columns.sparse) + len(self._lists)

    @property
    def table_of_column(self) -> tuple[int, ...]:
        """One for each sparse column; one for all columns of a list."""
        table_of = {column: bag.columns[0] for bag in self._bags for column in bag.columns}
        num_columns = len(self._columns.sparse) + sum(len(bag.columns) for bag in self._bags)
        return tuple(table_of.get(column, column) for column in range(num_columns))

    @property
    def padded_tables(self) -> tuple[int, ...]:
        """Those of lists."""
        return tuple(bag.columns[0] for bag in self._bags)

    @property
    def bags(self) -> tuple[Bag, ...]:
        """The columns of each list."""
        return self._bags

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields of a line, in order."""
        return self._layout.names

    @property
    def separator(self) -> str:
        """What stands between fields."""
        return self._layout.separator

    @property
    def label_field(self) -> str:
        """Which of the fields is the label, or makes it."""
        return self._columns.label_column

    @property
    def extra_columns(self) -> tuple[str, ...]:
        """Columns that are passed on as they are."""
        return self._columns.keep

    @property
    def column_names(self) -> dict[str, str]:
        """Names in the files."""
        names = {dense_name(index): name for index, name in enumerate(self._columns.dense)}
        names |= {table_name(index): name for index, name in enumerate(self._columns.sparse)}
        for name, bag in zip(self._lists, self._bags, strict=True):
            later = {table_name(column): f"{name}[{place}]" for place, column in enumerate(bag.columns)}
            names |= later | {table_name(bag.columns[0]): name}
        return names

    def parse(self, data: bytes) -> ParsedBlock:
        """Turn whole lines into samples and rejects."""
        text, numbers, problems = self._read(data)
        bad = pl.repeat(False, text.height, dtype=pl.Boolean, eager=True)
        for _, _, is_bad in problems:
            bad |= is_bad
        rejected = bad.arg_true().to_numpy().astype(np.int64)
        if rejected.size:
            text, numbers = text.filter(~bad), numbers.filter(~bad)
        sparse: dict[int, pl.Series] = {}
        texts, counts = [], {}
        for index, name in enumerate(self._columns.sparse):
            raw_ids, stands_for = _find_raw_ids(text.get_column(name))
            sparse[index] = raw_ids
            texts.append(_name_texts(stands_for, index))
        for (name, column), bag in zip(self._lists.items(), self._bags, strict=True):
            found = _find_lists(text.get_column(name), column)
            sparse |= dict(zip(bag.columns, found.columns, strict=True))
            texts.append(_name_texts(found.texts, bag.columns[0]))
            counts[table_name(bag.columns[0])] = found.counts
        named = [sparse[index].alias(table_name(index)) for index in range(len(sparse))]
        kept = [text.get_column(name) for name in self._columns.keep]
        return ParsedBlock(
            samples=pl.DataFrame([*numbers.iter_columns(), *named, *kept]),
            rejected_lines=rejected,
            num_lines=bad.len(),
            lists=counts,
            texts=pl.concat(texts),
        )

    def explain(self, line: bytes) -> str:
        """Say why a line that `parse` rejected is no sample."""
        text, _, problems = self._read(line)
        if text.height == 0 or (not line.strip()):
            return f"expected {len(self.fields)} fields, found an empty line"
        for name, expected, is_bad in problems:
            if is_bad[0]:
                return expected if not name else f"{name}: expected {expected}, found {_show(text[name][0])}"
        return "not a sample line"

    def split(self, data: bytes) -> pl.DataFrame:
        """Give the fields of whole lines as text; quotes are gone, missing fields are null."""
        plain, separator = unquote(data, self.separator)
        return read_fields(plain, separator=separator, names=list(self.fields))[0]

    def lacks_label(self, line: bytes) -> bool:
        """Whether a line, the first of a file, is a header without the label, or has all fields but one.

        Raises:
            DataError: It is a header with other names, or the same in another order.
        """
        found = _split_line(line, self.separator)
        without = [name for name in self.fields if name != self.label_field]
        if found in (list(self.fields), without):
            return found == without
        lacks = len(found) == len(without)
        if self._layout.has_header and self.parse(self.add_label(line) if lacks else line).rejected_lines.size:
            raise DataError(
                f"expected a header {_list(self.fields)}, with or without `{self.label_field}`, or lines of such "
                f"fields; found {_list(found)}",
                hint="columns must have the names and the order that the model was trained with",
            )
        return lacks

    def add_label(self, data: bytes) -> bytes:
        """Put a label, 0, into every line at its place."""
        if self.fields.index(self.label_field) == len(self.fields) - 1:
            own = self.separator.encode()
            lines = data.removesuffix(b"\n").split(b"\n")
            return b"".join(line.removesuffix(b"\r") + own + b"0\n" for line in lines)
        return self._before_label.sub(lambda found: found[0] + b"0" + self.separator.encode(), data)

    def to_lines(self, columns: pl.DataFrame) -> bytes:
        """Write rows of a Parquet file as lines; columns that are not declared stay empty.

        Raises:
            DataError: A declared column is missing, or holds neither numbers, text nor times.
        """
        _require_columns(self._columns.used, columns.columns, "the Parquet columns")
        used = set(self._columns.used)
        joined = [_join_lists(columns.get_column(name), column) for name, column in self._lists.items()]
        columns = columns.with_columns(joined)
        text = [
            _write_column(columns.get_column(name), is_time=name == self._columns.time).alias(name)
            if name in used
            else pl.Series(name, [None], dtype=pl.String).new_from_index(0, columns.height)
            for name in self.fields
        ]
        return pl.DataFrame(text).write_csv(separator=self.separator, include_header=False).encode()

    def join(self, lines: Sequence[Sequence[str]]) -> bytes:
        """Write fields as lines, quoted where they must be; a line break within one makes `parse` reject the line."""
        stream = StringIO()
        writer = csv.writer(stream, delimiter=self.separator, lineterminator="\n")
        writer.writerows([_LINE_BREAK.sub(_NO_LINE, text) for text in line] for line in lines)
        return stream.getvalue().encode()

    def format_raw_ids(self, raw_ids: np.ndarray) -> pl.Series:
        """Write raw ids that are numbers; hashes come as `#` and their number, MISSING_ID as the empty string."""
        number = pl.col("raw_id")
        written = pl.when(number == MISSING_ID).then(pl.lit("")).when(number >= 0).then(number.cast(pl.String))
        return pl.DataFrame({"raw_id": raw_ids}).select(written.otherwise("#" + number.cast(pl.String))).to_series()

    def check_first_lines(self, file: str) -> None:
        """Look at the beginning of a file before the work starts.

        Raises:
            DataError: More than half of its first lines are no samples.
        """
        data = _first_block(file)
        if isinstance(data, pl.DataFrame):
            data = self.to_lines(data)
        lines = data.split(b"\n")[:_FIRST_LINES]
        parsed = self.parse(b"\n".join(lines))
        wrong = [at for at in parsed.rejected_lines.tolist() if not (at == 0 and self._layout.has_header)]
        if len(wrong) > parsed.num_lines / 2:
            reasons = [f"line {at + 1}: {self.explain(lines[at].removesuffix(_CR))}" for at in wrong[:3]]
            raise DataError(
                f"{len(wrong):,} of the first {parsed.num_lines:,} lines of `{file}` are no samples\n  "
                + "\n  ".join(reasons),
                hint="check `dataset.columns` and `dataset.separator` against these lines",
            )

    def _read(self, data: bytes) -> tuple[pl.DataFrame, pl.DataFrame, list[tuple[str, str, pl.Series]]]:
        """(fields as text, label and numbers, what may be wrong: field, what was expected, where it is not so)."""
        plain, separator = unquote(data, self.separator)
        text, sound = read_fields(plain, separator=separator, names=list(self.fields))
        problems = [("", "header line", self._is_header(text)), ("", self._explain_count(data), ~sound)]
        label, label_problem = self._read_label(text.get_column(self.label_field))
        columns = [label]
        problems.append((self.label_field, *label_problem))
        for index, name in enumerate(self._columns.dense):
            column = text.get_column(name)
            value = column.cast(pl.Float64, strict=False).fill_nan(None).cast(pl.Float32)
            is_bad = value.is_null() & column.is_not_null()
            if is_bad.any():
                is_bad &= column.str.to_lowercase() != "nan"
            problems.append((name, "a number", is_bad | value.is_infinite().fill_null(value=False)))
            columns.append(value.alias(dense_name(index)))
        if self._columns.time:
            periods = count_periods(text.get_column(self._columns.time), self._columns.period)
            problems.append((self._columns.time, EXPECTED_TIME, periods.is_null()))
            columns.append(periods.alias("day"))
        if _loses_text(plain):
            for name in dict.fromkeys([*self._columns.sparse, *self._lists, *self._columns.keep]):
                is_lost = text.get_column(name).str.contains(_LOST, literal=True).fill_null(value=False)
                problems.append((name, "UTF-8 text without line breaks", is_lost))
        return text, pl.DataFrame(columns), problems

    def _read_label(self, text: pl.Series) -> tuple[pl.Series, tuple[str, pl.Series]]:
        rule = self._columns.label
        if isinstance(rule, LabelRule):
            value = text.cast(pl.Float64, strict=False)
            is_bad = ~value.is_finite().fill_null(value=False)
            return (value >= rule.at_least).cast(pl.UInt8).alias(LABEL), ("a number", is_bad)
        label = text.replace_strict(_LABELS, default=None, return_dtype=pl.UInt8).alias(LABEL)
        return label, ("0 or 1", label.is_null())

    def _is_header(self, text: pl.DataFrame) -> pl.Series:
        """Which lines repeat the names; the label is left out of account, for lines that had none."""
        others = [name for name in self.fields if name != self.label_field]
        is_header = (text.get_column(others[0]) == others[0]).fill_null(value=not others[0])
        if self._layout.has_header and is_header.any():
            for name in others[1:]:
                is_header &= (text.get_column(name) == name).fill_null(value=not name)
            return is_header
        return pl.repeat(False, text.height, dtype=pl.Boolean, eager=True)

    def _explain_count(self, data: bytes) -> str:
        """Say what is wrong with the number of fields, where `data` is one line."""
        if data.count(b"\n") > 1 or len(data) > _FIRST_BYTES:
            return ""  # nobody asks
        if unquote(data, self.separator)[0].strip() == b"" and data.strip():
            return "a quoted field does not end on its line"
        return f"expected {len(self.fields)} fields, found {len(_split_line(data, self.separator))}"


def build(options: SourceOptions) -> TableSource:
    """Give the source for a pipeline's options; names of fields come from the files unless the layout has them.

    Raises:
        DataError: A file is empty, lacks a column, has one twice, or begins with lines that are no samples.
    """
    layout = options.layout
    assert layout is not None
    if not layout.names:
        layout = layout.with_names(_find_fields(layout, options.files))
    source = TableSource(layout)
    for file in options.files:
        source.check_first_lines(file)
    return source


def _find_fields(layout: TableLayout, files: Sequence[str]) -> tuple[str, ...]:
    """Names of the fields of a line, from the headers; with Parquet files alone, the columns that are used."""
    first: tuple[str, list[str]] | None = None
    for file in files:
        data = _first_block(file)
        if isinstance(data, pl.DataFrame):
            _require_columns(layout.columns.used, data.columns, f"`{file}`")
            continue
        found = _split_line(data.partition(b"\n")[0].removesuffix(b"\r"), layout.separator)
        twice = [name for name, count in Counter(found).items() if count > 1]
        if twice:
            raise DataError(
                f"the header of `{file}` names {_list(twice)} more than once",
                hint="rename one of them; for files without a header set `dataset.names`",
            )
        _require_columns(layout.columns.used, found, f"the header of `{file}`")
        first = first or (file, found)
        if found != first[1]:
            raise DataError(
                f"the headers of `{first[0]}` and `{file}` differ: {_list(first[1])}; {_list(found)}",
                hint="all files of a run must have the same columns in the same order",
            )
    return tuple(first[1] if first else layout.columns.used)


def _first_block(file: str) -> bytes | pl.DataFrame:
    block = next(read_blocks(file, file_index=0, block_bytes=_FIRST_BYTES), None)
    if block is None or (isinstance(block.data, bytes) and not block.data.strip()):
        kind = "rows" if is_parquet(file) else "lines"
        raise DataError(f"`{file}` has no {kind}", hint="check `dataset.raw`")
    return block.data


def _require_columns(wanted: Sequence[str], found: Sequence[str], where: str) -> None:
    for name in wanted:
        if name not in found:
            raise DataError(
                f"expected a column `{name}` in {where}, found {_list(found)}",
                hint=did_you_mean(name, found)
                or "check `dataset.columns` and `dataset.separator`; for files without a header set `dataset.names`",
            )


def _split_line(line: bytes, separator: str) -> list[str]:
    plain, mark = unquote(line, separator)
    return plain.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", "replace").split(mark)


def _find_raw_ids(text: pl.Series) -> tuple[pl.Series, pl.DataFrame]:
    """(raw ids of a column, and `raw_id`, `text` of those that are hashes). Each distinct value is looked at once."""
    encoded = text.to_arrow(compat_level=pl.CompatLevel.oldest()).dictionary_encode(null_encoding="encode")
    distinct = pl.Series("text", encoded.dictionary, dtype=pl.String)
    number = distinct.cast(pl.Int64, strict=False)
    is_number = ((number >= 0) & (number.cast(pl.String) == distinct)).fill_null(value=False)
    is_hashed = ~is_number & distinct.is_not_null()
    hashed = distinct.filter(is_hashed)
    hashes = np.array([xxhash.xxh3_64_intdigest(value.encode()) for value in hashed.to_list()], np.uint64)
    # ~(h >> 1) is -1 - (h >> 1): negative, so no number; the least of all is MISSING_ID, which its neighbour stands for
    negative = np.maximum(~(hashes >> np.uint64(1)).astype(np.int64), MISSING_ID + 1)
    raw_ids = np.full(len(distinct), MISSING_ID)
    raw_ids[is_number.to_numpy()] = number.filter(is_number).to_numpy()
    raw_ids[is_hashed.to_numpy()] = negative
    places = encoded.indices.to_numpy(zero_copy_only=False)
    return pl.Series(raw_ids[places]), pl.DataFrame({"raw_id": negative, "text": hashed})


@dataclass(frozen=True, slots=True)
class _Lists:
    """The lists of a column."""

    columns: list[pl.Series]
    """Raw ids of the first values, the second ones, …; MISSING_ID where a list has ended."""
    texts: pl.DataFrame
    """`raw_id` and `text` of the values that are hashes."""
    counts: dict[str, int]
    """As in `ParsedBlock.lists`."""


def _find_lists(text: pl.Series, column: ListColumn) -> _Lists:
    """Cut the fields of a column into values. Each distinct field is cut once."""
    encoded = text.to_arrow(compat_level=pl.CompatLevel.oldest()).dictionary_encode(null_encoding="encode")
    fields = pl.Series("value", encoded.dictionary, dtype=pl.String).fill_null("")
    field_of_sample = encoded.indices.to_numpy(zero_copy_only=False)
    values = pl.DataFrame([pl.Series("field", np.arange(len(fields))), fields.str.split(column.separator)])
    values = values.explode("value").filter(pl.col("value") != "")
    field_of_value = values.get_column("field").to_numpy()
    # values stand field by field, so a value's place in its list is its own number less that of the field's first value
    lengths = np.bincount(field_of_value, minlength=len(fields))
    places = np.arange(len(field_of_value)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    is_kept = places < column.length
    raw_ids, stands_for = _find_raw_ids(values.get_column("value").filter(pl.Series(is_kept)))
    of_field = np.full((column.length, len(fields)), MISSING_ID)
    of_field[places[is_kept], field_of_value[is_kept]] = raw_ids.to_numpy()
    samples_of_field = np.bincount(field_of_sample, minlength=len(fields))
    return _Lists(
        columns=[pl.Series(raw_ids_at[field_of_sample]) for raw_ids_at in of_field],
        texts=stands_for,
        counts={
            "values": int(samples_of_field @ np.minimum(lengths, column.length)),
            "empty": int(samples_of_field[lengths == 0].sum()),
            "cut": int(samples_of_field[lengths > column.length].sum()),
        },
    )


def _join_lists(column: pl.Series, lists: ListColumn) -> pl.Series:
    """Write nested lists as the fields of text files; columns of text stay as they are.

    Raises:
        DataError: A value holds the separator, so that no field could hold it.
    """
    if not isinstance(column.dtype, pl.List):
        return column
    lines = pl.DataFrame({"line": np.arange(len(column)), "value": column})
    one_by_one = lines.explode("value")
    values = as_text(one_by_one.get_column("value"))
    if values.str.contains(lists.separator, literal=True).any():
        raise DataError(
            f"a value of the lists in Parquet column `{column.name}` has the separator {lists.separator!r} in it",
            hint=f"set dataset.columns.lists.{column.name}.separator to a text that no value has",
        )
    together = one_by_one.with_columns(values).drop_nulls().group_by("line", maintain_order=True).agg("value")
    found = lines.select("line").join(together, on="line", how="left", maintain_order="left")
    return found.get_column("value").list.join(lists.separator).alias(column.name)


def _make_bags(lists: Sequence[ListColumn], *, first: int) -> tuple[Bag, ...]:
    """Give each list its columns: the first ones of all lists from number `first` on, then the others, list by list."""
    bags, later = [], first + len(lists)
    for index, column in enumerate(lists):
        others = range(later, later + column.length - 1)
        later = others.stop
        bags.append(Bag(columns=(first + index, *others), pooling=column.pooling))
    return tuple(bags)


def _name_texts(texts: pl.DataFrame, column: int) -> pl.DataFrame:
    return texts.select(pl.lit(table_name(column)).alias("column"), "raw_id", "text")


def _loses_text(data: bytes) -> bool:
    r"""Whether `read_fields` replaces something: a carriage return that ends no line, or what is no UTF-8."""
    if data.count(b"\r") != data.count(b"\r\n") + data.endswith(b"\r"):
        return True
    if data.isascii():
        return False
    try:
        data.decode()
    except UnicodeDecodeError:
        return True
    return False


def _write_column(column: pl.Series, *, is_time: bool) -> pl.Series:
    if column.dtype in (pl.Datetime, pl.Date) and is_time:
        column = column.dt.epoch("s")
    return as_text(column).str.replace_all(_LINE_BREAK.pattern, _NO_LINE)


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in islice(names, 30))
    return shown + (", …" if len(names) > 30 else "")


def _show(text: str | None) -> str:
    if text is None:
        return "nothing"
    return repr(text[:40]) + ("…" if len(text) > 40 else "")
