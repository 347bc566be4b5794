from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from raw_logs import as_frame, make_lines, write_pipeline, write_raw
from rich.console import Console

from slipstream.config import load_pipeline
from slipstream.datasets.criteo import CriteoSource
from slipstream.datasets.parsing import parse_files
from slipstream.io import raw as raw_files
from slipstream.ops.parallel import Threads
from slipstream.pipeline import plan_pipeline
from slipstream.progress import Pace
from slipstream.report import terminal


class Recorder:
    """Keeps what it was told of each task."""

    def __init__(self) -> None:
        self.tasks: dict[str, tuple[int | None, int, list[int]]] = {}

    @contextmanager
    def task(self, label: str, total: int | None, unit: str, *, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        steps: list[int] = []
        self.tasks[label] = (total, done, steps)
        yield lambda units, note: steps.append(units)


# --- how long it will take -----------------------------------------------------------------------------------


@given(
    st.lists(st.floats(0.85, 1.15), min_size=40, max_size=80),
    st.integers(0, 500),
    st.floats(0.01, 100),
)
def test_after_a_tenth_the_time_left_is_off_by_less_than_a_third(paces: list[float], before: int, seconds: float):
    durations = np.array(paces) * seconds
    now = [7.0]
    pace = Pace(before + 10 * len(paces), done=before, clock=lambda: now[0])
    assert pace.seconds_left() is None, "what an earlier run did says nothing"
    for index, duration in enumerate(durations, start=1):
        now[0] += duration
        pace.advance(10)
        assert pace.share == pytest.approx((before + 10 * index) / (before + 10 * len(paces)))
        if 10 * index >= len(paces):
            left = pace.seconds_left()
            assert left is not None
            whole = durations.sum()
            assert abs((now[0] - 7) + left - whole) < whole / 3


@given(st.integers(1, 4), st.integers(60, 200), st.floats(0, 0.9))
def test_workers_that_begin_together_do_not_mislead(workers: int, num_tasks: int, apart: float):
    # each worker takes a second a task; their results come together, or one after the other within that second
    arrivals = [1 + index // workers + apart * (index % workers) / workers for index in range(num_tasks)]
    now = [0.0]
    pace = Pace(num_tasks, clock=lambda: now[0])
    for index, arrival in enumerate(arrivals, start=1):
        now[0] = arrival
        pace.advance(1)
        if 10 * index >= num_tasks and index > workers:
            assert abs(arrival + (pace.seconds_left() or 0) - arrivals[-1]) < arrivals[-1] / 3


def test_a_task_without_end_tells_no_time():
    pace = Pace(None)
    pace.advance(5)
    assert pace.share is None and pace.seconds_left() is None


# --- without a terminal --------------------------------------------------------------------------------------


def test_without_a_terminal_a_plain_line_comes_now_and_then(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(terminal, "_PLAIN_SECONDS", 0.01)
    said = io.StringIO()
    with terminal.RichProgress(Console(file=said)).task("parse", 200, "B", done=20) as advance:
        advance(30, "1,000 [lines]")
        while said.getvalue().count("\n") < 2:
            time.sleep(0.005)
    for line in said.getvalue().splitlines():
        assert re.fullmatch(r"parse, 25%, 1,000 \[lines\], [0-9:]+ left", line)


def test_a_short_task_says_nothing_without_a_terminal():
    said = io.StringIO()
    with terminal.RichProgress(Console(file=said)).task("parse", 200, "B") as advance:
        advance(200, "all")
    assert said.getvalue() == ""


# --- what stages tell ----------------------------------------------------------------------------------------


def write_as(path: Path, lines: Sequence[bytes]) -> Path:
    if path.suffix == ".parquet":
        as_frame(lines).write_parquet(path, row_group_size=500)
        return path
    return write_raw(path, lines)


@pytest.mark.parametrize("name", ["log", "log.gz", "log.zst", "log.parquet"])
def test_parsing_moves_by_bytes_and_goes_on_where_it_stopped(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(raw_files, "_STORED_AT_ONCE", 4096)
    raw = write_as(tmp_path / name, make_lines(2100))
    size = raw.stat().st_size
    assert _parse(raw, tmp_path) == (size, 0, size)
    for left in (tmp_path / "parsed/00000.json", *sorted(tmp_path.glob("parsed/00000-*.json"))[2:]):
        left.unlink()
    total, done, rest = _parse(raw, tmp_path)
    assert total == size and 0 < done < size and done + rest == size
    assert _parse(raw, tmp_path) == (size, size, 0)


def _parse(raw: Path, folder: Path) -> tuple[int | None, int, int]:
    progress = Recorder()
    parse_files(
        CriteoSource(),
        files=[str(raw)],
        folder=folder,
        chunk_bytes=50_000,
        max_reject_ratio=0.0,
        workers=1,
        progress=progress,
        engine=Threads(),
    )
    total, done, steps = progress.tasks["parse"]
    assert min(steps, default=0) >= 0 and max(steps, default=0) < raw.stat().st_size, "not in one jump"
    return total, done, sum(steps)


def test_hashing_raw_files_is_told(tmp_path: Path):
    raw = write_raw(tmp_path / "log", make_lines(2100))
    progress = Recorder()
    plan_pipeline(load_pipeline(write_pipeline(tmp_path / "run.toml", raw)), tmp_path / "runs", progress)
    total, _, steps = progress.tasks["hash raw files"]
    assert total == sum(steps) == raw.stat().st_size
