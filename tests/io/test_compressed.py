from __future__ import annotations

import gzip
import io
import zlib

import zstandard
from hypothesis import given
from hypothesis import strategies as st
from isal import igzip_lib

from slipstream.io.raw import _GzipStream, _ZstdStream

DAMAGED = (gzip.BadGzipFile, zlib.error, igzip_lib.error)


def outcome(stream: io.BufferedIOBase, size: int) -> bytes | str:
    """All that a stream holds, or why it cannot be read."""
    pieces = []
    try:
        while data := stream.read(size):
            assert len(data) <= size
            pieces.append(data)
    except EOFError:
        return "truncated"
    except DAMAGED:
        return "damaged"
    return b"".join(pieces)


members = st.lists(
    st.builds(lambda text, level: gzip.compress(text * 50, level), st.binary(max_size=60), st.sampled_from([0, 1, 9])),
    min_size=1,
    max_size=3,
)


@given(members, st.integers(1, 200), st.binary(max_size=12) | st.just(b"\0" * 600), st.data())
def test_gzip_is_read_as_the_standard_library_does(packed: list[bytes], size: int, tail: bytes, data: st.DataObject):
    content = bytearray(b"\0\0".join(packed) + tail)
    if data.draw(st.booleans(), label="flips a bit"):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans(), label="ends early"):
        content = content[: data.draw(st.integers(0, len(content)))]
    expected = outcome(gzip.GzipFile(fileobj=io.BytesIO(content)), size)
    found = outcome(_GzipStream(io.BytesIO(content)), size)  # type: ignore[arg-type]
    # damage may be noticed at another byte, so a damaged file that also ends early may be called the one or the other
    assert found == expected or {found, expected} == {"damaged", "truncated"}


@given(st.lists(st.binary(max_size=3000), max_size=4), st.lists(st.integers(1, 700), min_size=1, max_size=9))
def test_zstd_never_gives_more_than_was_asked_for(frames: list[bytes], sizes: list[int]):
    stream = _ZstdStream(io.BytesIO(b"".join(zstandard.compress(frame) for frame in frames)))
    whole, found = b"".join(frames), b""
    for size in [*sizes, len(whole) + 1]:
        piece = stream.read(size)
        assert len(piece) == min(size, len(whole) - len(found))
        found += piece
    assert found == whole
