"""Fields of delimited text against a plain split."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from slipstream.ops import delimited
from slipstream.ops.delimited import read_fields

# pieces that click logs hold, and pieces that break readers
_PIECES = [b"", b"a", b"12", b"\t", b"\t\t", b"\n", b"\r\n", b"\r", b"\x00", b"\xff", b"\xc3", b"\xc3\xa9", b"\x01"]
_PIECES += [
    b'"',
    b",",
    b" ",
    b"#",
    b"\\",
    b"\xe2\x80\xa8",
    b"\x0b",
    b"\x1a",
    b"\t\x01\t\n",
    b"\x01\x01",
    b"\xef\xbb\xbf",
]
_TEXT = st.lists(st.sampled_from(_PIECES), max_size=25).map(b"".join)


def plain_fields(data: bytes, separator: bytes, num_fields: int) -> list[list[str | None] | None]:
    """Fields of each line, or None where their number is wrong."""
    data = data.replace(b"\r\n", b"\n").removesuffix(b"\r").removesuffix(b"\n")
    lines = [line.split(separator) for line in data.split(b"\n")]
    return [
        [field.decode(errors="replace").replace("\r", "\ufffd") or None for field in line]
        if len(line) == num_fields
        else None
        for line in lines
    ]


@pytest.mark.parametrize("separator", ["\t", ","])
@pytest.mark.parametrize("num_fields", [1, 2, 4])
@given(data=_TEXT)
@example(data=b"1\t\x01")
@example(data=b"\xef\xbb\xbf1\t2")
@example(data=b"1\t2\t\x01\t\n")
@example(data=b"1\t2\t\x01\x01\t\n\t\x01")
def test_fields_equal_a_plain_split(separator: str, num_fields: int, data: bytes):
    names = [f"f{index}" for index in range(num_fields)]
    frame, sound = read_fields(data, separator=separator, names=names)
    expected = plain_fields(data, separator.encode(), num_fields)
    assert sound.to_list() == [line is not None for line in expected]
    got = [list(row) for row in frame.filter(sound).rows()]
    assert got == [line for line in expected if line is not None]
    assert frame.columns == names


def test_every_line_counts_however_broken():
    data = b"1\t2\n\n1\n1\t2\t3\n\xff\t\x00\n1\t"
    frame, sound = read_fields(data, separator="\t", names=["a", "b"])
    assert frame.height == 6
    assert sound.to_list() == [True, False, False, False, True, True]
    assert frame.row(5) == ("1", None)


_NUMBERS = ["", "0", "-0", "+5", "007", "-12", "--5", "-", "5.", "1e3", "0x5", "1_000", " 5", "5 ", "\t5", "5\x00"]
_NUMBERS += ["\u0663", "\x0b5", "9" * 40, "NULL", "nan", "true", '"5"']
_NUMBERS += [str(number) for number in (2**63 - 1, 2**63, -(2**63), -(2**63) - 1)]


@pytest.mark.parametrize("separator", ["\t", ","])
@given(lines=st.lists(st.tuples(st.sampled_from(_NUMBERS), st.sampled_from(["a", "7", ""])), min_size=1, max_size=5))
def test_integers_read_at_once_equal_text_that_is_cast(separator: str, lines: list[tuple[str, str]]):
    data = "".join(f"{number}{separator}{other}\n" for number, other in lines).encode()
    names = ["number", "other"]
    text, expected_sound = read_fields(data, separator=separator, names=names)
    frame, sound = read_fields(data, separator=separator, names=names, integers=["number"])
    assert sound.equals(expected_sound)
    assert frame["other"].equals(text["other"])
    if frame["number"].dtype.is_integer():
        assert frame["number"].cast(pl.Int64).equals(text["number"].cast(pl.Int64))
    else:
        assert frame["number"].equals(text["number"])


def test_clean_integers_are_read_as_such():
    frame, sound = read_fields(b"5\tx\n\ty\n-3\t\n", separator="\t", names=["a", "b"], integers=["a"])
    assert sound.all() and frame["a"].to_list() == [5, None, -3] and frame["a"].dtype == pl.Int32


def test_integers_of_64_bits_are_read_as_such():
    frame, _ = read_fields(b"5000000000\tx\n-1\ty\n", separator="\t", names=["a", "b"], integers=["a"])
    assert frame["a"].to_list() == [5_000_000_000, -1] and frame["a"].dtype == pl.Int64


def test_sound_lines_are_read_once(monkeypatch: pytest.MonkeyPatch):
    how: list[str] = []
    read = delimited._read

    def note(*args: Any, **options: Any) -> pl.DataFrame:
        how.append(args[3])
        return read(*args, **options)

    monkeypatch.setattr(delimited, "_read", note)
    names = ["a", "b", "c"]
    _, sound = read_fields(b"1,2,3\n4,5,6\n", separator=",", names=names, integers=names)
    assert how == ["raise"] and sound.all()
