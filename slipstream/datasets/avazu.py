"""Avazu click logs: `train.csv` of the Kaggle competition.

A file begins with a header; then lines of 24 fields with commas between: id, click, hour (YYMMDDHH), C1, banner_pos,
fields of site, app and device, C14 to C21. Ids of sites, apps and devices are 8 hex digits, the others integers; all of
them are names, none a quantity, so all are sparse columns, as in BARS and FuxiCTR. From `hour` come two more, hour
of day and weekday. The hour of day is also the one dense column: models such as DLRM need one, and Slipstream's
reader has one too. The date goes to `day`, so that split `by_day` holds out the last of the ten days, and `id` is
passed through to the Parquet parts.

    cat_0 C1, cat_1 banner_pos, …, cat_13 C14, …, cat_20 C21 (file order without hour), cat_21 hour of day,
    cat_22 weekday (0 is Monday); int_0 hour of day

The header is counted as a rejected line, so that lines = samples + rejects.
"""

from __future__ import annotations

import datetime
import re

import numpy as np
import polars as pl

from slipstream.datasets.source import ParsedBlock, Source, SourceOptions
from slipstream.ops.delimited import read_fields
from slipstream.schema import LABEL, MISSING_ID, dense_name, table_name

FIELDS = (
    *("id", "click", "hour", "C1", "banner_pos", "site_id", "site_domain", "site_category"),
    *("app_id", "app_domain", "app_category", "device_id", "device_ip", "device_model"),
    *("device_type", "device_conn_type", "C14", "C15", "C16", "C17", "C18", "C19", "C20", "C21"),
)
"""Fields of a line, in order."""
_HEADER = ",".join(FIELDS).encode()
_SPARSE = FIELDS[3:]
_HEX_FIELDS = FIELDS[5:14]
_DECIMAL_FIELDS = tuple(name for name in _SPARSE if name not in _HEX_FIELDS)
_HOUR, _WEEKDAY = len(_SPARSE), len(_SPARSE) + 1
_ID = re.compile(rb"[0-9]{1,20}")
_AFTER_ID = re.compile(rb"^([^,\n]*)(?=,)", re.MULTILINE)
_HEX = re.compile(rb"[0-9a-fA-F]{8}")
_INT = re.compile(rb"-?[0-9]{1,10}")
_DECIMAL_BASE = 1 << 40
"""Raw ids of integer fields are their values above this; those of hex fields are below 2^32."""


