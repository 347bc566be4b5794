"""Criteo Kaggle and Criteo Terabyte click logs.

A line is `label, I1..I13, C1..C26`, separated by tabs, no header, an empty field where a value is missing.
Integers may be negative; ids are up to 8 hex digits. Both data sets share the format; Terabyte comes as day files.
"""

from __future__ import annotations

import re

import numpy as np
import polars as pl
import pyarrow as pa

from slipstream.datasets.columns import columns_to_lines
from slipstream.datasets.source import ParsedBlock, Source, SourceOptions
from slipstream.ops.delimited import read_fields
from slipstream.schema import LABEL, MISSING_ID, dense_name, table_name

_NUM_DENSE, _NUM_TABLES = 13, 26
_DENSE = [dense_name(index) for index in range(_NUM_DENSE)]
_TABLES = [table_name(index) for index in range(_NUM_TABLES)]
_NAMES = [LABEL, *_DENSE, *_TABLES]
_INT = re.compile(rb"[+-]?[0-9]+")
_HEX = re.compile(rb"[0-9a-fA-F]{1,8}")
_HEX_DIGITS = np.frombuffer(b"0123456789abcdef", np.uint8)


class CriteoSource(Source):
    """The Criteo line format.

    Args:
        max_ind_range: Raw ids are taken modulo this number, as DLRM's option of that name does; 0 keeps them.
    """

    num_dense = _NUM_DENSE
    num_tables = _NUM_TABLES
    fields = tuple(_NAMES)

    def __init__(self, *, max_ind_range: int = 0) -> None:
        self._max_ind_range = max_ind_range

    def parse(self, data: bytes) -> ParsedBlock:
        """Turn whole lines into samples and rejects."""
        text, sound = read_fields(data, separator="\t", names=_NAMES, integers=_DENSE)
        is_one, is_zero = text[LABEL] == "1", text[LABEL] == "0"
        ids = [pl.col(name).str.to_integer(base=16, dtype=pl.UInt32, strict=False) for name in _TABLES]
        dense = [
            name if text.schema[name].is_integer() else pl.col(name).cast(pl.Int64, strict=False) for name in _DENSE
        ]
        numbers = text.select(is_one.cast(pl.UInt8), *dense, *ids)
        empty, unread = text.null_count().row(0), numbers.null_count().row(0)
        suspects = [name for name, was, now in zip(_NAMES, empty, unread, strict=True) if was != now]
        bad = ~(sound & (is_one | is_zero)).fill_null(value=False)
        for name in suspects:
            bad |= numbers[name].is_null() & text[name].is_not_null()
        if b"+" in data:
            for name in _TABLES:
                bad |= text[name].str.contains("+", literal=True).fill_null(value=False)
        # a number that fits 32 bits can still be written with more than 8 digits
        widths = text.select(pl.col(_TABLES).str.len_bytes().max()).row(0)
        for name in [name for name, width in zip(_TABLES, widths, strict=True) if (width or 0) > 8]:
            bad |= (text[name].str.len_bytes() > 8).fill_null(value=False)
        rejected = bad.arg_true().to_numpy().astype(np.int64)
        if rejected.size:
            numbers = numbers.filter(~bad)
        if self._max_ind_range:
            numbers = numbers.with_columns(pl.col(_TABLES).cast(pl.Int64) % self._max_ind_range)
        return ParsedBlock(
            samples=numbers,
            rejected_lines=rejected,
            num_lines=text.height,
        )

    def explain(self, line: bytes) -> str:
        """Say why a line that `parse` rejected is no sample."""
        fields = line.split(b"\t")
        if len(fields) != len(_NAMES):
            return f"expected {len(_NAMES)} fields, found {len(fields)}"
        if fields[0] not in {b"0", b"1"}:
            return f"label: expected 0 or 1, found {_show(fields[0])}"
        for name, field in zip(_NAMES[1:], fields[1:], strict=True):
            if field and name in _DENSE:
                if not _INT.fullmatch(field):
                    return f"{name}: expected an integer, found {_show(field)}"
                if len(field.lstrip(b"+-0")) > 19 or not -(2**63) <= int(field) < 2**63:
                    return f"{name}: expected a 64-bit integer, found {_show(field)}"
            elif field and not _HEX.fullmatch(field):
                return f"{name}: expected up to 8 hex digits, found {_show(field)}"
        return "not a sample line"

    def lacks_label(self, line: bytes) -> bool:
        """Whether a line has all fields but one, as in Kaggle's test.txt."""
        return line.count(b"\t") == len(_NAMES) - 2

    def add_label(self, data: bytes) -> bytes:
        """Put a label, 0, before every line."""
        return b"0\t" + data.removesuffix(b"\n").replace(b"\n", b"\n0\t") + b"\n"

    def to_lines(self, columns: pl.DataFrame) -> bytes:
        """Write rows of a Parquet file as lines: label, int_0…, cat_0…; ids as text or as integers below 2^32."""
        return columns_to_lines(
            columns,
            num_dense=_NUM_DENSE,
            num_tables=_NUM_TABLES,
            format_raw_ids=self.format_raw_ids,
            largest_raw_id=2**32 - 1,
        )

    def format_raw_ids(self, raw_ids: np.ndarray) -> pl.Series:
        """Write raw ids as 8 hex digits; MISSING_ID as the empty string."""
        shifts = np.arange(28, -4, -4, dtype=np.int64)
        digits = _HEX_DIGITS[(raw_ids[:, None] >> shifts) & 0xF]
        known = raw_ids != MISSING_ID
        ends = np.concatenate([[0], np.cumsum(np.where(known, 8, 0))])
        text = pa.LargeStringArray.from_buffers(
            len(raw_ids), pa.py_buffer(ends.astype(np.int64)), pa.py_buffer(digits[known].tobytes())
        )
        return pl.Series(text)


def build(options: SourceOptions) -> CriteoSource:
    """Give the source for a pipeline's options."""
    return CriteoSource(max_ind_range=options.max_ind_range)


def _show(field: bytes) -> str:
    text = field[:40].decode("utf-8", "backslashreplace")
    return repr(text) + ("…" if len(field) > 40 else "")
