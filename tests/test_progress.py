from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Shape:
    """When each result of a task comes: a start-up, then results in a steady pace but for what is said here."""

    num_results: int
    units: int = 10
    """In each result."""
    workers: int = 1
    """They begin together."""
    apart: float = 0.0
    """Share of the seconds of one result over which the first results of all workers come."""
    starting: float = 0.0
    """Seconds before the first worker begins, as a share of those of all work."""
    jitter: tuple[float, ...] = (1.0,)
    """Factors of the seconds of one result after the other, again and again."""
    trend: float = 1.0
    """How much slower the last result is than the first."""

    def arrivals(self) -> np.ndarray:
        """Seconds at which results come."""
        at = np.arange(self.num_results)
        seconds = np.resize(self.jitter, self.num_results) * np.linspace(1, self.trend, self.num_results)
        finished = np.array([seconds[index % self.workers : index + 1 : self.workers].sum() for index in at])
        finished += self.apart * (at % self.workers) / self.workers
        return self.starting * finished.max() + np.sort(finished)


SHAPES = st.builds(
    Shape,
    num_results=st.integers(3, 150),
    units=st.integers(1, 1000),
    workers=st.integers(1, 8),
    apart=st.floats(0, 1),
    starting=st.one_of(st.just(0.0), st.floats(0, 3)),
    jitter=st.lists(st.floats(0.9, 1.1), min_size=1, max_size=20).map(tuple),
    trend=st.floats(0.8, 1.25),
)


def time_left(shape: Shape, *, before: int = 0, asked: int = 3) -> Iterator[tuple[float, float | None, float]]:
    """(share done, time left as told, as it is) just after every result and some times before the next one."""
    arrivals = shape.arrivals()
    now = [7.0]
    pace = Pace(before + shape.units * shape.num_results, done=before, clock=lambda: now[0])
    assert pace.seconds_left() is None, "what an earlier run did says nothing"
    for index, (arrival, following) in enumerate(zip(arrivals, [*arrivals[1:], arrivals[-1]], strict=True), start=1):
        now[0] = 7 + arrival
        pace.advance(shape.units)
        share = pace.share
        assert share == pytest.approx((before + shape.units * index) / (before + shape.units * len(arrivals)))
        for moment in np.linspace(arrival, following, asked, endpoint=False):
            now[0] = 7 + moment
            yield index / len(arrivals), pace.seconds_left(), arrivals[-1] - moment


@given(SHAPES, st.integers(0, 500))
def test_after_a_tenth_the_time_left_is_off_by_less_than_a_third_or_not_told(shape: Shape, before: int):
    whole = shape.arrivals()[-1]
    for share, told, left in time_left(shape, before=before):
        if share >= 0.1 and told is not None:
            assert abs(told - left) < whole / 3


@pytest.mark.parametrize(
    "shape",
    [
        Shape(num_results=100),
        Shape(num_results=1000, starting=0.04),
        Shape(num_results=100, jitter=(0.7, 1.3, 1.0)),
        Shape(num_results=200, workers=4),
        Shape(num_results=200, workers=3, apart=0.5, starting=0.02),
        Shape(num_results=100, trend=1.2),
    ],
    ids=["steady", "after a start-up", "uneven", "by four workers", "by three, one after the other", "getting slower"],
)
def test_the_time_left_of_most_tasks_is_told_from_a_tenth_on(shape: Shape):
    for share, told, left in time_left(shape):
        if share > 0.1:
            assert told is not None and abs(told - left) <= left / 3 + 1.5, share


def test_a_short_task_with_a_long_start_tells_no_time_rather_than_a_wrong_one():
    told = [told for _, told, _ in time_left(Shape(num_results=20, starting=2.0))]
    assert told == [None] * len(told)


def test_a_result_that_is_late_makes_the_time_left_longer():
    now = [0.0]
    pace = Pace(100, clock=lambda: now[0])
    for _ in range(20):
        now[0] += 1
        pace.advance(1)
    assert pace.seconds_left() == pytest.approx(80)
    now[0] += 0.5
    assert pace.seconds_left() == pytest.approx(79.5)
    now[0] += 9.5  # half as much again for all that is there: so it goes on
    assert pace.seconds_left() == pytest.approx(79 * 30 / 21, rel=0.01)


def test_a_task_without_end_tells_no_time():
    pace = Pace(None)
    pace.advance(5)
    assert pace.share is None and pace.seconds_left() is None


# --- without a terminal --------------------------------------------------------------------------------------


def test_without_a_terminal_a_plain_line_comes_now_and_then(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(terminal, "_PLAIN_SECONDS", 0.01)
    now = [0]
    monkeypatch.setattr(terminal, "Pace", lambda total, done: Pace(total, done=done, clock=lambda: now[0]))
    said = io.StringIO()
    with terminal.RichProgress(Console(file=said)).task("parse", 200, "B", done=20) as advance:
        for now[0] in (1, 2, 3):
            advance(10, "1,000 [lines]")
        while said.getvalue().count("left") < 2:
            time.sleep(0.005)
    *earlier, line, _ = said.getvalue().splitlines()
    assert line == "parse, 25%, 1,000 [lines], 0:00:15 left"
    assert all(line.startswith("parse, ") for line in earlier)


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
