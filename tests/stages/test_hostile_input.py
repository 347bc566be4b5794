"""Whatever is in the raw files and on the disk: a clear outcome, nothing lost, no traceback, the right exit code."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from raw_logs import invoke, make_lines, read_rejects, sample_line, start, write_pipeline, write_raw

from slipstream.config import load_pipeline
from slipstream.datasets.criteo import CriteoSource
from slipstream.io import artifacts
from slipstream.io.artifacts import find_place
from slipstream.io.locks import hold_artifact
from slipstream.pipeline import Run


@pytest.fixture(scope="module")
def lines() -> list[bytes]:
    return make_lines(2100)


def counts_of(runs: Path) -> dict:
    [folder] = (runs / "run" / "preprocess").glob("[0-9a-f]*")
    return json.loads((folder / "manifest.json").read_text())["counts"] | {"folder": folder}


def run(tmp_path: Path, raw: Path, *overrides: str) -> dict:
    """Run the stage, which must succeed; returns its counts."""
    result = invoke("preprocess", write_pipeline(tmp_path / "run.toml", raw), tmp_path / "runs", *overrides)
    assert result.exit_code == 0, result.output
    return counts_of(tmp_path / "runs")


def fail(tmp_path: Path, raw: Path | str, *overrides: str) -> str:
    """Run the stage, which must fail as expected failures do; returns what it says."""
    result = invoke("preprocess", write_pipeline(tmp_path / "run.toml", raw), tmp_path / "runs", *overrides)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.output.startswith("error: ") and "Traceback" not in result.output
    assert not list((tmp_path / "runs").glob("run/preprocess/[0-9a-f]*"))
    return result.output


def test_a_line_of_many_chunks_is_one_reject(tmp_path: Path, lines: list[bytes]):
    long = b"x" * 10_000_000
    raw = write_raw(tmp_path / "log", [*lines[:1000], long, *lines[1000:]])
    counts = run(tmp_path, raw, "preprocess.chunk_bytes=100000")
    assert counts["rejected"] == 1 and sum(counts["samples"].values()) == 2100
    rejects = read_rejects(counts["folder"])
    assert rejects["line"].to_list() == [1001] and rejects["content"][0] == long


BAD_LINES = [
    (b"\0" * 50, "expected 40 fields, found 1"),
    (sample_line(token="0000\x00000"), "cat_0: expected up to 8 hex digits"),
    (sample_line(dense="1\x00"), "int_0: expected an integer"),
    (sample_line().replace(b"a", b"\xff"), "cat_0: expected up to 8 hex digits"),
    (b"\xef\xbb\xbf" + sample_line(), "label: expected 0 or 1"),
    (sample_line(dense=str(2**63)), "int_0: expected a 64-bit integer"),
    (sample_line(dense="9" * 5000), "int_0: expected a 64-bit integer"),
    (sample_line(dense="-9223372036854775809"), "int_0: expected a 64-bit integer"),
    (sample_line(dense="1.0"), "int_0: expected an integer"),
    (sample_line(dense="1e3"), "int_0: expected an integer"),
    (sample_line(dense="nan"), "int_0: expected an integer"),
    (sample_line(dense=" 1"), "int_0: expected an integer"),
    (sample_line(token="xyz"), "cat_0: expected up to 8 hex digits"),
    (sample_line(token="-1"), "cat_0: expected up to 8 hex digits"),
    (sample_line(token="+1"), "cat_0: expected up to 8 hex digits"),
    (sample_line(token="0x1f"), "cat_0: expected up to 8 hex digits"),
    (sample_line(token="123456789"), "cat_0: expected up to 8 hex digits"),
    (sample_line(token="000000001"), "cat_0: expected up to 8 hex digits"),
    (sample_line(label=""), "label: expected 0 or 1"),
    (sample_line(label="-1"), "label: expected 0 or 1"),
    (sample_line(label="01"), "label: expected 0 or 1"),
    (sample_line() + b"\t", "expected 40 fields, found 41"),
    (sample_line().rpartition(b"\t")[0], "expected 40 fields, found 39"),
    (b"", "expected 40 fields, found 1"),
    (b'"' + sample_line() + b'"', "label: expected 0 or 1"),
    (b"x^" + sample_line(), "label: expected 0 or 1"),
    (b"\x1f\x8b" + sample_line(), "label: expected 0 or 1"),
    (b"\x28\xb5\x2f\xfd" + sample_line(), "label: expected 0 or 1"),
]


def test_every_bad_line_is_rejected_with_its_reason_and_no_other(tmp_path: Path, lines: list[bytes]):
    mixed: list[bytes] = []
    expected = []
    for number, (line, reason) in enumerate(BAD_LINES):
        mixed += [*lines[60 * number : 60 * number + 60], line]
        expected.append((len(mixed), reason, line))
    raw = write_raw(tmp_path / "log", [*mixed, *lines[60 * len(BAD_LINES) :]])
    for runs, chunk_bytes in (("a", 8192), ("b", 1 << 20)):
        (tmp_path / runs).mkdir()
        cuts = (f"preprocess.chunk_bytes={chunk_bytes}", "preprocess.max_reject_ratio=0.02")
        counts = run(tmp_path / runs, raw, *cuts)
        assert counts["rejected"] == len(BAD_LINES) and sum(counts["samples"].values()) == 2100
        found = read_rejects(counts["folder"]).select("line", "reason", "content").rows()
        assert [(line, content) for line, _, content in found] == [(line, content) for line, _, content in expected]
        for (_, said, _), (_, reason, _) in zip(found, expected, strict=True):
            assert said.startswith(reason)


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_line_that_begins_a_chunk_is_rejected_too(lines: list[bytes], line: bytes, reason: str):
    parsed = CriteoSource().parse(b"\n".join([line, *lines[:5]]) + b"\n")
    assert parsed.rejected_lines.tolist() == [0] and parsed.samples.height == 5
    assert CriteoSource().explain(line).startswith(reason)


def test_integers_that_fit_64_bits_are_samples(tmp_path: Path, lines: list[bytes]):
    given = ["-5", "-0", "+5", "007", str(2**63 - 1), str(-(2**63)), ""]
    raw = write_raw(tmp_path / "log", [*lines, *(sample_line(dense=dense) for dense in given)])
    assert run(tmp_path, raw)["rejected"] == 0


def test_crlf_a_bom_and_a_missing_last_newline_change_nothing(tmp_path: Path, lines: list[bytes]):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = run(tmp_path / "a", write_raw(tmp_path / "log", lines))
    (tmp_path / "windows").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    odd = run(tmp_path / "b", tmp_path / "windows", "preprocess.chunk_bytes=20000")
    for name in ("train/part-00000.parquet", "vocab/cat_3.parquet"):
        assert (odd["folder"] / name).read_bytes() == (plain["folder"] / name).read_bytes()
    assert odd["rejected"] == 0


def test_an_empty_file_says_so(tmp_path: Path):
    for name in ("log", "log.gz", "log.zst"):
        assert "the raw files are empty" in fail(tmp_path, write_raw(tmp_path / name, []))
        (tmp_path / name).write_bytes(b"")
        assert "the raw files are empty" in fail(tmp_path, tmp_path / name)


def test_an_empty_file_among_others_is_fine(tmp_path: Path, lines: list[bytes]):
    (tmp_path / "day_0").touch()
    write_raw(tmp_path / "day_1", lines)
    assert run(tmp_path, tmp_path / "day_*")["lines"] == 2100


def test_a_gzip_file_with_trailing_garbage_names_it(tmp_path: Path, lines: list[bytes]):
    (tmp_path / "log.gz").write_bytes(gzip.compress(b"\n".join(lines)) + b"garbage")
    assert "log.gz` is not a sound compressed file" in fail(tmp_path, tmp_path / "log.gz")


def test_a_flipped_bit_in_a_gzip_file_is_said_to_be_damage(tmp_path: Path, lines: list[bytes]):
    packed = write_raw(tmp_path / "log.gz", lines).read_bytes()
    said = set()
    for place in range(20, len(packed), len(packed) // 40):
        (tmp_path / "log.gz").write_bytes(packed[:place] + bytes([packed[place] ^ 16]) + packed[place + 1 :])
        said.add(fail(tmp_path, tmp_path / "log.gz").partition(":")[2].partition(":")[0].partition(" is ")[2])
    assert said <= {"not a sound compressed file", "truncated"} and said


@pytest.mark.parametrize("name", ["log.gz", "log.zst"])
def test_a_truncated_file_is_said_to_be_truncated(tmp_path: Path, lines: list[bytes], name: str):
    packed = write_raw(tmp_path / name, lines).read_bytes()
    (tmp_path / name).write_bytes(packed[: len(packed) * 2 // 3])
    assert "is truncated" in fail(tmp_path, tmp_path / name, "preprocess.chunk_bytes=20000")
    (tmp_path / name).write_bytes(packed)
    assert run(tmp_path, tmp_path / name)["lines"] == 2100


def test_a_text_file_with_a_compressed_name_is_not_sound(tmp_path: Path, lines: list[bytes]):
    for name in ("log.gz", "log.zst", "log.parquet"):
        (tmp_path / name).write_bytes(b"\n".join(lines))
        assert "is not a sound" in fail(tmp_path, tmp_path / name)


def test_a_binary_file_is_refused_with_examples(tmp_path: Path):
    (tmp_path / "log").write_bytes(bytes(range(256)) * 5000)
    said = fail(tmp_path, tmp_path / "log")
    assert "5,001 of 5,001 lines are no samples" in said and "log, line 1: expected 40 fields" in said
    (tmp_path / "other").write_bytes(zstandard.compress(os.urandom(100_000)))
    assert "are no samples" in fail(tmp_path, tmp_path / "other")


def test_a_missing_file_is_named(tmp_path: Path):
    assert "nowhere.tsv" in fail(tmp_path, tmp_path / "nowhere.tsv")


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def make_loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (make_pipe, "which is a named pipe, expected a file"),
        (make_socket, "which is a socket, expected a file"),
        (lambda path: path.symlink_to("/dev/zero"), "which is a device, expected a file"),
        (make_loop, "Too many levels of symbolic links"),
        (Path.mkdir, "names the folder"),
    ],
    ids=["pipe", "socket", "device", "loop", "folder"],
)
@pytest.mark.parametrize("pattern", ["log", "lo?"])
def test_what_is_no_file_is_named(tmp_path: Path, make: Callable[[Path], None], said: str, pattern: str):
    make(tmp_path / "log")
    message = fail(tmp_path, tmp_path / pattern)
    assert said in message and str(tmp_path / "log") in message


@pytest.mark.parametrize("label", [b"0", b"1"])
def test_one_class_in_training_stops_the_run(tmp_path: Path, lines: list[bytes], label: bytes):
    message = fail(tmp_path, write_raw(tmp_path / "log", [label + line[1:] for line in lines]))
    assert f"every one of 1,800 training samples has label {label.decode()}: there is nothing to learn" in message


def test_one_class_held_out_is_a_warning(tmp_path: Path, lines: list[bytes]):
    counts = run(tmp_path, write_raw(tmp_path / "log", [*lines[:1800], *(b"0" + line[1:] for line in lines[1800:])]))
    assert [text.partition(":")[0] for text in counts["warnings"]] == [
        f"every label of split {split} is 0" for split in ("val", "test")
    ]
    assert counts["positives"]["val"] == counts["positives"]["test"] == 0 < counts["positives"]["train"]


def test_a_file_named_twice_and_a_copy_are_warnings(tmp_path: Path, lines: list[bytes]):
    log = write_raw(tmp_path / "log", lines)
    (tmp_path / "link").symlink_to(log)
    shutil.copy(log, tmp_path / "copy")
    other = write_raw(tmp_path / "other", [lines[-1], *lines[:-1]])
    assert other.stat().st_size == log.stat().st_size
    pipeline = write_pipeline(tmp_path / "run.toml", log)
    raw = [str(tmp_path / name) for name in ("log", "link", "other", "copy")]
    result = invoke("preprocess", pipeline, tmp_path / "runs", f"dataset.raw={json.dumps(raw)}")
    assert result.exit_code == 0
    twice, copy = counts_of(tmp_path / "runs")["warnings"]
    assert f"`{tmp_path}/link` is named twice" in twice
    assert f"`{log}` and `{tmp_path}/copy` hold the same" in copy
    assert f"warning: preprocess: {twice}\n" in result.output


def test_a_lopsided_split_is_a_warning(tmp_path: Path, lines: list[bytes]):
    write_raw(tmp_path / "day_0", lines[:700])
    write_raw(tmp_path / "day_1", lines[700:])
    [warning] = run(tmp_path, tmp_path / "day_*", "preprocess.split=by_day")["warnings"]
    assert "67% of all samples are held out (700 train, 700 val, 700 test)" in warning


def test_runs_below_a_file_cannot_be_written(tmp_path: Path, lines: list[bytes]):
    (tmp_path / "runs").write_text("in the way")
    pipeline = write_pipeline(tmp_path / "run.toml", write_raw(tmp_path / "log", lines))
    result = invoke("preprocess", pipeline, tmp_path / "runs")
    assert result.exit_code == 1
    assert "error: cannot write" in result.output and "--runs" in result.output
    assert (tmp_path / "runs").read_text() == "in the way"


@pytest.fixture
def small_disk(tmp_path: Path):
    """A disk of its own, where mounting is allowed; takes mount options."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount a small disk")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_read_only_disk_cannot_be_written(tmp_path: Path, lines: list[bytes], small_disk):
    pipeline = write_pipeline(tmp_path / "run.toml", write_raw(tmp_path / "log", lines))
    result = invoke("preprocess", pipeline, small_disk("ro") / "runs")
    assert result.exit_code == 1
    assert "error: cannot write" in result.output and "Read-only" in result.output


