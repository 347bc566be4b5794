"""Raw files: from a path, glob or address to line-aligned blocks of bytes.

Plain, .gz and .zst files, local or behind any address that fsspec knows, are read as one stream in bounded
memory; nothing is unpacked to disk. A block ends at a line end, so a line is never seen in two halves. A .parquet file
comes as blocks of columns, whatever row groups it was written in.
"""

from __future__ import annotations

import glob as globbing
import gzip
import io
import re
import stat
import sys
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import fsspec
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
import zstandard
from isal import igzip_lib

from slipstream.errors import DataError
from slipstream.ops.npz import NpzLines

STDIN = "-"
"""Names standard input among raw files, where it is read once: it can neither be measured nor read again."""

_OTHER_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
# the stubs of isal take the class for one of its instances
_DAMAGED = (gzip.BadGzipFile, cast(type[Exception], igzip_lib.error), zlib.error, zstandard.ZstdError)
_STORED_AT_ONCE = 1 << 20
"""Bytes of a compressed file read together."""
_GZIP_MAGIC = b"\x1f\x8b"
COMPRESSED = (".gz", ".zst", ".zstd")
_BOM = b"\xef\xbb\xbf"
_LINE_WINDOW = 1 << 16
"""A line end is looked for in so many bytes before a block is read."""
_LONGEST_LINE = 256 << 20
_PARQUET_ROW_BYTES = 512
_ESTIMATE_BYTES = 8 << 20
_WHOLE_HASH_BYTES = 256 << 20
_SAMPLES, _SAMPLE_BYTES = 256, 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class RawBlock:
    """Whole lines, or rows, of one file."""

    file_index: int
    """Position of the file in the list of raw files."""
    block_index: int
    """Position of the block in its file."""
    data: bytes | pl.DataFrame
    """The lines, each ended by a newline except perhaps the file's last; or rows of a Parquet file."""
    end: int
    """Offset in the uncompressed stream just after the block; for Parquet, rows up to there."""
    stored: int
    """Bytes of the file, as it is stored, that were read up to here; for Parquet, its share of the rows."""


def find_raw_files(patterns: Sequence[str], *, named_by: str = "`dataset.raw`", stdin: bool = False) -> list[str]:
    """Expand paths, globs and addresses, in the order given; matches of one glob by name, `day_2` before `day_10`.

    Args:
        patterns: What to expand.
        named_by: Who names them, for messages.
        stdin: Whether `-` means standard input.

    Raises:
        DataError: A pattern matches nothing, or names a folder, a named pipe or a device.
    """
    found: list[str] = []
    for pattern in patterns:
        if stdin and pattern == STDIN:
            matches = [pattern]
        elif "://" in pattern:
            matches = _find_remote(pattern)
        elif Path(pattern).exists():
            matches = [pattern]
        else:
            names = globbing.glob(str(Path(pattern).expanduser()), recursive=True)  # noqa: PTH207
            matches = sorted(names, key=_natural)
        if not matches:
            raise DataError(
                f"{named_by} names `{pattern}`, and there is no such file",
                hint="check the path; a relative one starts at the folder you run in",
            )
        for match in matches:
            if "://" not in match and not (stdin and match == STDIN):
                _check_kind(match, named_by)
        found += matches
    return found


def _check_kind(path: str, named_by: str) -> None:
    """Refuse what is no regular file: its size is unknown, and reading it may wait for ever."""
    try:
        mode = Path(path).expanduser().stat().st_mode
    except OSError as exc:
        raise DataError(f"cannot open raw file `{path}`: {exc.strerror or exc}") from exc
    if stat.S_ISDIR(mode):
        raise DataError(
            f"{named_by} names the folder `{path}`, expected files",
            hint=f"use a glob such as `{path.rstrip('/')}/*.gz`",
        )
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _OTHER_KINDS if test(mode)), "something else")
        raise DataError(
            f"{named_by} names `{path}`, which is {kind}, expected a file",
            hint="raw files are read more than once: write to a file first what it gives",
        )


