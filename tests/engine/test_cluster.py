"""Stages on workers of a Dask cluster: threads of this process here, and what they are sent goes through a socket."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import LocalCluster
from lost_workers import Killer, die_so_often
from raw_logs import invoke, make_lines, run_files, sample_line, stage_files, write_pipeline, write_raw
from several_ranks import free_port

from slipstream.config import load_pipeline
from slipstream.datasets import parsing, taobao
from slipstream.datasets.taobao import TaobaoSource
from slipstream.engine import cluster as engine_cluster
from slipstream.engine.cluster import connect
from slipstream.engine.options import EngineConfig
from slipstream.errors import ArtifactError, ConfigError, EngineError
from slipstream.io.artifacts import write_atomically
from slipstream.ops.parallel import Threads
from slipstream.pipeline import plan_pipeline, run_pipeline
from slipstream.progress import Silent
from slipstream.stages import preprocess, profile

PREPROCESS = (
    'freq_threshold = 2\nsamples_per_part = 500\nchunk_bytes = "48KiB"\nnum_threads = 2\n'
    'dense_transform = "standard"\nmissing_flags = true\ntarget_features = ["cat_3"]\n'
    "max_reject_ratio = 0.5\n[preprocess.tables.cat_2]\nnum_buckets = 4"
)
SEGREGATE = 'policy = "sample-aware"\nsample_aware_rounds = 2\nhot_budget = "40%"\nsamples_per_shard = 300'
STAGES = ("preprocess", "profile", "segregate")


@pytest.fixture(scope="module")
def workers() -> Iterator[LocalCluster]:
    with start_cluster(num_workers=2) as started:
        yield started


def start_cluster(*, num_workers: int, processes: bool = False) -> LocalCluster:
    return LocalCluster(
        n_workers=num_workers,
        threads_per_worker=1,
        processes=processes,
        protocol="tcp://",
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        memory_limit=0,
        silence_logs=50,
    )


def config_of(cluster: LocalCluster, **keys: Any) -> EngineConfig:
    return EngineConfig(kind="dask", address=cluster.scheduler_address, **keys)


def on(cluster: LocalCluster) -> list[str]:
    return ["engine.kind=dask", f"engine.address={cluster.scheduler_address}", "engine.timeout_seconds=5"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cluster")
    lines = make_lines(2000)
    broken = [*lines[:600], b"no sample", sample_line(dense="x"), *lines[600:1500], b"\xff"]
    write_raw(folder / "log_0.tsv", broken)
    write_raw(folder / "log_1.gz", lines[1500:])
    (folder / "log_2.tsv").write_bytes(b"")
    return write_pipeline(folder / "run.toml", folder / "log_*", preprocess=PREPROCESS, segregate=SEGREGATE)


@pytest.fixture(scope="module")
def local(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What threads of one process make."""
    runs = tmp_path_factory.mktemp("local")
    run_pipeline(load_pipeline(pipeline), runs, stages=STAGES)
    return run_files(runs / "run")


