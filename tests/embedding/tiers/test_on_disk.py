"""Cold rows in a file: the same bits as in memory, no name, and nothing left."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slipstream.embedding.tiers import on_disk
from slipstream.embedding.tiers.on_disk import DiskRows, RecordFile

MANY = 3 * on_disk._FEW_ROWS
"""Rows that several threads share."""


def make_file(folder: Path, num_records: int = MANY, width: int = 5) -> RecordFile:
    file = RecordFile(folder, num_records, width, torch.float32)
    file.records[:] = torch.arange(num_records * width).view(num_records, width)
    return file


def make_rows(folder: Path, **options: object) -> DiskRows:
    sizes = {"num_rows": 9, "num_hot": 2, "embedding_dim": 3, "num_staged": 6, "optimizer": "rowwise_adagrad"}
    return DiskRows(folder=folder, **(sizes | {"device": torch.device("cpu")} | options))  # type: ignore[arg-type]


def test_threads_read_and_write_what_one_would(tmp_path: Path, rng: np.random.Generator):
    file = make_file(tmp_path)
    expected = file.records.numpy().copy()
    numbers = np.sort(rng.choice(MANY, MANY - 100, replace=False))
    found = np.empty((len(numbers), 5), np.float32)
    file.gather(numbers, found)
    assert np.array_equal(found, expected[numbers])
    expected[numbers] = -found
    file.scatter(numbers, -found)
    assert np.array_equal(file.records.numpy(), expected)


def test_reading_the_file_sees_what_was_written_to_the_map(tmp_path: Path):
    file = make_file(tmp_path)
    file.records[MANY // 2] = -1.0
    assert np.array_equal(file.read(7, MANY - 3), file.records.numpy()[7 : MANY - 3])


def test_threads_wait_for_their_pages_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, waiting = make_file(tmp_path), []
    original = np.take

    def take_slowly(*args: object, **options: object) -> None:
        waiting.append(1)
        deadline = time.monotonic() + 10
        while len(waiting) < on_disk.NUM_THREADS and time.monotonic() < deadline:
            time.sleep(0.001)
        original(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(np, "take", take_slowly)
    file.gather(np.arange(MANY), np.empty((MANY, 5), np.float32))
    assert len(waiting) == on_disk.NUM_THREADS


@given(st.sampled_from(["sgd", "rowwise_adagrad", "adagrad", "adam"]), st.booleans(), st.data())
def test_rows_come_back_as_they_were_loaded(
    tmp_path_factory: pytest.TempPathFactory, optimizer: str, leads: bool, data
):
    slots = torch.tensor(data.draw(st.lists(st.integers(0, 8), min_size=1, max_size=12)))
    rows = make_rows(tmp_path_factory.getbasetemp(), optimizer=optimizer, keeps_lead=leads)
    weights = torch.randn(9, 3)
    state = [torch.rand(shape) for shape in rows.rule.state_shapes((9, 3)).values()]
    rows.load(torch.arange(9), weights, state)
    assert torch.equal(rows.gather(slots), weights[slots])
    for values, kept in zip(state, rows.cold_state, strict=True):
        assert torch.equal(kept, values[2:])
    if leads:
        assert rows.cold_lead is not None
        rows.cold_lead.copy_(torch.full((7, 3), 4.0))
        rows.mean_over = 2
        is_cold = (slots >= 2).unsqueeze(1)
        assert torch.equal(rows.gather(slots), weights[slots] - 2.0 * is_cold)


def test_what_travels_with_a_row_lies_beside_it(tmp_path: Path):
    rows = make_rows(tmp_path, optimizer="adam", keeps_lead=True)
    width = 3 * 4
    assert rows.record_width == width
    for host in rows.on_host:
        assert host.stride(0) == width
        assert host.untyped_storage().data_ptr() == rows.cold.untyped_storage().data_ptr()


def test_the_file_has_no_name_and_its_blocks_go_with_it(tmp_path: Path):
    num_bytes = 64 << 20
    file = RecordFile(tmp_path / "made", num_bytes // 4096, 1024, torch.float32)
    assert list((tmp_path / "made").iterdir()) == []
    assert os.fstat(file._descriptor).st_blocks * 512 >= num_bytes, "all of it is there from the start"
    file.records[:3] = 1.0
    file.close()
    assert os.fstat(file._descriptor).st_blocks * 512 < num_bytes


def test_a_disk_without_room_is_found_before_anything_is_written(tmp_path: Path):
    with pytest.raises(OSError, match=r"No space left|File too large") as caught:
        RecordFile(tmp_path, 1 << 40, 1 << 10, torch.float32)
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)


def test_a_clone_is_what_was_there_at_its_time(tmp_path: Path):
    file = make_file(tmp_path)
    expected = file.records.numpy().copy()
    if not file.clone_to(tmp_path / "clone"):
        pytest.skip("this file system shares no blocks; try --basetemp on btrfs or xfs")
    file.records[:] = -1.0
    assert np.array_equal(np.fromfile(tmp_path / "clone", np.float32).reshape(MANY, 5), expected)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EXDEV])
def test_where_no_clone_can_be_made_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    def refuse(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    assert not make_file(tmp_path).clone_to(tmp_path / "clone")
    assert list(tmp_path.iterdir()) == []


def test_no_clone_is_made_that_the_disk_could_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = make_file(tmp_path)
    monkeypatch.setattr(on_disk.shutil, "disk_usage", lambda path: type("Usage", (), {"free": file.nbytes - 1}))
    monkeypatch.setattr(fcntl, "ioctl", lambda *args: pytest.fail("it was made"))
    assert not file.clone_to(tmp_path / "clone")
