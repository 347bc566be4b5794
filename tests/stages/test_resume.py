"""A killed stage goes on where it stopped and ends with the bytes of a run that nobody killed."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from raw_logs import invoke, make_lines, run_files, sample_line, start, write_pipeline, write_raw

from slipstream.io import artifacts, shards
from slipstream.stages import preprocess

NUM_LINES = 3000
_CONFIG = {
    "preprocess": 'freq_threshold = 2\nsamples_per_part = 250\nchunk_bytes = "24KiB"\nnum_threads = 2',
    "segregate": 'policy = "sample-aware"\nsample_aware_rounds = 3\nhot_budget = "40%"\nsamples_per_shard = 90',
}


class _Killed(BaseException):
    """Stands for SIGKILL: nothing in the package catches it."""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    lines = make_lines(NUM_LINES)
    broken = [*lines[:1500], b"no sample", sample_line(dense="x"), *lines[1500:], b"\xff"]
    return write_pipeline(folder / "run.toml", write_raw(folder / "log.gz", broken), **_CONFIG)


@pytest.fixture(scope="module")
def finished(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Copies of a runs folder after each stage, undisturbed."""
    folder = tmp_path_factory.mktemp("finished")
    copies = {}
    for stage in ("preprocess", "profile", "segregate"):
        assert invoke(stage, pipeline, folder / "runs").exit_code == 0
        copies[stage] = Path(shutil.copytree(folder / "runs", folder / stage))
    return copies


def start_from(finished: dict[str, Path], stage: str, runs: Path) -> None:
    """Give a stage what the stages before it leave."""
    if stage == "segregate":
        shutil.copytree(finished["profile"], runs)


def resume(pipeline: Path, runs: Path, stage: str, attempt: int) -> None:
    """Run a stage again to its end, with another chunk size and number of threads each time."""
    chunk_bytes, num_threads = ((24576, 2), (250_000, 1), (9000, 2))[attempt % 3]
    overrides = (f"preprocess.chunk_bytes={chunk_bytes}", f"preprocess.num_threads={num_threads}")
    result = invoke(stage, pipeline, runs, *overrides)
    assert result.exit_code == 0, result.output


def ends(stage: str, pipeline: Path, runs: Path, *overrides: str) -> bool:
    """Run a stage that may be stopped by `_Killed`; returns whether it came to its end."""
    try:
        result = invoke(stage, pipeline, runs, *overrides)
    except _Killed:
        return False
    assert result.exit_code == 0, result.output
    return True


def works(stage: str, runs: Path) -> bool:
    return any((runs / "run" / stage).glob(".*.partial"))


def kill_at(seconds: float, stage: str, pipeline: Path, runs: Path) -> bool:
    """Start a stage and kill -9 it; returns whether it was still at work."""
    process = start(stage, pipeline, runs)
    # the moment counts from when the stage begins, which is after the imports
    while process.poll() is None and not works(stage, runs):
        time.sleep(0.002)
    time.sleep(seconds)
    process.kill()
    process.communicate()
    return process.returncode != 0


def kill_and_resume(
    moments: Sequence[float], stage: str, pipeline: Path, finished: dict[str, Path], folder: Path
) -> int:
    """Kill a stage so many seconds after it began and let another run end it, once for each moment.

    Returns:
        How often it was still at work.
    """
    expected = run_files(finished[stage] / "run")
    hits = 0
    for attempt, seconds in enumerate(moments):
        runs = folder / f"kill-{attempt}"
        start_from(finished, stage, runs)
        hits += kill_at(seconds, stage, pipeline, runs)
        resume(pipeline, runs, stage, attempt)
        assert run_files(runs / "run") == expected
        shutil.rmtree(runs)
    return hits


def seconds_of(stage: str, pipeline: Path, finished: dict[str, Path], folder: Path) -> float:
    """How long a stage works in a process of its own, its imports left out."""
    started = time.perf_counter()
    start_from(finished, stage, folder / "whole")
    process = start(stage, pipeline, folder / "whole")
    while process.poll() is None and not works(stage, folder / "whole"):
        started = time.perf_counter()
    process.communicate()
    return time.perf_counter() - started


