from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.ops.npz import NpzLines, npz_widths, write_array


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
