"""Stretches of raw files: where a worker on another machine reads by itself, instead of being sent the bytes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slipstream.io.raw import COMPRESSED, RawBlock, find_stop, is_parquet, open_stored, read_blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """Lines of a file that a worker reads by itself."""

    path: str
    file_index: int
    start: int
    """Offset in the uncompressed stream, as `skip` of `read_blocks`."""
    block_index: int
    """Of the first block there."""
    end: int | None
    """The end of this block; None to read on to the file's end, however many blocks that are."""


def find_stretches(path: str, *, file_index: int, block_bytes: int, skip: int, skip_blocks: int) -> Iterator[Stretch]:
    """Say where the blocks of a file are, which `read_blocks` with the same arguments gives; reads next to nothing.

    Where a block begins is known beforehand only in plain files of this machine. Of others the rest is one stretch.
    """
    path = path if "://" in path else str(Path(path).expanduser().absolute())
    start, index = skip, skip_blocks
    if "://" not in path and not path.lower().endswith((*COMPRESSED, ".npz")) and not is_parquet(path):
        with open_stored(path) as stream:
            size = stream.seek(0, io.SEEK_END)
            while start < size and (stop := find_stop(stream, path, start, block_bytes, size)) is not None:
                yield Stretch(path=path, file_index=file_index, start=start, block_index=index, end=stop)
                start, index = stop, index + 1
            if start >= size:
                return
    yield Stretch(path=path, file_index=file_index, start=start, block_index=index, end=None)


def read_stretch(stretch: Stretch, *, block_bytes: int) -> Iterator[RawBlock]:
    """Yield the blocks of a stretch.

    Args:
        stretch: What to read.
        block_bytes: As it was found with.

    Raises:
        DataError: As `read_blocks`.
    """
    blocks = read_blocks(
        stretch.path,
        file_index=stretch.file_index,
        block_bytes=block_bytes,
        skip=stretch.start,
        skip_blocks=stretch.block_index,
    )
    for block in blocks:
        yield block
        if stretch.end is not None and block.end >= stretch.end:
            return
