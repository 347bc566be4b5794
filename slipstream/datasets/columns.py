"""Parquet columns as lines, so that one parser decides what is a sample whatever the container.

Columns are found by name: `label`, `int_0`…, `cat_0`… as TorchRec and this project write them, or `label`, `I1`…,
`C1`… as Criteo documents them. Dense columns may be integers, whole floats (what pandas makes of integers with gaps)
or text; sparse columns text or integers. Nulls and NaN are missing values.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl

from slipstream.errors import DataError
from slipstream.schema import LABEL, MISSING_ID, dense_name, table_name

_EXACT_FLOATS = 2.0**53


def columns_to_lines(
    frame: pl.DataFrame,
    *,
    num_dense: int,
    num_tables: int,
    format_raw_ids: Callable[[np.ndarray], pl.Series],
    largest_raw_id: int,
) -> bytes:
    """Write rows as tab-separated lines: label, dense columns, sparse columns.

    A value that no line can hold (a fraction, an id out of range, text with a tab) is written so that the parser
    rejects its line and nothing else.

    Args:
        frame: Columns as they were stored; others than the named ones are ignored.
        num_dense: Dense columns expected.
        num_tables: Sparse columns expected.
        format_raw_ids: Writes integer raw ids as the source does.
        largest_raw_id: The largest integer that may stand for a raw id.

    Raises:
        DataError: A column is missing, or holds neither numbers nor text.
    """
    label = _pick(frame, (LABEL,))
    dense = [_pick(frame, (dense_name(index), f"I{index + 1}")) for index in range(num_dense)]
    sparse = [_pick(frame, (table_name(index), f"C{index + 1}")) for index in range(num_tables)]
    text = [_number_text(column) for column in (label, *dense)]
    text += [
        _raw_id_text(column, format_raw_ids, largest_raw_id) if column.dtype.is_integer() else _plain_text(column)
        for column in sparse
    ]
    lines = pl.DataFrame([column.alias(str(index)) for index, column in enumerate(text)])
    return lines.write_csv(separator="\t", include_header=False, quote_style="never").encode()


def _pick(frame: pl.DataFrame, names: tuple[str, ...]) -> pl.Series:
    for name in names:
        if name in frame.columns:
            return frame.get_column(name)
    raise DataError(
        f"expected a Parquet column {' or '.join(f'`{name}`' for name in names)}, "
        f"found {', '.join(frame.columns[:6])}{', …' if frame.width > 6 else ''}",
        hint="columns are label, int_0…, cat_0… (or label, I1…, C1…)",
    )


def as_text(column: pl.Series) -> pl.Series:
    """Write a column as text, whole floats as the integers they stand for; nulls and NaN stay missing.

    Raises:
        DataError: It holds neither numbers nor text.
    """
    column = column.fill_nan(None) if column.dtype.is_float() else column
    _check_flat(column)
    if column.dtype == pl.Binary:
        return column.cast(pl.String, strict=False)
    if column.dtype.is_float():
        return _number_text(column)
    return column.cast(pl.String)


def _number_text(column: pl.Series) -> pl.Series:
    if not column.dtype.is_float():
        return _plain_text(column)
    value = pl.col("value")
    is_whole = (value == value.floor()) & (value.abs() < _EXACT_FLOATS)
    written = (
        pl.when(is_whole).then(value.cast(pl.Int64, strict=False).cast(pl.String)).otherwise(value.cast(pl.String))
    )
    return pl.DataFrame({"value": column.fill_nan(None)}).select(written).to_series()


def _raw_id_text(column: pl.Series, format_raw_ids: Callable[[np.ndarray], pl.Series], largest: int) -> pl.Series:
    in_range = column.is_between(0, largest).fill_null(value=True)
    if not in_range.all():
        written = _raw_id_text(column.zip_with(in_range, column.clear(1)), format_raw_ids, largest)
        return written.zip_with(in_range, column.cast(pl.String) + "?")
    return format_raw_ids(column.cast(pl.Int64).fill_null(MISSING_ID).to_numpy())


def _plain_text(column: pl.Series) -> pl.Series:
    _check_flat(column)
    if column.dtype == pl.Boolean:
        column = column.cast(pl.UInt8)
    if column.dtype == pl.Binary:
        column = column.cast(pl.String, strict=False)
    return column.cast(pl.String).str.replace_all(r"[\t\r\n]", "\ufffd")


def _check_flat(column: pl.Series) -> None:
    if column.dtype.is_nested():
        raise DataError(f"expected numbers or text in Parquet column `{column.name}`, found {column.dtype}")