def test_workers_write_what_threads_write(
    pipeline: Path, local: dict[str, bytes], workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(profile, "_PARTS_PER_GROUP", 2)
    config = load_pipeline(pipeline, [*on(workers), "preprocess.chunk_bytes=30000"])
    run_pipeline(config, tmp_path, stages=STAGES)
    assert run_files(tmp_path / "run") == local


def test_workers_gather_the_lines_of_a_user_as_threads_do(workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(taobao, "_USERS_PER_GROUP", 2)
    lines = [f"{at * 7 % 40},{at % 23},{at % 5},pv,{1511544070 + at}" for at in range(600)]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    made = []
    with connect(config_of(workers), tmp_path) as (cluster, _):
        for engine in (Threads(), cluster):
            folder = tmp_path / str(len(made))
            parsed = parsing.parse_files(
                TaobaoSource(seed=0, history_length=3, points_per_user=2),
                files=[str(tmp_path / "log.csv")],
                folder=folder,
                chunk_bytes=4096,
                max_reject_ratio=0.0,
                workers=2,
                progress=Silent(),
                engine=engine,
            )
            assert len(parsed.lines) > 2 and len(parsed.samples) > 2
            made.append(stage_files(folder))
    assert made[0] == made[1]


def test_who_does_the_work_is_in_no_fingerprint(pipeline: Path, tmp_path: Path):
    elsewhere = ["engine.kind=dask", "engine.address=tcp://node-0:8786", "engine.retries=1", "engine.timeout_seconds=1"]
    plans = [plan_pipeline(load_pipeline(pipeline, overrides), tmp_path) for overrides in ([], elsewhere)]
    assert [plan.key for plan in plans[0]] == [plan.key for plan in plans[1]]


def test_the_error_of_a_worker_is_that_of_threads(workers, tmp_path: Path):
    whole = write_raw(tmp_path / "log.gz", make_lines(500))
    whole.write_bytes(whole.read_bytes()[:-100])
    pipeline = write_pipeline(tmp_path / "run.toml", whole)
    said = [invoke("preprocess", pipeline, tmp_path / "runs", *options).output for options in ([], on(workers))]
    assert said[0] == said[1]
    assert f"error: `{whole}` is truncated" in said[0]


# --- who cannot be reached -----------------------------------------------------------------------------------


def test_a_scheduler_that_does_not_answer_is_an_error_soon(tmp_path: Path):
    address = f"tcp://127.0.0.1:{free_port()}"
    config = EngineConfig(kind="dask", address=address, timeout_seconds=0.3)
    with pytest.raises(EngineError, match=rf"no scheduler answers at {address} within 0\.3 s"):
        with connect(config, tmp_path):
            pass


def test_a_scheduler_may_be_named_by_the_file_it_wrote(workers, tmp_path: Path):
    file = tmp_path / "scheduler.json"
    with pytest.raises(EngineError, match="which no scheduler has written"):
        with connect(EngineConfig(kind="dask", address=str(file)), tmp_path):
            pass
    file.write_text(f'{{"address": "{workers.scheduler_address}"}}')
    with connect(EngineConfig(kind="dask", address=str(file)), tmp_path) as (cluster, _):
        assert list(cluster.in_order(add, [1, 2], context=1, workers=1)) == [2, 3]


def test_a_scheduler_without_workers_is_an_error(tmp_path: Path):
    with start_cluster(num_workers=0) as empty:
        with pytest.raises(EngineError, match=r"has no worker, after 0\.2 s") as caught:
            with connect(config_of(empty, timeout_seconds=0.2), tmp_path):
                pass
    assert "dask worker" in str(caught.value.hint)


def test_dask_is_asked_for_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_cluster, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package `distributed`") as caught:
        with connect(EngineConfig(kind="dask", address="tcp://127.0.0.1:1"), tmp_path):
            pass
    assert caught.value.hint == "pip install 'slipstream[dask]'"


@pytest.mark.parametrize(
    ("seen", "said"),
    [(("0.0.1", True), "has slipstream 0.0.1, this is"), (("", False), "does not see what is in")],
)
def test_workers_that_cannot_do_the_work_are_named(
    seen: tuple[str, bool], said: str, workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    version = seen[0] or engine_cluster.__version__
    monkeypatch.setattr(engine_cluster, "_look", lambda probe: (version, seen[1]))
    with pytest.raises(EngineError, match=rf"worker tcp://127\.0\.0\.1:\d+ {said}"):
        with connect(config_of(workers), tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


# --- who is lost ---------------------------------------------------------------------------------------------


def add(context: int, task: int) -> int:
    return context + task


def write_slowly(folder: Path, task: int) -> None:
    with write_atomically(folder / f"part-{task}") as path:
        path.write_text("half")
        time.sleep(0.05)
        path.write_text("whole")


def test_a_scheduler_that_goes_is_an_error_and_leaves_whole_files(tmp_path: Path):
    going = start_cluster(num_workers=2)
    with connect(config_of(going, timeout_seconds=1.0), tmp_path) as (cluster, _):
        results = cluster.in_order(write_slowly, range(400), context=tmp_path, workers=1)
        next(results)
        going.close()
        with pytest.raises(EngineError, match="is gone") as caught:
            list(results)
    assert "what is finished is kept" in str(caught.value.hint)
    assert {path.read_text() for path in tmp_path.glob("part-*")} == {"whole"}


class Caller(Silent):
    """Calls somebody as soon as a task has given its first result."""

    def __init__(self, label: str, call: Callable[[], object]) -> None:
        self._label, self._call = label, call

    @contextmanager
    def task(self, label: str, total: int | None, unit: str, *, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        waiting = [self._call] if label == self._label else []
        yield lambda units, note: waiting.pop()() if units and waiting else None


@pytest.mark.slow
def test_threads_go_on_from_what_workers_made_before_their_scheduler_went(
    pipeline: Path, local: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    going = start_cluster(num_workers=1)
    config = load_pipeline(pipeline, [*on(going), "engine.timeout_seconds=1"])
    with pytest.raises(EngineError, match="is gone"):
        run_pipeline(config, tmp_path, stages=["preprocess"], progress=Caller("encode", going.close))
    monkeypatch.setattr(parsing, "_parse_block", lambda reading, block: pytest.fail("made again"))
    monkeypatch.setattr(preprocess, "build_vocabulary", lambda *counts, **limits: pytest.fail("made again"))
    assert list(tmp_path.glob("run/preprocess/.*.partial/train/part-*.parquet"))
    assert invoke("preprocess", pipeline, tmp_path).exit_code == 0
    made = run_files(tmp_path / "run")
    assert made == {name: body for name, body in local.items() if name.startswith("preprocess/")}


def test_workers_of_a_process_that_let_go_write_nothing(workers, tmp_path: Path):
    claim = tmp_path / "claim"
    claim.touch()
    with connect(config_of(workers), tmp_path) as (cluster, _):
        held = cluster.holding(claim)
        assert list(held.in_order(write_slowly, [0], context=tmp_path, workers=1)) == [None]
        claim.unlink()
        with pytest.raises(ArtifactError, match="part-1` was not written"):
            list(held.in_order(write_slowly, [1], context=tmp_path, workers=1))
    assert [path.name for path in tmp_path.iterdir()] == ["part-0"]


@pytest.mark.slow
def test_a_task_is_given_to_another_worker_as_often_as_allowed(tmp_path: Path):
    never_by_itself = dask.config.set({"distributed.scheduler.allowed-failures": 0})
    with never_by_itself, start_cluster(num_workers=2, processes=True) as dying:
        with connect(config_of(dying, retries=1), tmp_path) as (cluster, _):
            for times in (1, 2):
                (tmp_path / str(times)).mkdir()
            assert list(cluster.in_order(die_so_often, [1], context=tmp_path / "1", workers=1)) == [1]
            with pytest.raises(EngineError, match=r"task `die_so_often` lost 2 workers.*`engine.retries` = 1"):
                list(cluster.in_order(die_so_often, [2], context=tmp_path / "2", workers=1))


@pytest.mark.slow
def test_a_worker_killed_in_every_pass_changes_nothing(pipeline: Path, local: dict[str, bytes], tmp_path: Path):
    with start_cluster(num_workers=2, processes=True) as dying:
        killer = Killer(dying)
        run_pipeline(load_pipeline(pipeline, on(dying)), tmp_path, stages=STAGES, progress=killer)
    assert {"parse", "count", "look back", "encode", "count accesses", "hot-set curve", "write shards"} <= set(
        killer.killed
    )
    assert run_files(tmp_path / "run") == local
