from __future__ import annotations

import gc
import io
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.ops.npz import NpzLines, npz_widths, read_arrays, write_array


def make_npz(num_rows: int, *, dtype: str = "<i4") -> tuple[io.BytesIO, np.ndarray]:
    values = np.arange(num_rows * 6).reshape(num_rows, 6)
    stream = io.BytesIO()
    np.savez(
        stream,
        X_int=values[:, 1:3].copy().astype(dtype),
        X_cat=values[:, 3:].copy().astype(dtype),
        y=values[:, 0].astype(dtype),
    )
    stream.seek(0)
    return stream, values


@pytest.mark.parametrize("dtype", ["<i4", ">i8", "<u2", "<f4", "<f8"])
@pytest.mark.parametrize("num_rows", [0, 1, 40_000])
def test_every_row_becomes_a_line(num_rows: int, dtype: str):
    if dtype == "<u2":
        num_rows = min(num_rows, 9000)
    stream, values = make_npz(num_rows, dtype=dtype)
    assert npz_widths(stream) == (2, 3)
    stream.seek(0)
    text = NpzLines(stream).read(1 << 30)
    read = [[int(field) for field in line.split(b"\t")] for line in text.splitlines()]
    assert read == values.astype(dtype).astype(np.int64).tolist()


@given(st.lists(st.integers(1, 50), max_size=12))
def test_reads_of_any_size_join_to_the_same_text(sizes: list[int]):
    lines = NpzLines(make_npz(11)[0])
    pieces = [lines.read(size) for size in sizes]
    assert all(len(piece) <= size for piece, size in zip(pieces, sizes, strict=True))
    assert b"".join([*pieces, lines.read(1 << 20)]) == NpzLines(make_npz(11)[0]).read(1 << 20)
    assert lines.read(1) == b"" and not lines.seekable()


@given(st.lists(st.integers(0, 5), max_size=6), st.sampled_from(["int32", "float32", "int64"]))
def test_an_array_written_in_pieces_loads_whole(heights: list[int], dtype: str):
    blocks = [np.arange(3 * height).reshape(height, 3) for height in heights]
    stream = io.BytesIO()
    write_array(stream, blocks, shape=(sum(heights), 3), dtype=np.dtype(dtype))
    stream.seek(0)
    loaded = np.load(stream, allow_pickle=False)
    assert loaded.dtype == dtype and loaded.shape == (sum(heights), 3)
    assert (loaded == np.concatenate([np.empty((0, 3), int), *blocks])).all()


def test_a_missing_row_is_noticed():
    with pytest.raises(ValueError, match="expected 3 rows, found 2"):
        write_array(io.BytesIO(), [np.zeros((2, 1))], shape=(3, 1), dtype=np.dtype("float32"))


def test_arrays_of_many_files_are_read_by_many_threads_at_once(tmp_path: Path):
    for number in range(32):
        np.savez(tmp_path / f"{number}.npz", a=np.full((number, 3), number, np.int32), b=np.arange(number))

    class Cycle:
        """Garbage whose collection lets other threads run."""

        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            time.sleep(0)

    def read(number: int) -> None:
        Cycle()
        with (tmp_path / f"{number % 32}.npz").open("rb") as stream:
            a, b = read_arrays(stream, ("a", "b"))
        np.testing.assert_array_equal(a, np.full((number % 32, 3), number % 32))
        np.testing.assert_array_equal(b, np.arange(number % 32))
        a += 1  # writable

    # collections of garbage are when Python 3.11 fails to parse in two threads
    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(read, range(1500)))
    finally:
        gc.set_threshold(*before)


def test_arrays_of_objects_and_cut_ones_are_refused(tmp_path: Path):
    np.savez(tmp_path / "objects.npz", a=np.array([{}], object))
    with (tmp_path / "objects.npz").open("rb") as stream, pytest.raises(ValueError, match="expected numbers"):
        read_arrays(stream, ("a",))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (5,)})
    with zipfile.ZipFile(tmp_path / "cut.npz", "w") as archive:
        archive.writestr("a.npy", header.getvalue() + bytes(19))
    with (tmp_path / "cut.npz").open("rb") as stream, pytest.raises(ValueError, match="not as long"):
        read_arrays(stream, ("a",))
    with (tmp_path / "cut.npz").open("rb") as stream, pytest.raises(KeyError):
        read_arrays(stream, ("b",))
