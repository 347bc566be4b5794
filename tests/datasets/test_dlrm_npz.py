from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.config import build_pipeline
from slipstream.datasets.dlrm_npz import DlrmNpzSource, build
from slipstream.datasets.source import SourceOptions
from slipstream.errors import DataError
from slipstream.io.raw import read_blocks
from slipstream.pipeline import run_pipeline


def write_npz(path: Path, num_samples: int = 300, **other: Any) -> dict[str, np.ndarray]:
    """A file as DLRM's preprocessing leaves it."""
    rng = np.random.default_rng(5)
    arrays = {
        "X_cat": rng.integers(0, 9, (num_samples, 26), dtype=np.int32),
        "X_int": rng.integers(0, 5000, (num_samples, 13), dtype=np.int32),
        "y": rng.integers(0, 2, num_samples, dtype=np.int32),
        "counts": np.full(26, 9, np.int32),
    } | other
    np.savez_compressed(path, **{name: array for name, array in arrays.items() if array is not None})
    return arrays


def read_text(path: Path, block_bytes: int) -> bytes:
    return b"".join(block.data for block in read_blocks(str(path), file_index=0, block_bytes=block_bytes))


@pytest.mark.parametrize("block_bytes", [100, 4096, 1 << 20])
def test_rows_become_lines_and_samples_again(tmp_path: Path, block_bytes: int):
    arrays = write_npz(tmp_path / "data.npz")
    source = build(SourceOptions(files=[str(tmp_path / "data.npz")]))
    parsed = source.parse(read_text(tmp_path / "data.npz", block_bytes))
    assert (source.num_dense, source.num_tables) == (13, 26)
    assert parsed.num_lines == 300 and not parsed.rejected_lines.size
    assert (parsed.samples["label"].to_numpy() == arrays["y"]).all()
    for name, prefix in (("X_int", "int"), ("X_cat", "cat")):
        columns = [f"{prefix}_{index}" for index in range(arrays[name].shape[1])]
        assert (parsed.samples.select(columns).to_numpy() == arrays[name]).all()


def test_reading_goes_on_where_it_stopped(tmp_path: Path):
    write_npz(tmp_path / "data.npz")
    path = str(tmp_path / "data.npz")
    whole = list(read_blocks(path, file_index=0, block_bytes=5000))
    rest = list(read_blocks(path, file_index=0, block_bytes=5000, skip=whole[1].end, skip_blocks=2))
    assert b"".join(block.data for block in rest) == b"".join(block.data for block in whole[2:])


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.integers(-1, 2), st.integers(-(2**63), 2**63 - 1), st.integers(-2, 2**63 - 1)),
        min_size=1,
        max_size=20,
    )
)
def test_parsing_agrees_with_a_plain_reader(rows: list[tuple[int, int, int]]):
    source = DlrmNpzSource(num_dense=1, num_tables=1)
    data = b"".join(b"%d\t%d\t%d\n" % row for row in rows)
    parsed = source.parse(data)
    good = [row for row in rows if row[0] in (0, 1) and row[2] >= 0]
    assert parsed.samples.rows() == good
    assert parsed.rejected_lines.tolist() == [n for n, row in enumerate(rows) if row not in good]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"1\t2", "expected 3 numbers, found 2"),
        (b"2\t2\t3", "y: expected 0 or 1, found '2'"),
        (b"1\t0.5\t3", "int_0: expected a 64-bit integer, found '0.5'"),
        (b"1\t2\t-3", "cat_0: expected an id of at least 0, found '-3'"),
    ],
)
def test_what_is_no_sample_is_rejected_with_its_reason(line: bytes, reason: str):
    source = DlrmNpzSource(num_dense=1, num_tables=1)
    assert source.parse(line + b"\n").rejected_lines.tolist() == [0]
    assert source.explain(line) == reason


