"""Fields of delimited text against a plain split."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

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
