"""Quoted fields: what Python's csv module reads of a line, these lines say without a quote."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.ops import quoting as quoting_module
from slipstream.ops.quoting import unquote

ODD_TEXT = st.text(alphabet='ab",; \té0', max_size=8)


def read_as_fields(data: bytes, separator: str) -> list[list[str]]:
    plain, mark = unquote(data, separator)
    return [line.split(mark) for line in plain.decode().removesuffix("\n").split("\n")]


@given(
    rows=st.lists(st.lists(ODD_TEXT, min_size=2, max_size=4), min_size=1, max_size=5),
    separator=st.sampled_from(",;\t"),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC]),
    line_end=st.sampled_from(["\n", "\r\n"]),
)
def test_what_the_csv_module_writes_comes_back(rows: list[list[str]], separator: str, quoting: int, line_end: str):
    written = io.StringIO()
    csv.writer(written, delimiter=separator, quoting=quoting, lineterminator=line_end).writerows(rows)
    data = written.getvalue().encode()
    if b'"' in data:
        assert read_as_fields(data, separator) == rows


@given(lines=st.lists(ODD_TEXT.filter(bool), min_size=1, max_size=5), separator=st.sampled_from(",;"))
def test_any_line_reads_as_the_csv_module_reads_it(lines: list[str], separator: str):
    data = "".join(line + "\n" for line in lines).encode()
    if b'"' not in data:
        assert unquote(data, separator) == (data, separator)
        return
    for line, found in zip(lines, read_as_fields(data, separator), strict=True):
        (expected,) = csv.reader([line + "\n"], delimiter=separator)
        is_open = expected[-1].endswith("\n")
        assert found == ([""] if is_open else expected)


def test_an_open_quote_empties_its_own_line_and_no_other():
    plain, mark = unquote(b'1,"a,2\n3,"b",4\n', ",")
    assert plain.split(b"\n") == [b"", mark.encode().join([b"3", b"b", b"4"]), b""]


@pytest.mark.parametrize("data", [b'"a,b",c', b'"a,b",c\r', b'"a,b",c\r\n', b'"a,b",c\n'])
def test_the_last_line_may_lack_its_end(data: bytes):
    assert unquote(data, ",") == (b"a,b\x1fc\n", "\x1f")


def test_a_control_character_of_the_data_is_not_taken_for_a_separator():
    assert unquote(b'"a\x1fb",c\n', ",") == (b"a\x1fb\x1ec\n", "\x1e")


def test_regular_quotes_are_taken_all_at_once():
    data = b'1,"a, ""b""",2\n"x",3,"y"\n'
    assert quoting_module._unquote_regular(data, ord(","), b"\x1f") == b'1\x1fa, "b"\x1f2\nx\x1f3\x1fy\n'