def test_a_disk_that_is_too_small_is_refused_early(tmp_path: Path, lines: list[bytes], small_disk):
    pipeline = write_pipeline(tmp_path / "run.toml", write_raw(tmp_path / "log", lines))
    result = invoke("preprocess", pipeline, small_disk("size=128k") / "runs")
    assert result.exit_code == 1
    assert "of disk at" in result.output and "hint: free some disk" in result.output


@pytest.mark.parametrize("stage", ["preprocess", "segregate"])
def test_a_disk_that_fills_up_keeps_finished_parts(
    tmp_path: Path, lines: list[bytes], small_disk, monkeypatch, stage: str
):
    from slipstream.io import capacity

    monkeypatch.setattr(capacity, "show_bytes", lambda size: "?")
    monkeypatch.setattr(capacity.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1 << 60}))
    disk = small_disk("size=4m")
    pipeline = write_pipeline(tmp_path / "run.toml", write_raw(tmp_path / "log", lines), segregate="hot_budget='50%'")
    if stage == "segregate":
        assert invoke("preprocess", pipeline, disk / "runs").exit_code == 0
    filler = disk / "filler"
    with filler.open("wb") as stream:
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        stream.write(b"\0" * (free - 200_000))
    result = invoke(stage, pipeline, disk / "runs")
    assert result.exit_code == 1, result.output
    assert "no space left while writing" in result.output and "finished parts are kept" in result.output
    filler.unlink()
    assert invoke(stage, pipeline, disk / "runs").exit_code == 0


def test_enospc_anywhere_is_a_capacity_error(tmp_path: Path, lines: list[bytes], monkeypatch):
    pipeline = write_pipeline(tmp_path / "run.toml", write_raw(tmp_path / "log", lines))
    replace, left = Path.replace, [0]

    def fill_up(self: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(artifacts.Path, "replace", fill_up)
    for allowed in (1, 3, 10, 20):
        left[0] = allowed
        result = invoke("preprocess", pipeline, tmp_path / "runs")
        assert result.exit_code == 1 and "no space left while writing" in result.output
    left[0] = 1000
    assert invoke("preprocess", pipeline, tmp_path / "runs").exit_code == 0


def test_a_second_process_on_an_artifact_is_told_who_holds_it(tmp_path: Path, lines: list[bytes]):
    pipeline = write_pipeline(tmp_path / "run.toml", write_raw(tmp_path / "log", lines))
    run = Run(load_pipeline(pipeline), tmp_path / "runs")
    with hold_artifact(find_place(run.run_dir, run.keys["preprocess"])):
        process = start("preprocess", pipeline, tmp_path / "runs")
        said = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 1 and f"process {os.getpid()}" in said
