"""Delimited text to string columns, with every line accounted for.

Polars reads the fields; a sentinel field added to every line shows, exactly and for the price of one
replacement, which lines have too few or too many fields. Quoting is off: click logs have none.
"""

from __future__ import annotations

import polars as pl

_SENTINEL = b"\x01"
_BOM = b"\xef\xbb\xbf"
_REPLACEMENT = "\ufffd".encode()


def read_fields(data: bytes, *, separator: str, names: list[str]) -> tuple[pl.DataFrame, pl.Series]:
    r"""Split lines into fields.

    A line ends at `\n` or `\r\n`. Invalid UTF-8, and a carriage return anywhere else, become U+FFFD, which no numeric
    field accepts.

    Args:
        data: Whole lines; the last may lack its newline.
        separator: One ASCII character.
        names: Names of the fields every line must have.

    Returns:
        One String column per name, empty fields null, one row per line in order; and a Boolean series
        that is true where a line has exactly `len(names)` fields.
    """
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").removesuffix(b"\r").replace(b"\r", _REPLACEMENT)
    data = data.removesuffix(b"\n") + b"\n"
    is_guarded = data.startswith(_BOM)
    if is_guarded:
        data = b"\n" + data  # Polars drops a BOM at the start of a text; here it is part of the first field
    mark = separator.encode() + _SENTINEL
    while mark in data:  # a field of the data must not pass for the sentinel
        mark += _SENTINEL
    marked = data.replace(b"\n", mark + b"\n")
    columns = [*names, "_end", "_beyond"]
    try:
        frame = _read(marked, separator, columns, "utf8")
    except pl.exceptions.ComputeError:
        frame = _read(marked, separator, columns, "utf8-lossy")
    ends = (pl.col("_end") == mark[1:].decode()).fill_null(value=False) & pl.col("_beyond").is_null()
    fields, sound = frame.select(names), frame.select(ends).to_series()
    return (fields[1:], sound[1:]) if is_guarded else (fields, sound)


def _read(data: bytes, separator: str, columns: list[str], encoding: str) -> pl.DataFrame:
    return pl.read_csv(
        data,
        separator=separator,
        has_header=False,
        quote_char=None,
        schema=dict.fromkeys(columns, pl.String),
        encoding=encoding,
        missing_columns="insert",
        extra_columns="ignore",
    )
