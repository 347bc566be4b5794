"""After a power cut: whatever bears a published name is on disk whole.

A recording layer marks what `os.fsync` was called on, by giving it a time in the past; whatever changes a file or the
names in a folder afterwards gives it the present time again, whoever writes. So at any moment what is not marked may be
lost, and every rename can be judged.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from strategies import tiny_config

from slipstream.io import artifacts
from slipstream.io.artifacts import StageKey, publish, scratch_dir, write_atomically, write_json
from slipstream.pipeline import run_pipeline

KEY = StageKey(stage="profile", config={}, inputs={}, seed=0)
_MARK = 10**9


class Disk:
    """What a power cut would leave, and what was renamed before it was safe."""

    def __init__(self) -> None:
        self.early: list[str] = []

    def is_safe(self, path: Path) -> bool:
        return path.stat().st_mtime_ns == _MARK

    def judge(self, source: Path, target: Path) -> None:
        """Called before a rename."""
        lost = [path for path in (source, *source.rglob("*")) if not self.is_safe(path)]
        self.early += [f"{path.relative_to(source.parent)} before it became {target.name}" for path in lost]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk, fsync = Disk(), os.fsync

    def mark(descriptor: int) -> None:
        fsync(descriptor)
        os.utime(descriptor, ns=(_MARK, _MARK))

    def judged(rename: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def renamed(self: Path, target: Path) -> Path:
            if ".removed" not in str(target):
                disk.judge(self, target)
            return rename(self, target)

        return renamed

    monkeypatch.setattr(os, "fsync", mark)
    monkeypatch.setattr(Path, "rename", judged(Path.rename))
    monkeypatch.setattr(Path, "replace", judged(Path.replace))
    return disk


def publish_something(run_dir: Path) -> Path:
    scratch = scratch_dir(run_dir, KEY)
    (scratch / "train" / "deep").mkdir(parents=True)
    (scratch / "plain").write_text("written by a library")
    (scratch / "train" / "deep" / "plain").write_text("likewise")
    with write_atomically(scratch / "train" / "part") as path:
        path.write_text("written by us")
    write_json(scratch / "work" / "chunk.json", {})
    return publish(run_dir, KEY, {}, seconds=0, peak_bytes=0).path


def test_what_is_published_is_on_disk_before_it_has_its_name(disk: Disk, tmp_path: Path):
    published = publish_something(tmp_path / "runs" / "run")
    assert disk.early == []
    assert all(disk.is_safe(path) for path in (published, *published.rglob("*")))
    assert all(disk.is_safe(folder) for folder in list(published.parents)[:3]), "the name itself may be lost"


def test_every_file_of_a_run_is_on_disk_before_it_has_its_name(disk: Disk, tmp_path: Path):
    run_pipeline(tiny_config(train__checkpoint_steps=5), tmp_path / "runs")
    assert disk.early == []
    found = (tmp_path / "runs").glob("*/*/[0-9a-f]*")
    published = [folder for folder in found if folder.parent.name != artifacts.PARSED]
    assert len(published) == 5
    assert all(disk.is_safe(path) for folder in published for path in (folder, *folder.rglob("*")))


@pytest.mark.parametrize(
    ("left_out", "lost"),
    [
        ("plain", "plain before it became"),
        ("deep", "deep before it became"),
        (".part.tmp", ".part.tmp before it became part"),
        (".manifest.json.tmp", ".manifest.json.tmp before it became manifest.json"),
        (f".{KEY.fingerprint}.partial", f"partial before it became {KEY.fingerprint}"),
    ],
)
def test_leaving_out_a_sync_would_be_noticed(
    left_out: str, lost: str, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sync = artifacts.sync
    monkeypatch.setattr(artifacts, "sync", lambda path: None if path.name == left_out else sync(path))
    publish_something(tmp_path / "runs" / "run")
    assert any(lost in early for early in disk.early)


@pytest.mark.parametrize("left_out", ["profile", "run", "runs"])
def test_leaving_out_a_sync_of_a_parent_would_be_noticed(
    left_out: str, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sync = artifacts.sync
    monkeypatch.setattr(artifacts, "sync", lambda path: None if path.name == left_out else sync(path))
    published = publish_something(tmp_path / "runs" / "run")
    assert [folder.name for folder in list(published.parents)[:3] if not disk.is_safe(folder)] == [left_out]
