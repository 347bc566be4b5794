from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import make_samples, sample_numbers

from slipstream.errors import ArtifactError
from slipstream.io.samples import Samples, concat_samples, count_samples, read_part, read_rows, read_shard, write_shard


def write_part(path: Path) -> pl.DataFrame:
    frame = pl.DataFrame(
        {
            "label": pl.Series([1, 0, 1], dtype=pl.UInt8),
            "int_0": pl.Series([0.5, 1.5, 2.5], dtype=pl.Float32),
            "cat_0": pl.Series([0, 1, 1], dtype=pl.Int32),
            "cat_1": pl.Series([2, 0, 1], dtype=pl.Int32),
        }
    )
    frame.write_parquet(path)
    return frame


def test_taking_samples_is_indexing_every_field(rng: np.random.Generator):
    samples = make_samples(rng.integers(0, 9, (20, 3)))
    samples = Samples(X_int=samples.X_int, X_cat=samples.X_cat, y=samples.y, weights=rng.random(20))
    for picked in (slice(3, 9), rng.random(20) < 0.5, rng.permutation(20), np.array([4, 4, 0]), np.empty(0, np.int64)):
        taken = samples.take(picked)
        for name in ("X_int", "X_cat", "y", "weights"):
            assert np.array_equal(getattr(taken, name), getattr(samples, name)[picked])


@pytest.mark.parametrize("picked", [[0, 20], [-1, 3]])
def test_numbers_outside_the_samples_are_refused(picked: list[int]):
    samples = make_samples(np.zeros((20, 1), int))
    with pytest.raises(IndexError, match=r"expected numbers of samples in \[0, 20\)"):
        samples.take(np.array(picked))


@pytest.mark.parametrize("num_samples", [0, 1, 50])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_a_shard_reads_back_as_it_was_written(tmp_path: Path, num_samples: int, dtype: type):
    samples = make_samples(np.arange(num_samples * 4).reshape(num_samples, 4))
    samples = Samples(X_int=samples.X_int, X_cat=samples.X_cat.astype(dtype), y=samples.y)
    write_shard(tmp_path / "shard.npz", samples)
    again = read_shard(tmp_path / "shard.npz")
    for name in ("X_int", "X_cat", "y"):
        written, read = getattr(samples, name), getattr(again, name)
        assert read.dtype == written.dtype
        np.testing.assert_array_equal(read, written)
    assert [entry.name for entry in tmp_path.iterdir()] == ["shard.npz"]


def test_a_shard_with_a_pickle_is_refused(tmp_path: Path):
    class Boom:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was loaded",))

    path = tmp_path / "shard.npz"
    np.savez(path, X_int=np.array([Boom()], object), X_cat=np.zeros((1, 1)), y=np.zeros(1))
    with pytest.raises(ArtifactError, match="npz shard") as caught:
        read_shard(path)
    assert "slipstream segregate --force" in str(caught.value.hint)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"plain text", b"\x93NUMPY"])
def test_what_is_no_shard_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "shard.npz"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="npz shard"):
        read_shard(path)


def test_a_shard_cut_short_or_lacking_an_array_is_refused(tmp_path: Path):
    path = tmp_path / "shard.npz"
    write_shard(path, make_samples(np.zeros((9, 2), int)))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ArtifactError, match="npz shard"):
        read_shard(path)
    np.savez(path, X_int=np.zeros((1, 1)), y=np.zeros(1))
    with pytest.raises(ArtifactError, match="X_cat"):
        read_shard(path)


def test_rows_of_a_part_are_numbered_over_all_tables(tmp_path: Path):
    write_part(tmp_path / "part.parquet")
    rows = read_rows(tmp_path / "part.parquet", ["cat_0", "cat_1"], np.array([0, 2, 5]))
    assert rows.tolist() == [[0, 4], [1, 2], [1, 3]]
    assert rows.dtype == np.int32
    assert count_samples(tmp_path / "part.parquet") == 3


def test_rows_that_do_not_fit_32_bits_are_64(tmp_path: Path):
    write_part(tmp_path / "part.parquet")
    rows = read_rows(tmp_path / "part.parquet", ["cat_0", "cat_1"], np.array([0, 2**31 - 1, 2**31 + 2]))
    assert rows.dtype == np.int64
    assert rows[0].tolist() == [0, 2**31 + 1]


def test_a_part_is_read_with_slots_for_rows(tmp_path: Path):
    write_part(tmp_path / "part.parquet")
    maps = [np.array([3, 0], np.int32), np.array([1, 4, 2], np.int32)]
    samples = read_part(tmp_path / "part.parquet", ["int_0"], ["cat_0", "cat_1"], maps)
    assert samples.X_cat.tolist() == [[3, 2], [0, 1], [0, 4]]
    assert samples.X_int.tolist() == [[0.5], [1.5], [2.5]]
    assert samples.y.tolist() == [1, 0, 1]
    assert (samples.X_int.dtype, samples.X_cat.dtype, samples.y.dtype) == (np.float32, np.int32, np.float32)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_pieces_are_joined_in_order(sizes: list[int]):
    starts = np.cumsum([0, *sizes])
    pieces = [make_samples(np.zeros((size, 2), int), start=start) for size, start in zip(sizes, starts, strict=False)]
    joined = concat_samples(pieces)
    assert sample_numbers(joined) == list(range(sum(sizes)))
    assert len(joined) == sum(sizes)
    assert joined.weights is None


def test_pieces_with_and_without_weights_join_with_ones():
    plain, weighted = make_samples(np.zeros((2, 1), int)), make_samples(np.zeros((1, 1), int))
    weighted = Samples(X_int=weighted.X_int, X_cat=weighted.X_cat, y=weighted.y, weights=np.array([3], np.float32))
    joined = concat_samples([plain, weighted, plain])
    assert joined.weights is not None
    assert joined.weights.tolist() == [1, 1, 3, 1, 1]
    assert joined.take(slice(2, 4)).weights.tolist() == [3, 1]  # type: ignore[union-attr]
