"""Standard input kept in a file, for what has to read its lines twice."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import zstandard

from slipstream.io.artifacts import write_atomically
from slipstream.io.raw import STDIN
from slipstream.progress import Progress

_AT_ONCE = 1 << 20


@contextmanager
def spooled(files: Sequence[str], *, beside: Path, progress: Progress) -> Iterator[list[str]]:
    """Give files that can be read again and again: standard input is compressed into one, which goes in the end.

    What a killed process left of it the next one replaces: its standard input may be another.

    Args:
        files: Names of raw files; standard input may be among them.
        beside: File that is being made; the copy gets a hidden name beside it.
        progress: Told how far it is.

    Raises:
        CapacityError: The disk is full.
    """
    copies = {at: beside.with_name(f".{beside.name}.stdin-{at}.zst") for at, file in enumerate(files) if file == STDIN}
    try:
        for copy in copies.values():
            _copy_stdin(copy, progress)
        yield [str(copies.get(at, file)) for at, file in enumerate(files)]
    finally:
        for copy in copies.values():
            copy.unlink(missing_ok=True)


def _copy_stdin(path: Path, progress: Progress) -> None:
    with progress.task("read standard input", None, "B") as advance, write_atomically(path) as partial:
        compressor = zstandard.ZstdCompressor(level=1)
        with partial.open("wb") as copy, compressor.stream_writer(copy) as stream:
            while data := sys.stdin.buffer.read(_AT_ONCE):
                stream.write(data)
                advance(len(data), "")
