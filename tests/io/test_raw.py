from __future__ import annotations

import gzip
from pathlib import Path

import fsspec
import polars as pl
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from slipstream.errors import DataError
from slipstream.io import raw
from slipstream.io.raw import estimate_text_bytes, find_raw_files, fingerprint_raw, raw_size, read_blocks

TEXT = b"".join(b"line %d of some length\n" % number for number in range(500))


def pack(name: str, text: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(text)
    return zstandard.compress(text) if name.endswith(".zst") else text


@pytest.mark.parametrize("name", ["log", "log.gz", "log.zst"])
@pytest.mark.parametrize("block_bytes", [1, 100, 4096, 1 << 20])
def test_blocks_are_whole_lines_and_join_to_the_text(tmp_path: Path, name: str, block_bytes: int):
    path = tmp_path / name
    path.write_bytes(pack(name, TEXT))
    blocks = list(read_blocks(str(path), file_index=3, block_bytes=block_bytes))
    assert b"".join(block.data for block in blocks) == TEXT
    assert all(block.data.endswith(b"\n") for block in blocks)
    assert [block.block_index for block in blocks] == list(range(len(blocks)))
    assert blocks[-1].end == len(TEXT) and {block.file_index for block in blocks} == {3}


@pytest.mark.parametrize("name", ["log", "log.gz", "log.zst"])
@pytest.mark.parametrize("block_bytes", [64, 5000])
def test_reading_goes_on_after_any_block_with_another_block_size(tmp_path: Path, name: str, block_bytes: int):
    path = tmp_path / name
    path.write_bytes(pack(name, b"\xef\xbb\xbf" + TEXT))
    first = list(read_blocks(str(path), file_index=0, block_bytes=1000))
    for done in sorted({1, len(first) // 2 or 1, len(first)}):
        rest = read_blocks(str(path), file_index=0, block_bytes=block_bytes, skip=first[done - 1].end, skip_blocks=done)
        blocks = [*first[:done], *rest]
        assert b"".join(block.data for block in blocks) == TEXT
        assert [block.block_index for block in blocks] == list(range(len(blocks)))


@given(
    text=st.lists(st.sampled_from([b"a", b"\n", b"\r\n", b"\xef\xbb\xbf", b"\0", b"word\t"])).map(b"".join),
    block_bytes=st.integers(1, 9),
)
def test_no_byte_is_lost_or_moved_whatever_the_text(tmp_path_factory, text: bytes, block_bytes: int):
    path = tmp_path_factory.mktemp("raw") / "log"
    path.write_bytes(text)
    blocks = list(read_blocks(str(path), file_index=0, block_bytes=block_bytes))
    assert b"".join(block.data for block in blocks) == text.removeprefix(b"\xef\xbb\xbf")
    assert all(block.data.endswith(b"\n") for block in blocks[:-1])


def test_two_zstd_frames_and_two_gzip_members_read_as_one(tmp_path: Path):
    for name in ("log.gz", "log.zst"):
        (tmp_path / name).write_bytes(pack(name, TEXT[:700]) + pack(name, TEXT[700:]))
        blocks = read_blocks(str(tmp_path / name), file_index=0, block_bytes=256)
        assert b"".join(block.data for block in blocks) == TEXT


@pytest.mark.parametrize("name", ["log.gz", "log.zst"])
@pytest.mark.parametrize("kept", [5, 0.5, -1])
def test_a_truncated_file_is_an_error_not_an_end(tmp_path: Path, name: str, kept: float):
    packed = pack(name, TEXT)
    (tmp_path / name).write_bytes(packed[: int(len(packed) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(DataError, match=r"truncated|not a sound"):
        list(read_blocks(str(tmp_path / name), file_index=0, block_bytes=100))


@pytest.mark.parametrize("name", ["log.gz", "log.zst"])
def test_trailing_garbage_is_an_error_that_names_the_file(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(pack(name, TEXT) + b"garbage after the end")
    with pytest.raises(DataError, match=r"log\.(gz|zst)` is not a sound compressed file"):
        list(read_blocks(str(tmp_path / name), file_index=0, block_bytes=100))


def test_a_file_that_never_ends_its_line_is_refused_in_bounded_memory(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(raw, "_LONGEST_LINE", 10_000)
    (tmp_path / "log").write_bytes(b"\0" * 50_000)
    with pytest.raises(DataError, match="no line end"):
        list(read_blocks(str(tmp_path / "log"), file_index=0, block_bytes=1000))


def test_parquet_rows_come_in_blocks_and_go_on_after_any_row(tmp_path: Path):
    frame = pl.DataFrame({"label": list(range(1000))})
    frame.write_parquet(tmp_path / "log.parquet", row_group_size=70)
    read = list(read_blocks(str(tmp_path / "log.parquet"), file_index=0, block_bytes=512 * 33))
    assert pl.concat([block.data for block in read]).equals(frame)
    rest = list(
        read_blocks(str(tmp_path / "log.parquet"), file_index=0, block_bytes=512 * 90, skip=read[4].end, skip_blocks=5)
    )
    assert pl.concat([block.data for block in (*read[:5], *rest)]).equals(frame)
    assert rest[0].block_index == 5 and rest[-1].end == 1000


def test_a_broken_parquet_file_is_a_data_error(tmp_path: Path):
    pl.DataFrame({"label": [0, 1]}).write_parquet(tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    for broken in (b"", b"PAR1", whole[:-9], b"0" * 1000):
        (tmp_path / "a.parquet").write_bytes(broken)
        with pytest.raises(DataError, match="not a sound Parquet file"):
            list(read_blocks(str(tmp_path / "a.parquet"), file_index=0, block_bytes=100))


def test_files_are_found_in_the_order_given_and_globs_in_name_order(tmp_path: Path):
    for name in ("b.tsv", "a.tsv", "c.gz"):
        (tmp_path / name).touch()
    found = find_raw_files([str(tmp_path / "c.gz"), str(tmp_path / "*.tsv")])
    assert [Path(path).name for path in found] == ["c.gz", "a.tsv", "b.tsv"]


def test_remote_files_are_found_sized_and_read(tmp_path: Path):
    for name in ("day_1", "day_0"):
        with fsspec.open(f"memory://raw-test/{name}", "wb") as remote:
            remote.write(TEXT)
    found = find_raw_files(["memory://raw-test/day_*"])
    assert [path.rpartition("/")[2] for path in found] == ["day_0", "day_1"]
    assert raw_size(found[0]) == len(TEXT)
    (tmp_path / "local").write_bytes(TEXT)
    assert fingerprint_raw(found[0]) == fingerprint_raw(str(tmp_path / "local"))
    blocks = read_blocks(found[0], file_index=0, block_bytes=1000)
    assert b"".join(block.data for block in blocks) == TEXT


@pytest.mark.parametrize(
    "pattern", ["nowhere/log.tsv", "nowhere/*.gz", "memory://nowhere/log", "nosuchprotocol://bucket/log"]
)
def test_a_missing_file_is_a_data_error(pattern: str):
    with pytest.raises(DataError, match=r"dataset\.raw"):
        find_raw_files([pattern])


def test_a_folder_is_not_a_raw_file(tmp_path: Path):
    with pytest.raises(DataError, match="names the folder"):
        find_raw_files([str(tmp_path)])


def test_fingerprints_follow_content_not_names(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(raw, "_WHOLE_HASH_BYTES", 1000)
    monkeypatch.setattr(raw, "_SAMPLE_BYTES", 16)
    paths = [tmp_path / name for name in ("a", "b", "c", "d")]
    texts = (TEXT, TEXT, TEXT[:-1] + b"!", TEXT + b"x")
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text)
    prints = [fingerprint_raw(str(path)) for path in paths]
    assert prints[0] == prints[1] and len(set(prints)) == 3


@pytest.mark.parametrize("name", ["log", "log.gz", "log.zst"])
def test_text_bytes_are_estimated_from_the_first_of_them(tmp_path: Path, monkeypatch, name: str):
    text = TEXT * 40
    (tmp_path / name).write_bytes(pack(name, text))
    assert estimate_text_bytes(str(tmp_path / name)) == len(text)
    monkeypatch.setattr(raw, "_ESTIMATE_BYTES", 1000)
    assert estimate_text_bytes(str(tmp_path / name)) > 0
