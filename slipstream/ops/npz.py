"""Rows of npz files as lines of text, and arrays into npz files, a piece at a time.

DLRM keeps a preprocessed data set in one npz file with the arrays X_int, X_cat and y. `numpy.load` reads such an array
whole; here the members of the archive are read side by side, so memory holds a few thousand rows.

DLRM's preprocessing writes X_cat transposed, that is in Fortran order: all of the first column, then all of the
second. Its rows are scattered over the whole member, which is compressed and so has to be read from its beginning; such
an array is unpacked into a temporary file, where each column can be read from any place.
"""

from __future__ import annotations

import io
import math
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from threading import Lock
from typing import IO, Any, cast

import numpy as np
import polars as pl

_ARRAYS = ("y", "X_int", "X_cat")
_ROWS = 1 << 15
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError)

_HEADER_LOCK = Lock()
"""numpy parses headers as Python literals, which Python 3.11 cannot do in two threads at once: now and then it raises
SystemError (python/cpython issue 106905)."""


def read_arrays(stored: IO[bytes], names: Sequence[str]) -> list[np.ndarray]:
    """Arrays of an npz file; several threads may read files at once. No pickle is loaded.

    Raises:
        KeyError: An array is missing.
        ValueError: The file is no archive, or damaged; an array is not in C order, holds objects, or is not as long as
            its header says.
    """
    try:
        with _open_archive(stored) as archive:
            return [_read_array(archive, name) for name in names]
    except _DAMAGED as exc:
        raise ValueError(f"expected a sound npz file: {exc}") from exc


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with _open_member(archive, name) as stream:
        shape, is_fortran, dtype = _read_header(stream)
        if is_fortran or dtype.hasobject:
            raise ValueError(f"expected numbers in C order in {name}, found {dtype}")
        is_possible = math.prod(shape) * dtype.itemsize <= archive.getinfo(f"{name}.npy").file_size
        values = np.empty(shape if is_possible else 0, dtype)  # no memory for what is not there
        read_into = cast(io.BufferedIOBase, stream).readinto
        if not is_possible or read_into(values.reshape(-1).view(np.uint8).data) != values.nbytes or stream.read(1):
            raise ValueError(f"array {name} is not as long as its header says")
        return values


def _open_archive(stored: IO[bytes]) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(stored)
    except RuntimeError as exc:  # NotImplementedError: says to be of a later version of zip
        raise zipfile.BadZipFile(str(exc)) from exc


