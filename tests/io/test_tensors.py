"""Safetensors written a block at a time: the bytes of the library's own writer."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file, save

from slipstream.errors import CapacityError
from slipstream.io.artifacts import hash_file
from slipstream.io.tensors import StoredTensor, write_tensors

DTYPES = ["int64", "float64", "float32", "int32", "float16", "int16", "int8", "uint8", "bool"]


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    return draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=4)))


@given(st.dictionaries(st.text(min_size=1, max_size=5), arrays(), max_size=6), st.none() | st.text(max_size=5))
def test_the_bytes_are_those_of_the_library(tmp_path_factory: pytest.TempPathFactory, tensors, note: str | None):
    tensors.pop("__metadata__", None)
    metadata = None if note is None else {"note": note}
    path = tmp_path_factory.getbasetemp() / "a.safetensors"
    digest = write_tensors(path, {name: StoredTensor.of(array) for name, array in tensors.items()}, metadata)
    assert path.read_bytes() == save(tensors, metadata)
    assert digest == hash_file(path)


def test_blocks_make_one_tensor(tmp_path: Path):
    array = np.arange(30, dtype=np.float32).reshape(10, 3)
    cut = StoredTensor(dtype=array.dtype, shape=array.shape, blocks=lambda: (array[at : at + 4] for at in (0, 4, 8)))
    write_tensors(tmp_path / "a", {"t": cut})
    assert np.array_equal(load_file(tmp_path / "a")["t"], array)


@pytest.mark.parametrize("length", [9, 11])
def test_blocks_that_are_not_as_long_as_the_shape_says_leave_no_file(tmp_path: Path, length: int):
    wrong = StoredTensor(dtype=np.dtype(np.int8), shape=(10,), blocks=lambda: [np.zeros(length, np.int8)])
    with pytest.raises(ValueError, match=f"expected 10 bytes of tensor t, found {length}"):
        write_tensors(tmp_path / "a", {"t": wrong})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_says_what_was_needed_what_is_free_and_where(tmp_path: Path):
    (tmp_path / ".a.tmp").symlink_to("/dev/full")  # whatever is written there: no space left on device
    large = StoredTensor.of(np.zeros(3 << 20, np.int8))
    with pytest.raises(CapacityError, match=r"no space left while writing `.*/a`; it takes 3\.0 MiB, and .* are free"):
        write_tensors(tmp_path / "a", {"t": large})
    assert list(tmp_path.iterdir()) == []


def test_others_may_read_the_file_as_they_may_read_its_siblings(tmp_path: Path):
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "a", {"t": StoredTensor.of(np.zeros(3))})
        (tmp_path / "sibling").write_text("")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o640}
