"""Delimited text to string columns, with every line accounted for.

Polars reads the fields. It refuses lines with too many of them, so a block whose separators add up has none with
too few either, and can be taken as it is. Any other block is read again with a sentinel field added to every line,
which shows exactly which lines have too few or too many. Quoting is off: click logs have none.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import polars as pl

_SENTINEL = "\x01"
_BOM = b"\xef\xbb\xbf"


def read_fields(data: bytes, *, separator: str, names: list[str]) -> tuple[pl.DataFrame, pl.Series]:
    r"""Split lines into fields.

    A line ends at `\n` or `\r\n`. Invalid UTF-8 becomes U+FFFD, which no numeric field accepts.

    Args:
        data: Whole lines; the last may lack its newline.
        separator: One ASCII character.
        names: Names of the fields every line must have.

    Returns:
        One String column per name, empty fields null, one row per line in order; and a Boolean series
        that is true where a line has exactly `len(names)` fields.
    """
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").removesuffix(b"\r")
    if not data.endswith(b"\n"):
        data += b"\n"
    if data.startswith(_BOM):
        data = _BOM + data  # Polars takes one away, and a mark inside a file belongs to its line
    if _separators_add_up(data, separator, len(names)):
        try:
            frame = _read(data, separator, names, "raise")
        except (pl.exceptions.ComputeError, pl.exceptions.SchemaError):
            pass  # too many fields in one line, or invalid UTF-8: the long way tells
        else:
            return frame, pl.repeat(True, frame.height, dtype=pl.Boolean, eager=True)
    marked = data.replace(b"\n", f"{separator}{_SENTINEL}\n".encode())
    columns = [*names, "_end", "_beyond"]
    try:
        frame = _read(marked, separator, columns, "ignore")
    except pl.exceptions.ComputeError:
        frame = _read(marked, separator, columns, "ignore", "utf8-lossy")
    ends = (pl.col("_end") == _SENTINEL).fill_null(value=False) & pl.col("_beyond").is_null()
    return frame.select(names), frame.select(ends).to_series()


def _separators_add_up(data: bytes, separator: str, num_fields: int) -> bool:
    characters = np.frombuffer(data, np.uint8)
    num_lines = np.count_nonzero(characters == ord("\n"))
    return bool(np.count_nonzero(characters == ord(separator)) == num_lines * (num_fields - 1))


def _read(
    data: bytes,
    separator: str,
    columns: list[str],
    extra_columns: Literal["raise", "ignore"],
    encoding: str = "utf8",
) -> pl.DataFrame:
    return pl.read_csv(
        data,
        separator=separator,
        has_header=False,
        quote_char=None,
        schema=dict.fromkeys(columns, pl.String),
        encoding=encoding,
        missing_columns="insert",
        extra_columns=extra_columns,
    )
