"""Delimited text to string columns, with every line accounted for.

Polars reads the fields. It refuses lines with too many of them, so a block whose separators add up has none with
too few either, and can be taken as it is. Any other block is read again with a sentinel field added to every line,
which shows exactly which lines have too few or too many. Quoting is off: click logs have none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import numpy as np
import polars as pl

_SENTINEL = b"\x01"
# Polars takes text that begins like these for a byte order mark, gzip, zlib or zstd
_MISREAD = (b"\xef\xbb\xbf", b"\x1f\x8b", b"x", b"\x28\xb5\x2f\xfd")
_REPLACEMENT = "\ufffd".encode()
_COUNTED_AT_ONCE = 1 << 18
"""Bytes that stay in the processor's cache while they are compared."""


def read_fields(
    data: bytes, *, separator: str, names: list[str], integers: Sequence[str] = ()
) -> tuple[pl.DataFrame, pl.Series]:
    r"""Split lines into fields.

    A line ends at `\n` or `\r\n`. Invalid UTF-8, and a carriage return anywhere else, become U+FFFD, which no
    numeric field accepts.

    Args:
        data: Whole lines; the last may lack its newline.
        separator: One ASCII character.
        names: Names of the fields every line must have.
        integers: Those that should be integers; they are, all of them, Int32 or Int64, where that loses nothing.

    Returns:
        One column per name, String unless said otherwise, empty fields null, one row per line in order; and a
        Boolean series that is true where a line has exactly `len(names)` fields.
    """
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").removesuffix(b"\r")
        data = data.replace(b"\r", _REPLACEMENT)  # Polars drops some of them, depending on where they stand
    if not data.endswith(b"\n"):
        data += b"\n"
    if data.startswith(_MISREAD):
        empty_line = separator.encode() * (len(names) - 1) + b"\n"
        text, sound = read_fields(empty_line + data, separator=separator, names=names, integers=integers)
        return text.slice(1), sound.slice(1)
    if _separators_add_up(data, separator, len(names)):
        # Polars takes blanks before a number for part of it
        spaced = b" " in data or (separator != "\t" and b"\t" in data)
        for dtype in [pl.Int32, pl.Int64, None] if integers and not spaced else [None]:
            try:
                frame = _read(data, separator, names, "raise", dtypes=dict.fromkeys(integers, dtype) if dtype else {})
            except (pl.exceptions.ComputeError, pl.exceptions.SchemaError):
                continue  # no integer, too many fields in one line, or invalid UTF-8: the long way tells
            return frame, pl.repeat(True, frame.height, dtype=pl.Boolean, eager=True)
    mark = separator.encode() + _SENTINEL
    while mark in data:  # a field of the data must not pass for the sentinel
        mark += _SENTINEL
    marked = data.replace(b"\n", mark + b"\n")
    columns = [*names, "_end", "_beyond"]
    try:
        frame = _read(marked, separator, columns, "ignore")
    except pl.exceptions.ComputeError:
        frame = _read(marked, separator, columns, "ignore", "utf8-lossy")
    ends = (pl.col("_end") == mark[1:].decode()).fill_null(value=False) & pl.col("_beyond").is_null()
    return frame.select(names), frame.select(ends).to_series()


def _separators_add_up(data: bytes, separator: str, num_fields: int) -> bool:
    characters = np.frombuffer(data, np.uint8)
    num_lines = num_separators = 0
    for start in range(0, len(characters), _COUNTED_AT_ONCE):
        piece = characters[start : start + _COUNTED_AT_ONCE]
        num_lines += int(np.count_nonzero(piece == ord("\n")))
        num_separators += int(np.count_nonzero(piece == ord(separator)))
    return num_separators == num_lines * (num_fields - 1)


def _read(
    data: bytes,
    separator: str,
    columns: list[str],
    extra_columns: Literal["raise", "ignore"],
    encoding: str = "utf8",
    dtypes: Mapping[str, type[pl.DataType]] = MappingProxyType({}),
) -> pl.DataFrame:
    return pl.read_csv(
        data,
        separator=separator,
        has_header=False,
        quote_char=None,
        schema={name: dtypes.get(name, pl.String) for name in columns},
        encoding=encoding,
        missing_columns="insert",
        extra_columns=extra_columns,
    )