def find_twins(files: Sequence[str]) -> list[str]:
    """Warn, in plain words, of raw files that are named twice or hold the same.

    Only files of equal size are hashed; large ones by samples of their content, as in `fingerprint_raw`.
    """
    found, by_size = [], defaultdict[int, dict[str, str]](dict)
    for path in files:
        resolved = path if "://" in path else str(Path(path).expanduser().resolve())
        same_size = by_size[raw_size(path)]
        if resolved in same_size:
            found.append(f"raw file `{path}` is named twice: its samples count twice, and test may repeat training")
        same_size.setdefault(resolved, path)
    for size, same_size in by_size.items():
        first: dict[str, str] = {}
        for path in same_size.values() if size and len(same_size) > 1 else ():
            twin = first.setdefault(fingerprint_raw(path), path)
            if twin != path:
                found.append(f"raw files `{twin}` and `{path}` hold the same: test may repeat training")
    return found


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that takes runs of digits as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def _find_remote(pattern: str) -> list[str]:
    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
        has_glob = globbing.has_magic(pattern)
        names = sorted(filesystem.glob(path), key=_natural) if has_glob else [path] if filesystem.exists(path) else []
        return [filesystem.unstrip_protocol(name) for name in names]
    except (ImportError, ValueError) as exc:
        raise DataError(
            f"`dataset.raw` names `{pattern}`, and fsspec cannot open such addresses: {exc}",
            hint="install what serves them: `pip install slipstream[s3]` or `slipstream[gcs]`",
        ) from exc
    except OSError as exc:
        raise DataError(f"cannot reach `{pattern}`: {exc.strerror or exc}") from exc


def raw_size(path: str) -> int:
    """Bytes of a raw file as it is stored."""
    if "://" not in path:
        return Path(path).expanduser().stat().st_size
    filesystem, inner = fsspec.core.url_to_fs(path)
    return int(filesystem.size(inner))


def estimate_text_bytes(path: str) -> int:
    """Bytes of text that a raw file holds, judged by its first megabytes; for Parquet, by its number of rows.

    Raises:
        DataError: The file cannot be read.
    """
    size = raw_size(path)
    if is_parquet(path):
        with _open_parquet(path) as file:
            return int(file.metadata.num_rows) * _PARQUET_ROW_BYTES // 2
    if not path.lower().endswith(COMPRESSED):
        return size
    with open_stored(path) as stored, open_raw(path, stored) as stream:
        text = len(_read(stream, path, _ESTIMATE_BYTES))
        return text if text < _ESTIMATE_BYTES else size * text // max(stored.tell(), 1)


def is_parquet(path: str) -> bool:
    """Whether a raw file is read as columns."""
    return path.lower().endswith((".parquet", ".pq"))


def bytes_to_hash(path: str) -> int:
    """Bytes of a raw file that `fingerprint_raw` reads."""
    size = raw_size(path)
    return size if size <= _WHOLE_HASH_BYTES else _SAMPLES * _SAMPLE_BYTES