@pytest.mark.parametrize(("stage", "moments"), [("preprocess", [0.05]), ("segregate", [0.0])])
def test_a_killed_stage_ends_with_the_same_bytes(
    stage: str, moments: list[float], pipeline: Path, finished: dict[str, Path], tmp_path: Path
):
    assert kill_and_resume(moments, stage, pipeline, finished, tmp_path) >= 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", ["preprocess", "segregate"])
def test_twenty_kills(stage: str, pipeline: Path, finished: dict[str, Path], tmp_path: Path):
    duration, rng = seconds_of(stage, pipeline, finished, tmp_path), random.Random(2)
    moments = [rng.uniform(0, duration) for _ in range(20)]
    assert kill_and_resume(moments, stage, pipeline, finished, tmp_path) >= 5


@pytest.mark.parametrize("stage", ["preprocess", "segregate"])
def test_stopping_before_any_of_its_renames_changes_nothing(
    stage: str, pipeline: Path, finished: dict[str, Path], tmp_path: Path, monkeypatch
):
    """Every file gets its name by a rename: stop before the first, the second, … of them, in one chain of runs."""
    expected = run_files(finished[stage] / "run")
    start_from(finished, stage, tmp_path / "runs")
    left = [0]

    def stop_at_zero(rename):
        def renamed(self: Path, target: Path) -> Path:
            left[0] -= 1
            if left[0] < 0:
                raise _Killed
            return rename(self, target)

        return renamed

    monkeypatch.setattr(artifacts.Path, "replace", stop_at_zero(Path.replace))
    monkeypatch.setattr(artifacts.Path, "rename", stop_at_zero(Path.rename))
    runs = 0
    while True:
        left[0] = 1 + 9 * (runs % 4)
        if ends(stage, pipeline, tmp_path / "runs"):
            break
        runs += 1
        assert runs < 400
    assert runs > 5
    assert run_files(tmp_path / "runs" / "run") == expected


def test_a_kill_between_manifest_and_publishing_leaves_nothing_to_compute(
    pipeline: Path, finished: dict[str, Path], tmp_path: Path, monkeypatch
):
    def killed(*args: object) -> None:
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "complete_publishing", killed)
        assert not ends("preprocess", pipeline, tmp_path / "runs")
    monkeypatch.setattr(preprocess, "run", killed)
    assert invoke("preprocess", pipeline, tmp_path / "runs").exit_code == 0
    assert run_files(tmp_path / "runs" / "run") == run_files(finished["preprocess"] / "run")


def test_finished_parts_are_not_made_again(pipeline: Path, finished: dict[str, Path], tmp_path: Path, monkeypatch):
    written: list[str] = []
    write_parquet, write_shard = preprocess.write_parquet, shards.write_shard

    def stop_after_ten(write):
        def counted(first: object, second: object) -> None:
            if len(written) == 10:
                raise _Killed
            written.append(str(first if isinstance(first, Path) else second))
            write(first, second)

        return counted

    start_from(finished, "segregate", tmp_path / "segregate")
    for stage, module, name, write in (
        ("preprocess", preprocess, "write_parquet", write_parquet),
        ("segregate", shards, "write_shard", write_shard),
    ):
        made: list[str] = []
        while True:
            written.clear()
            monkeypatch.setattr(module, name, stop_after_ten(write))
            came_to_end = ends(stage, pipeline, tmp_path / stage, "preprocess.num_threads=1")
            made += [path for path in written if "rejects" not in path]
            if came_to_end:
                break
        assert len(made) == len(set(made)) > 20


def test_clean_removes_what_a_kill_left(pipeline: Path, tmp_path: Path):
    kill_at(0.1, "preprocess", pipeline, tmp_path / "runs")
    from typer.testing import CliRunner

    from slipstream.cli import app

    result = CliRunner().invoke(app, ["clean", str(pipeline), "--runs", str(tmp_path / "runs")])
    assert result.exit_code == 0
    left = {path.name for path in (tmp_path / "runs" / "run").rglob("*") if path.is_file()}
    assert all(name.endswith(".lock") for name in left)