class AvazuSource(Source):
    """The Avazu line format.

    Args:
        max_ind_range: Ids of hex fields are taken modulo this number; 0 keeps them.
    """

    num_dense = 1
    num_tables = len(_SPARSE) + 2
    extra_columns = ("id",)
    fields = FIELDS
    separator = ","
    label_field = "click"

    def __init__(self, *, max_ind_range: int = 0) -> None:
        self._max_ind_range = max_ind_range

    @property
    def column_names(self) -> dict[str, str]:
        """Names of the header, and those of what `hour` became."""
        names = {table_name(index): name for index, name in enumerate(_SPARSE)}
        return {
            dense_name(0): "hour_of_day",
            **names,
            table_name(_HOUR): "hour_of_day",
            table_name(_WEEKDAY): "weekday",
        }

    def parse(self, data: bytes) -> ParsedBlock:
        """Turn whole lines into samples and rejects."""
        text, sound = read_fields(data, separator=",", names=list(FIELDS))
        hours = text["hour"].unique().drop_nulls().to_list()
        decoded = {hour: parts for hour in hours if (parts := _decode_hour(hour)) is not None}
        hour_parts = {part: {hour: found[part] for hour, found in decoded.items()} for part in range(3)}
        hour = pl.col("hour")
        numbers = text.select(
            pl.col("click").replace_strict({"0": 0, "1": 1}, default=None, return_dtype=pl.UInt8).alias(LABEL),
            *(
                hour.replace_strict(hour_parts[part], default=None, return_dtype=pl.Int64).alias(name)
                for part, name in enumerate(("day", "_hour", "_weekday"))
            ),
            *(pl.col(name).str.to_integer(base=16, dtype=pl.UInt32, strict=False) for name in _HEX_FIELDS),
            pl.col(_DECIMAL_FIELDS).cast(pl.Int32, strict=False),
            pl.col("id").cast(pl.UInt64, strict=False),
        )
        is_written_well = text.select(
            pl.all_horizontal(
                *(pl.col(name).str.contains(r"^[0-9a-fA-F]{8}$").fill_null(value=True) for name in _HEX_FIELDS),
                *(pl.col(name).str.contains(r"^-?[0-9]{1,10}$").fill_null(value=True) for name in _DECIMAL_FIELDS),
                pl.col("id").str.contains(r"^[0-9]{1,20}$"),
            )
        ).to_series()
        bad = ~sound | ~is_written_well.fill_null(value=False)
        for name in (LABEL, "day", "id"):
            bad |= numbers[name].is_null()
        for name in _SPARSE:
            bad |= numbers[name].is_null() & text[name].is_not_null()
        samples = numbers.filter(~bad).select(
            LABEL,
            pl.col("_hour").alias(dense_name(0)),
            *(self._raw_id(name).alias(table_name(index)) for index, name in enumerate(_SPARSE)),
            (pl.col("_hour") + _DECIMAL_BASE).alias(table_name(_HOUR)),
            (pl.col("_weekday") + _DECIMAL_BASE).alias(table_name(_WEEKDAY)),
            "day",
            "id",
        )
        return ParsedBlock(
            samples=samples, rejected_lines=bad.arg_true().to_numpy().astype(np.int64), num_lines=text.height
        )

    def lacks_label(self, line: bytes) -> bool:
        """Whether a line, header or not, has all fields but one, as in Kaggle's test.csv."""
        return line.count(b",") == len(FIELDS) - 2

    def add_label(self, data: bytes) -> bytes:
        """Put a label, 0, after the first field of every line; a header gets back the name it lacks."""
        return _AFTER_ID.sub(rb"\1,0", data).replace(_HEADER.replace(b",click,", b",0,"), _HEADER)

    def explain(self, line: bytes) -> str:
        """Say why a line that `parse` rejected is no sample."""
        if line == _HEADER:
            return "header line"
        fields = line.split(b",")
        if len(fields) != len(FIELDS):
            return f"expected {len(FIELDS)} fields, found {len(fields)}"
        found = dict(zip(FIELDS, fields, strict=True))
        if not _ID.fullmatch(found["id"]) or int(found["id"]) >= 2**64:
            return f"id: expected an integer below 2^64, found {_show(found['id'])}"
        if found["click"] not in {b"0", b"1"}:
            return f"click: expected 0 or 1, found {_show(found['click'])}"
        if _decode_hour(found["hour"].decode("utf-8", "replace")) is None:
            return f"hour: expected YYMMDDHH, found {_show(found['hour'])}"
        for name in _SPARSE:
            field = found[name]
            if field and name in _HEX_FIELDS and not _HEX.fullmatch(field):
                return f"{name}: expected 8 hex digits, found {_show(field)}"
            if field and name in _DECIMAL_FIELDS and not (_INT.fullmatch(field) and -(2**31) <= int(field) < 2**31):
                return f"{name}: expected a 32-bit integer, found {_show(field)}"
        return "not a sample line"

    def format_raw_ids(self, raw_ids: np.ndarray) -> pl.Series:
        """Write raw ids as 8 hex digits or as integers, as their field does; MISSING_ID as the empty string."""
        is_decimal = raw_ids >= _DECIMAL_BASE // 2
        decimal = pl.Series(np.where(is_decimal, raw_ids - _DECIMAL_BASE, 0)).cast(pl.String)
        hexadecimal = pl.Series(
            [f"{value:08x}" for value in np.where(is_decimal, 0, raw_ids).tolist()], dtype=pl.String
        )
        missing = pl.Series(raw_ids == MISSING_ID)
        text = pl.when(pl.Series(is_decimal)).then(decimal).otherwise(hexadecimal)
        return pl.select(pl.when(missing).then(pl.lit("")).otherwise(text)).to_series()

    def _raw_id(self, name: str) -> pl.Expr:
        raw_id = pl.col(name).cast(pl.Int64)
        if name in _DECIMAL_FIELDS:
            raw_id = raw_id + _DECIMAL_BASE
        elif self._max_ind_range:
            raw_id = raw_id % self._max_ind_range
        return raw_id


def build(options: SourceOptions) -> AvazuSource:
    """Give the source for a pipeline's options."""
    return AvazuSource(max_ind_range=options.max_ind_range)


def _decode_hour(text: str) -> tuple[int, int, int] | None:
    """(date as YYMMDD, hour of day, weekday) of YYMMDDHH, or None where it is no such time."""
    if not re.fullmatch(r"[0-9]{8}", text, re.ASCII):
        return None
    hour = int(text[6:])
    try:
        date = datetime.date(2000 + int(text[:2]), int(text[2:4]), int(text[4:6]))
    except ValueError:
        return None
    return (int(text[:6]), hour, date.weekday()) if hour < 24 else None


def _show(field: bytes) -> str:
    return repr(field[:40].decode("utf-8", "backslashreplace")) + ("…" if len(field) > 40 else "")