def test_floats_that_are_whole_count_as_integers_and_others_are_rejected(tmp_path: Path):
    dense = np.zeros((300, 13))
    dense[7, 2] = 0.5
    write_npz(tmp_path / "data.npz", X_int=dense)
    source = build(SourceOptions(files=[str(tmp_path / "data.npz")]))
    assert source.parse(read_text(tmp_path / "data.npz", 1 << 20)).rejected_lines.tolist() == [7]
    write_npz(tmp_path / "whole.npz", X_int=np.rint(dense), y=np.ones((300, 1), np.float32))
    assert not source.parse(read_text(tmp_path / "whole.npz", 1 << 20)).rejected_lines.size


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("block_bytes", [20_000, 1 << 20])
def test_what_dlrm_writes_is_read(tmp_path: Path, save: Callable[..., None], block_bytes: int):
    rng = np.random.default_rng(6)
    columns = rng.integers(0, 10_000_000, (26, 9000)).astype(np.float64)
    dense = rng.integers(-2, 5000, (13, 9000)).astype(np.int32)
    labels = rng.integers(0, 2, 9000).astype(np.int32)
    save(tmp_path / "day.npz", X_cat=np.transpose(columns), X_int=np.transpose(dense), y=labels)
    source = build(SourceOptions(files=[str(tmp_path / "day.npz")]))
    parsed = source.parse(read_text(tmp_path / "day.npz", block_bytes))
    assert not parsed.rejected_lines.size
    assert (parsed.samples["label"].to_numpy() == labels).all()
    assert (parsed.samples.select([f"cat_{index}" for index in range(26)]).to_numpy() == columns.T).all()
    assert (parsed.samples.select([f"int_{index}" for index in range(13)]).to_numpy() == dense.T).all()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_column_of_dlrm_is_a_data_error(tmp_path: Path, save: Callable[..., None]):
    save(tmp_path / "day.npz", X_cat=np.zeros((26, 3000)).T, X_int=np.zeros((13, 3000)).T, y=np.zeros(3000))
    content = bytearray((tmp_path / "day.npz").read_bytes())
    content[400] ^= 4
    (tmp_path / "day.npz").write_bytes(content)
    with pytest.raises(DataError, match="is not a sound"):
        read_text(tmp_path / "day.npz", 1000)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"y": None}, "expected the arrays y, X_int, X_cat, found X_cat, X_int, counts"),
        ({"y": np.zeros(7, np.int32)}, "expected arrays of one length, found \\[7, 300\\]"),
        ({"X_int": np.zeros(300)}, "expected X_int with one row per sample"),
        ({"y": np.zeros((300, 1, 1))}, "expected y with one row per sample"),
        ({"X_cat": np.full((300, 26), "x")}, "expected numbers in X_cat"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, other: dict[str, Any], message: str):
    write_npz(tmp_path / "data.npz", **other)
    with pytest.raises(DataError, match=message):
        build(SourceOptions(files=[str(tmp_path / "data.npz")]))


def test_pickles_and_text_are_refused(tmp_path: Path):
    write_npz(tmp_path / "data.npz", X_cat=np.array([[None] * 26] * 300))
    with pytest.raises(DataError, match="expected numbers in X_cat, found object"):
        build(SourceOptions(files=[str(tmp_path / "data.npz")]))
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(DataError, match="expected an npz file"):
        build(SourceOptions(files=[str(tmp_path / "text.npz")]))
    np.savez(tmp_path / "empty.npz")
    with pytest.raises(DataError, match="expected the arrays y, X_int, X_cat, found none"):
        build(SourceOptions(files=[str(tmp_path / "empty.npz")]))
    with zipfile.ZipFile(tmp_path / "lzma.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("y.npy", bytes(80))
    with pytest.raises(DataError, match="array y is compressed in a way that numpy does not write"):
        build(SourceOptions(files=[str(tmp_path / "lzma.npz")]))


def test_files_of_other_widths_are_refused(tmp_path: Path):
    write_npz(tmp_path / "a.npz")
    write_npz(tmp_path / "b.npz", X_int=np.zeros((300, 2), np.int32))
    with pytest.raises(DataError, match="has \\(2, 26\\) dense and sparse columns"):
        build(SourceOptions(files=[str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]))


def test_a_file_that_ends_early_is_a_data_error(tmp_path: Path):
    write_npz(tmp_path / "data.npz")
    whole = (tmp_path / "data.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="is not a sound npz file"):
        read_text(tmp_path / "cut.npz", 1000)


def test_an_imported_file_goes_through_the_pipeline(tmp_path: Path):
    arrays = write_npz(tmp_path / "data.npz", num_samples=2000)
    config = build_pipeline(
        {
            "name": "imported",
            "dataset": {"source": "dlrm_npz", "raw": [str(tmp_path / "data.npz")]},
            "preprocess": {"chunk_bytes": 20_000},
            "model": {"embedding_dim": 4, "bottom_mlp": [4], "top_mlp": [1]},
            "segregate": {"hot_budget": "50%"},
            "train": {"batch_size": 128, "mode": "fae", "device": "cpu"},
        }
    )
    result = run_pipeline(config, tmp_path / "runs")
    processed = result.stages["preprocess"].artifact
    assert processed.counts["lines"] == 2000 == sum(processed.counts["samples"].values())
    assert sum(processed.counts["positives"].values()) == arrays["y"].sum()
    train = pl.read_parquet(processed.path / "train/*.parquet")
    expected = np.log1p(arrays["X_int"][: train.height]).astype(np.float32)
    assert np.allclose(train.select([f"int_{i}" for i in range(13)]).to_numpy(), expected)
    assert result.counts("train")["test"]["logloss"] > 0
