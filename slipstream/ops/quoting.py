"""Quoted fields to plain ones: the same lines, written so that no quote means anything.

A field that begins with a quote ends at the next single quote; inside, separators are text and two quotes stand for
one. What Python's `csv` module reads of a line, this reads, with one difference: a field never goes on over a line
end, so that a file can be cut at any of them. A line whose quote stays open comes out empty.
"""

from __future__ import annotations

import csv

import numpy as np

_QUOTE, _NEWLINE = ord('"'), ord("\n")
_MARKS = [bytes([code]) for code in range(31, 0, -1) if code not in b"\t\n\r"]


def unquote(data: bytes, separator: str) -> tuple[bytes, str]:
    r"""Write lines with quoted fields as lines without.

    Args:
        data: Whole lines, ended by `\n` or `\r\n`; the last may lack its end.
        separator: One ASCII character.

    Returns:
        (the lines, the separator now between their fields: a control character that they do not hold). Both as they
        came where there is no quote.
    """
    if b'"' not in data:
        return data, separator
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").removesuffix(b"\r")
    if not data.endswith(b"\n"):
        data += b"\n"
    mark = next((mark for mark in _MARKS if mark not in data), None)
    if mark is None:  # no text has every control character: a byte that is no UTF-8 shows where one stood
        mark = _MARKS[0]
        data = data.replace(mark, b"\xff")
    plain = _unquote_regular(data, ord(separator), mark)
    if plain is None:
        lines = data.removesuffix(b"\n").split(b"\n")
        plain = b"\n".join([*(_unquote_line(line, separator, mark) for line in lines), b""])
    return plain, mark.decode()


def _unquote_regular(data: bytes, separator: int, mark: bytes) -> bytes | None:
    """All lines at once; None where some quote neither begins nor ends a field, nor is one of two for one."""
    text = np.frombuffer(data, np.uint8)
    is_quote = text == _QUOTE
    # inside[i] is 1 from an odd quote up to the one after it: an overflowing sum keeps its last bit
    inside = np.cumsum(is_quote, dtype=np.uint8) & 1
    if np.any(inside[text == _NEWLINE]):
        return None
    places = np.flatnonzero(is_quote)
    opening, closing = places[::2], places[1::2]
    before = np.where(opening > 0, text[opening - 1], _NEWLINE)
    after = text[closing + 1]
    is_doubled = before == _QUOTE
    if not np.all(is_doubled | (before == separator) | (before == _NEWLINE)):
        return None
    if not np.all((after == _QUOTE) | (after == separator) | (after == _NEWLINE)):
        return None
    out = text.copy()
    out[(text == separator) & (inside == 0)] = ord(mark)
    # of quotes, only the second of two for one is text
    kept = ~is_quote
    kept[opening[is_doubled]] = True
    return bytes(out[kept])


def _unquote_line(line: bytes, separator: str, mark: bytes) -> bytes:
    if b'"' not in line:
        return line.replace(separator.encode(), mark)
    text = line.decode("utf-8", "surrogateescape") + "\n"
    try:
        (fields,) = csv.reader([text], delimiter=separator)
    except csv.Error:
        return b""
    if fields[-1].endswith("\n"):  # the line end itself was taken for text: the quote is still open
        return b""
    return mark.join(field.encode("utf-8", "surrogateescape") for field in fields)
