from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from slipstream.errors import ArtifactError
from slipstream.io.parsed import ParsedChunk, ParsedStore, dictionary_of

SAMPLES = pl.DataFrame(
    {
        "label": pl.Series([1, 0, 1], dtype=pl.UInt8),
        "int_0": pl.Series([5, None, -(2**31)], dtype=pl.Int64),
        "int_1": pl.Series([2**40, None, 1], dtype=pl.Int64),
        "cat_0": pl.Series([7, 7, -(2**63)], dtype=pl.Int64),
    }
)


def chunk_of(block_index: int, *, num_samples: int = 3, num_rejected: int = 0) -> ParsedChunk:
    return ParsedChunk(
        file_index=0,
        block_index=block_index,
        num_lines=num_samples + num_rejected,
        num_samples=num_samples,
        num_rejected=num_rejected,
        end=100 * (block_index + 1),
        day_counts={"0": num_samples},
    )


def write(store: ParsedStore, chunk: ParsedChunk, samples: pl.DataFrame = SAMPLES, rejects=()) -> None:
    store.write(chunk, samples, list(rejects), ["int_0", "int_1"])


def test_a_chunk_reads_back_with_missing_numbers_as_zero(tmp_path: Path):
    store = ParsedStore(tmp_path / "parsed")
    write(store, chunk_of(0))
    table = store.open(chunk_of(0), ["label", "int_0", "int_1", "cat_0"])
    assert table.column("int_0").to_pylist() == [5, 0, -(2**31)]
    assert table.column("int_1").to_pylist() == [2**40, 0, 1]
    assert [str(table.schema.field(name).type) for name in ("int_0", "int_1")] == ["int32", "int64"]
    raw_ids, codes = dictionary_of(table, "cat_0")
    assert raw_ids[codes].tolist() == [7, 7, -(2**63)]
    assert len(raw_ids) == len(np.unique(raw_ids))


def test_a_chunk_knows_which_numbers_were_missing(tmp_path: Path):
    store = ParsedStore(tmp_path / "parsed")
    write(store, chunk_of(0))
    write(store, chunk_of(1), SAMPLES.with_columns(int_1=pl.lit(3, pl.Int64)))
    missing = store.missing(chunk_of(0), "int_0")
    assert missing is not None and missing.tolist() == [False, True, False]
    assert store.missing(chunk_of(1), "int_1") is None


def test_a_chunk_without_samples_keeps_its_columns(tmp_path: Path):
    store = ParsedStore(tmp_path / "parsed")
    write(store, chunk_of(0, num_samples=0), SAMPLES.clear())
    table = store.open(chunk_of(0), ["label", "int_0", "cat_0"])
    raw_ids, codes = dictionary_of(table, "cat_0")
    assert (table.num_rows, len(raw_ids), len(codes)) == (0, 0, 0)


def test_rejects_keep_their_place_reason_and_bytes(tmp_path: Path):
    store = ParsedStore(tmp_path / "parsed")
    write(store, chunk_of(0, num_rejected=2), rejects=[(1, "too short", b"\xff\t"), (4, "no label", b"")])
    rows = store.rejects(chunk_of(0)).rows()
    assert rows == [(1, "too short", b"\xff\t"), (4, "no label", b"")]


def test_finished_chunks_end_at_the_first_gap_and_the_rest_is_removed(tmp_path: Path):
    store = ParsedStore(tmp_path)
    for index in (0, 1, 3):
        write(store, chunk_of(index))
    (tmp_path / "00000-000002.arrow").write_bytes(b"half")  # killed before its .json
    assert store.finished(0) == [chunk_of(0), chunk_of(1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"00000-00000{index}.{kind}" for index in (0, 1) for kind in ("arrow", "json")
    ]
    assert store.finished(1) == []


def test_a_file_is_complete_only_when_it_says_so(tmp_path: Path):
    store = ParsedStore(tmp_path)
    write(store, chunk_of(0))
    assert not store.is_complete(0, 1)
    store.mark_complete(0, 1)
    assert store.is_complete(0, 1)
    assert not store.is_complete(0, 0), "a chunk of it is gone"
    assert store.finished(0) == [chunk_of(0)]


@pytest.mark.parametrize("kind", ["arrow", "rejects.parquet", "json"])
@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: bytes(99) + content[99:]])
def test_an_altered_chunk_is_none(tmp_path: Path, kind: str, damage: Callable[[bytes], bytes]):
    store = ParsedStore(tmp_path)
    for index in (0, 1, 2):
        write(store, chunk_of(index, num_rejected=1), rejects=[(1, "too short", b"x")])
    altered = tmp_path / f"00000-000001.{kind}"
    altered.write_bytes(damage(altered.read_bytes()))
    assert store.finished(0) == [chunk_of(0, num_rejected=1)]
    assert not altered.exists(), "it is removed, to be made again"


def test_a_missing_chunk_is_an_artifact_error(tmp_path: Path):
    with pytest.raises(ArtifactError, match="expected a parsed chunk"):
        ParsedStore(tmp_path).open(chunk_of(0), ["label"])