def fingerprint_raw(path: str, *, on_read: Callable[[int], None] = lambda count: None) -> str:
    """Hash of a raw file: of all of it up to 256 MiB, of its size and 256 even samples beyond.

    Names and times do not count, so moved or copied files keep their fingerprint.

    Args:
        path: Raw file.
        on_read: Told how many bytes were read since the last time.
    """
    size = raw_size(path)
    digest = xxhash.xxh3_64(str(size).encode())
    with open_stored(path) as stream:
        if size <= _WHOLE_HASH_BYTES:
            while data := stream.read(1 << 22):
                digest.update(data)
                on_read(len(data))
        else:
            for index in range(_SAMPLES):
                stream.seek((size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
                on_read(_SAMPLE_BYTES)
    return digest.hexdigest()


def read_blocks(
    path: str,
    *,
    file_index: int,
    block_bytes: int,
    skip: int = 0,
    skip_blocks: int = 0,
) -> Iterator[RawBlock]:
    """Yield the lines of a file in blocks of about `block_bytes`.

    Args:
        path: Raw file; .gz and .zst are decompressed on the way, rows of .npz become lines.
        file_index: Put into each block.
        block_bytes: Size of a block; a longer single line makes a longer block.
        skip: Offset in the uncompressed stream to start from; must follow a newline.
        skip_blocks: Number of blocks before that offset.

    Raises:
        DataError: The file cannot be read, is truncated, or is not the format its name says.
    """
    if is_parquet(path):
        yield from _read_columns(path, file_index, max(1, block_bytes // _PARQUET_ROW_BYTES), skip, skip_blocks)
        return
    offset, index = skip, skip_blocks
    with open_stored(path) as stored, open_raw(path, stored) as stream:
        if stream is stored and stream.seekable() and "://" not in path and path != STDIN:
            for block in _read_whole_lines(stream, path, offset, block_bytes):
                offset += len(block)
                block = block.removeprefix(_BOM) if offset == len(block) else block
                if block:
                    yield RawBlock(file_index=file_index, block_index=index, data=block, end=offset, stored=offset)
                    index += 1
            stream.seek(0)
        _skip_to(stream, path, offset)
        data = _read(stream, path, max(block_bytes, len(_BOM)))
        if offset == 0 and data.startswith(_BOM):
            data, offset = data[len(_BOM) :] or _read(stream, path, block_bytes), len(_BOM)
        pieces: list[bytes] = []
        while data:
            place = data.rfind(b"\n") + 1
            if place == 0:
                pieces.append(data)
                _check_line_length(pieces, path)
            else:
                block = b"".join((*pieces, memoryview(data)[:place]))
                pieces = [data[place:]]
                offset += len(block)
                yield RawBlock(file_index=file_index, block_index=index, data=block, end=offset, stored=stored.tell())
                index += 1
            data = _read(stream, path, block_bytes)
        block = b"".join(pieces)
        if block:
            end = offset + len(block)
            yield RawBlock(file_index=file_index, block_index=index, data=block, end=end, stored=stored.tell())


def _read_whole_lines(stream: IO[bytes], path: str, offset: int, block_bytes: int) -> Iterator[bytes]:
    """Lines of a file that can be sought in, read once and never copied; ends early where a line is very long."""
    size = stream.seek(0, io.SEEK_END)
    while offset < size:
        stop = find_stop(stream, path, offset, block_bytes, size)
        if stop is None:
            return
        stream.seek(offset)
        block = _read(stream, path, stop - offset)
        if len(block) < stop - offset:
            raise DataError(f"`{path}` became shorter while it was read", hint="run again when nothing writes to it")
        yield block
        offset = stop


def find_stop(stream: IO[bytes], path: str, offset: int, block_bytes: int, size: int) -> int | None:
    """Where the block that begins at `offset` ends; None where a very long line is in the way.

    `stream` is that of a plain file of `size` bytes, which `path` names; a block has about `block_bytes`.
    """
    stop = min(offset + block_bytes, size)
    if stop == size:
        return size
    seen_from = max(offset, stop - _LINE_WINDOW)
    stream.seek(seen_from)
    stop = seen_from + _read(stream, path, stop - seen_from).rfind(b"\n") + 1
    return None if stop == seen_from else stop


def _check_line_length(pieces: Sequence[bytes], path: str) -> None:
    if sum(map(len, pieces)) > _LONGEST_LINE:
        raise DataError(
            f"`{path}` has no line end within {_LONGEST_LINE >> 20} MiB; expected a text file of lines",
            hint="check `dataset.raw`: compressed and Parquet files are known by .gz, .zst and .parquet at their end",
        )


def _read_columns(path: str, file_index: int, block_rows: int, skip: int, skip_blocks: int) -> Iterator[RawBlock]:
    with _open_parquet(path) as file:
        done, index = 0, skip_blocks
        size, num_rows = raw_size(path), max(file.metadata.num_rows, 1)
        for batch in _batches(file, path, block_rows):
            first, done = done, done + batch.num_rows
            if done <= skip:
                continue
            rows = batch.slice(max(skip - first, 0))
            # what the file says of itself beside its columns may be no UTF-8, of which Polars panics
            frame = pl.from_arrow(pa.Table.from_batches([rows]).replace_schema_metadata())
            assert isinstance(frame, pl.DataFrame)
            stored = size * done // num_rows
            yield RawBlock(file_index=file_index, block_index=index, data=frame, end=done, stored=stored)
            index += 1


@contextmanager
def _open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    with open_stored(path) as stored:
        try:
            file = pq.ParquetFile(stored)
        except (pa.ArrowException, ValueError, OSError) as exc:
            raise DataError(f"`{path}` is not a sound Parquet file: {exc}", hint="copy or write it again") from exc
        yield file


def _batches(file: pq.ParquetFile, path: str, block_rows: int) -> Iterator[pa.RecordBatch]:
    try:
        for batch in file.iter_batches(batch_size=block_rows):
            batch.validate(full=True)  # text that is no UTF-8, too
            yield batch
    except (pa.ArrowException, ValueError, OSError) as exc:
        raise DataError(f"`{path}` is not a sound Parquet file: {exc}", hint="copy or write it again") from exc


@contextmanager
def open_raw(path: str, stored: IO[bytes]) -> Iterator[IO[bytes]]:
    """Open the uncompressed byte stream of a raw file that is open as it is stored."""
    name = path.lower()
    if name.endswith(".gz"):
        yield _GzipStream(stored)  # type: ignore[misc]
    elif name.endswith((".zst", ".zstd")):
        yield _ZstdStream(stored)  # type: ignore[misc]
    elif name.endswith(".npz"):
        with NpzLines(stored) as lines:
            yield lines  # type: ignore[misc]
    else:
        yield stored


@contextmanager
def open_stored(path: str) -> Iterator[IO[bytes]]:
    """Open the bytes of a raw file as they are stored."""
    if path == STDIN:
        yield sys.stdin.buffer
        return
    try:
        stream: IO[bytes] = fsspec.open(path, "rb").open() if "://" in path else Path(path).expanduser().open("rb")
    except OSError as exc:
        raise DataError(f"cannot open raw file `{path}`: {exc.strerror or exc}") from exc
    with stream:
        yield stream


def _read(stream: IO[bytes], path: str, size: int) -> bytes:
    try:
        return stream.read(size)
    except EOFError as exc:
        raise DataError(
            f"`{path}` is truncated: it ends inside its compressed stream",
            hint="copy or download it again; nothing was published from it",
        ) from exc
    except zipfile.BadZipFile as exc:
        raise DataError(f"`{path}` is not a sound npz file: {exc}", hint="write it again with numpy.savez") from exc
    except _DAMAGED as exc:
        raise DataError(
            f"`{path}` is not a sound compressed file: {exc}",
            hint="check its name and copy it again; a .gz must hold gzip data only, without trailing bytes",
        ) from exc
    except OSError as exc:
        raise DataError(f"cannot read `{path}`: {exc.strerror or exc}") from exc


def _skip_to(stream: IO[bytes], path: str, offset: int) -> None:
    if offset and stream.seekable() and not path.lower().endswith((".gz", ".npz")):
        stream.seek(offset)
        return
    while offset:
        data = _read(stream, path, min(offset, 1 << 22))
        if not data:
            raise DataError(f"`{path}` became shorter since the run was interrupted", hint="run with --force")
        offset -= len(data)


class _GzipStream:
    """Reads gzip members one after another, as the standard library does, in less than half the time."""

    def __init__(self, stored: IO[bytes]) -> None:
        self._stored = stored
        self._member: Any = None
        self._unread = b""

    def seekable(self) -> bool:
        return False

    def read(self, size: int) -> bytes:
        out: list[bytes] = []
        total = 0
        while total < size:
            if (self._member is None or self._member.eof) and not self._open_member():
                break
            data, self._unread = self._unread, b""
            if not data and self._member.needs_input:
                data = self._stored.read(_STORED_AT_ONCE)
                if not data:
                    raise EOFError
            piece = self._member.decompress(data, size - total)
            out.append(piece)
            total += len(piece)
        return b"".join(out)

    def _open_member(self) -> bool:
        """Whether another member follows; zeros behind one are padding."""
        is_first = self._member is None
        self._unread = b"" if is_first else self._member.unused_data
        while True:
            self._unread = self._unread if is_first else self._unread.lstrip(b"\0")
            more = b"" if len(self._unread) >= len(_GZIP_MAGIC) else self._stored.read(_STORED_AT_ONCE)
            if not more:
                break
            self._unread += more
        if not self._unread:
            return False
        if not self._unread.startswith(_GZIP_MAGIC):
            raise gzip.BadGzipFile(f"not a gzip member: {self._unread[:2]!r}")
        self._member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        return True


class _ZstdStream:
    """Reads zstd frames one after another, and says when the last one is cut off."""

    def __init__(self, stored: IO[bytes]) -> None:
        self._stored = stored
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._in_frame = False
        self._unread = b""
        self._rest = memoryview(b"")

    def seekable(self) -> bool:
        return False

    def read(self, size: int) -> bytes:
        out: list[memoryview] = []
        total = 0
        while total < size:
            if self._rest:
                out.append(self._rest[: size - total])
                self._rest = self._rest[len(out[-1]) :]
                total += len(out[-1])
                continue
            data = self._unread or self._stored.read(_STORED_AT_ONCE)
            self._unread = b""
            if not data:
                if self._in_frame:
                    raise EOFError
                break
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._in_frame = True
            self._rest = memoryview(self._frame.decompress(data))
            if self._frame.eof:
                self._in_frame = False
                self._unread = self._frame.unused_data
        return b"".join(out)