def _open_member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(f"array {name} is compressed in a way that numpy does not write")
    try:
        return archive.open(info)
    except RuntimeError as exc:  # says to be encrypted, or patched
        raise zipfile.BadZipFile(str(exc)) from exc


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, whether in Fortran order, dtype) of an npy stream, which then stands at its values."""
    version = np.lib.format.read_magic(stream)
    read: Callable[[IO[bytes]], tuple[tuple[int, ...], bool, np.dtype[Any]]] = (
        np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    )
    with _HEADER_LOCK:
        return read(stream)


def npz_widths(stored: IO[bytes]) -> tuple[int, int]:
    """(columns of X_int, columns of X_cat) of a DLRM npz file.

    Raises:
        ValueError: Not such a file: an array is missing, has another shape, or holds no numbers; or it is damaged.
    """
    try:
        with _Members(stored) as members:
            return members.widths["X_int"], members.widths["X_cat"]
    except _DAMAGED as exc:
        raise ValueError(f"expected a sound npz file: {exc}") from exc


class NpzLines:
    r"""The rows of a DLRM npz file as one stream of lines: `y \t X_int… \t X_cat…`, in decimal.

    Args:
        stored: The file, seekable.
    """

    def __init__(self, stored: IO[bytes]) -> None:
        self._stored = stored
        self._members: _Members | None = None
        self._read_ahead = io.BytesIO()

    def __enter__(self) -> NpzLines:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._members is not None:
            self._members.close()

    def seekable(self) -> bool:
        """Never: lines are made as they are read."""
        return False

    def read(self, size: int) -> bytes:
        """Give the next `size` bytes of text, fewer at the end.

        Raises:
            zipfile.BadZipFile: The file is not a DLRM npz file, or is damaged.
        """
        out, total = [], 0
        while total < size:
            piece = self._read_ahead.read(size - total)
            if not piece:
                text = self._next_lines()
                if not text:
                    break
                self._read_ahead = io.BytesIO(text)
                continue
            out.append(piece)
            total += len(piece)
        return b"".join(out)

    def _next_lines(self) -> bytes:
        try:
            if self._members is None:
                self._members = _Members(self._stored)
            return self._members.next_lines(_ROWS)
        except ValueError as exc:
            raise zipfile.BadZipFile(str(exc)) from exc


class _Members:
    """The three arrays of a file, read side by side."""

    def __init__(self, stored: IO[bytes]) -> None:
        try:
            self._archive = _open_archive(stored)
        except zipfile.BadZipFile as exc:
            raise ValueError(f"expected an npz file: {exc}") from exc
        self._streams: dict[str, IO[bytes]] = {}
        self._dtypes: dict[str, np.dtype[Any]] = {}
        self._by_column: dict[str, IO[bytes]] = {}
        """Arrays in Fortran order, unpacked once they are read."""
        self._is_fortran: dict[str, bool] = {}
        self.widths: dict[str, int] = {}
        lengths = set()
        for name in _ARRAYS:
            shape = self._open(name)
            lengths.add(shape[0])
            self.widths[name] = shape[1] if len(shape) > 1 else 1
        if len(lengths) != 1:
            raise ValueError(f"expected arrays of one length, found {sorted(lengths)}")
        self._num_rows, self._done = lengths.pop(), 0

    def __enter__(self) -> _Members:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the archive and remove what was unpacked."""
        for stream in self._by_column.values():
            stream.close()
        self._archive.close()

    def next_lines(self, count: int) -> bytes:
        """Give the next `count` rows as text."""
        count = min(count, self._num_rows - self._done)
        if not count:
            return b""
        columns: list[pl.Series] = []
        for name in _ARRAYS:
            values = self._read(name, count)
            columns += [_as_text(values[:, index]).alias(f"{name}_{index}") for index in range(values.shape[1])]
        self._done += count
        text = io.BytesIO()
        pl.DataFrame(columns).write_csv(text, separator="\t", include_header=False)
        return text.getvalue()

    def _open(self, name: str) -> tuple[int, ...]:
        try:
            stream = _open_member(self._archive, name)
        except KeyError as exc:
            found = ", ".join(sorted(item.removesuffix(".npy") for item in self._archive.namelist()))
            raise ValueError(f"expected the arrays {', '.join(_ARRAYS)}, found {found or 'none'}") from exc
        shape, is_fortran, dtype = _read_header(stream)
        if len(shape) not in (1, 2) or (name != "y" and len(shape) != 2):
            raise ValueError(f"expected {name} with one row per sample, found shape {shape}")
        if dtype.kind not in "iuf":
            raise ValueError(f"expected numbers in {name}, found {dtype}")
        self._streams[name], self._dtypes[name] = stream, dtype
        self._is_fortran[name] = is_fortran and len(shape) == 2
        return shape

    def _read(self, name: str, count: int) -> np.ndarray:
        dtype = self._dtypes[name]
        if self._is_fortran[name]:
            return self._read_by_column(name, count).astype(dtype.newbyteorder("="))
        wanted = count * self.widths[name] * dtype.itemsize
        data = self._streams[name].read(wanted)
        if len(data) != wanted:
            raise ValueError(f"array {name} is shorter than its header says")
        return np.frombuffer(data, dtype).reshape(count, -1).astype(dtype.newbyteorder("="))

    def _read_by_column(self, name: str, count: int) -> np.ndarray:
        """Give the next rows of an array whose columns stand one after the other. Shape (count, columns)."""
        dtype, width = self._dtypes[name], self.widths[name]
        if name not in self._by_column:
            self._by_column[name] = tempfile.TemporaryFile()
            shutil.copyfileobj(self._streams[name], self._by_column[name], 1 << 20)
        stream = self._by_column[name]
        rows = np.empty((width, count), dtype)
        for column in range(width):
            stream.seek((column * self._num_rows + self._done) * dtype.itemsize)
            if cast(io.BufferedIOBase, stream).readinto(rows[column].data.cast("B")) != rows[column].nbytes:
                raise ValueError(f"array {name} is shorter than its header says")
        return rows.T


def _as_text(values: np.ndarray) -> pl.Series:
    """Numbers in decimal; whole floats as integers."""
    if values.dtype.kind != "f":
        return pl.Series(np.ascontiguousarray(values))
    wide = pl.Series(values.astype(np.float64))
    is_whole = (wide == wide.round()) & (wide.abs() < 2.0**53)
    whole = wide.cast(pl.Int64, strict=False).cast(pl.String)
    return pl.select(pl.when(is_whole).then(whole).otherwise(wide.cast(pl.String))).to_series()


def write_array(
    stream: IO[bytes], blocks: Iterable[np.ndarray], *, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> None:
    """Write an npy array block by block.

    Args:
        stream: Where to, at its beginning.
        blocks: Its rows in order; together of `shape`.
        shape: Of the whole array.
        dtype: Of the array; blocks are cast.

    Raises:
        ValueError: The blocks have another number of rows than `shape` says.
    """
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    written = 0
    for block in blocks:
        stream.write(np.ascontiguousarray(block, dtype).data)
        written += len(block)
    if written != shape[0]:
        raise ValueError(f"expected {shape[0]} rows, found {written}")
