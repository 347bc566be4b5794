"""A killed training goes on from its checkpoint and ends with the parameters of an uninterrupted one."""

import errno
import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from raw_logs import subprocess_environment
from trained import HELD, assert_same_model, assert_same_training, run_on_copies

from slipstream.config import build_pipeline
from slipstream.embedding.tiers import frozen, on_disk
from slipstream.errors import CapacityError
from slipstream.pipeline import RunResult, run_pipeline
from slipstream.progress import Silent
from slipstream.training import checkpoint, loop

TREE = {
    "name": "resume",
    "dataset": {"source": "synthetic", "num_samples": 2000},
    "segregate": {"hot_budget": "30%", "samples_per_shard": 500},
    "model": {"embedding_dim": 4, "bottom_mlp": [8, 4], "top_mlp": [8, 1]},
    "train": {
        "batch_size": 64,
        "chunk_batches": 2,
        "checkpoint_steps": 3,
        "log_every": 5,
        "epochs": 2,
        "num_threads": 1,
    },
    "skip": {"refresh_steps": 9},
}


def pipeline(**train: object) -> object:
    sections = {name: dict(value) if isinstance(value, dict) else value for name, value in TREE.items()}
    sections["tables"] = HELD[train.pop("held", "dense")]
    skip = {
        key: train.pop(key)
        for key in ("criterion", "scope", "scorer", "movement", "window_steps", "keep_steps")
        if key in train
    }
    return build_pipeline(sections | {"train": sections["train"] | train, "skip": sections["skip"] | skip})


def clone_by_copying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for a file system that shares blocks."""

    def copy(target: BinaryIO, request: int, source: int) -> None:
        assert request == on_disk._FICLONE
        os.sendfile(target.fileno(), source, 0, os.fstat(source).st_size)

    monkeypatch.setattr(fcntl, "ioctl", copy)


class Killed(BaseException):
    """Stands in for kill -9: nothing of the program may handle it."""


@pytest.mark.parametrize(
    "settings",
    [
        {"held": "int8"},
        {"held": "tt"},
        {"held": "by rank", "average": 0.3},
        {"held": "mixed", "average": 0.3, "validate_steps": 7},
        {"criterion": "stale"},
        pytest.param({"criterion": "stale", "movement": "net"}, marks=pytest.mark.slow),
        pytest.param({"criterion": "stale", "window_steps": 4}, marks=pytest.mark.slow),
        {"criterion": "importance", "scope": "all", "keep_steps": True},
        pytest.param({"criterion": "importance", "scope": "all", "scorer": "model"}, marks=pytest.mark.slow),
        {"criterion": "random", "order": "mixed", "average": 0.6, "positive_weight": 3.0},
        {"held": "int4", "mode": "cached", "cache_ratio": 0.6, "optimizer": "adam"},
        {"cold_path": "by parts", "optimizer": "adam", "average": 0.5, "validate_steps": 9},
        {"cold_path": "cloned", "mode": "cached", "cache_ratio": 0.6, "held": "int4"},
        pytest.param({"cold_path": "cloned", "mode": "baseline", "optimizer": "adagrad"}, marks=pytest.mark.slow),
        {"criterion": "negative", "cold_access": "in_place", "shuffle_on": "device", "average": 0.6},
        pytest.param({"mode": "resident", "optimizer": "sgd"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_training_interrupted_anywhere_ends_with_the_same_parameters(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dict(settings)
    snapshot = settings.pop("cold_path", None)
    whole = run_on_copies(pipeline(checkpoint_steps=0, **settings), tmp_path / "whole")
    if snapshot == "cloned":
        clone_by_copying(monkeypatch)
    original = checkpoint.Checkpointer._save
    rng = random.Random(str(settings))
    interruptions = 0
    saves_until_cut = 0

    def save_then_die(self: checkpoint.Checkpointer, trainer: object) -> None:
        nonlocal saves_until_cut
        original(self, trainer)
        self.wait(trainer)
        saves_until_cut -= 1
        if saves_until_cut <= 0:
            raise Killed

    monkeypatch.setattr(checkpoint.Checkpointer, "_save", save_then_die)
    while True:
        saves_until_cut = rng.randint(1, 8)
        if snapshot is not None:  # a checkpoint of rows in a file goes on in memory, and the other way round
            settings["cold_path"] = str(tmp_path / "cold") if interruptions % 2 == 0 else ""
        try:
            resumed = run_on_copies(pipeline(**settings), tmp_path / "cut")
            break
        except Killed:
            interruptions += 1
    assert interruptions >= 1  # how many fit in depends on how soon what comes next is decided
    assert_same_training(whole, resumed)
    for figure in ("steps", "samples_seen", "samples_dropped", "bytes_to_device", "threshold"):
        if figure == "bytes_to_device" and settings.get("mode") != "resident":
            continue  # rows staged when the run was cut are fetched once more
        assert whole.counts("train")[figure] == resumed.counts("train")[figure]
    for figure in ("validations", "best_step", "stopped_early"):
        assert whole.counts("train")[figure] == resumed.counts("train")[figure]
    for split in ("test", "val"):
        assert whole.counts("train")[split] == resumed.counts("train")[split]


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch, interrupt: Callable[[], None]) -> list[int]:
    """Call something after a step; returns the list that the steps of the first and of later runs go to."""
    steps: list[int] = []
    original = loop.Trainer._train_batch

    def counted(self: loop.Trainer, *batch: object) -> None:
        original(self, *batch)  # type: ignore[arg-type]
        steps.append(self.totals.steps)
        if len(steps) == step:
            interrupt()

    monkeypatch.setattr(loop.Trainer, "_train_batch", counted)
    return steps


def die() -> None:
    raise Killed


def checkpoints_of(runs: Path, suffix: str = ".json") -> list[Path]:
    return sorted(runs.glob(f"resume/train/.*.partial/work/checkpoint-*{suffix}"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run_on_copies(pipeline(), tmp_path_factory.mktemp("whole"))


# --- written while training goes on --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        *({}, {"mode": "cached", "cache_ratio": 0.6}, {"mode": "resident"}, {"mode": "fae", "cold_access": "in_place"}),
        {"cold_path": "by parts"},
        pytest.param({"cold_path": "cloned"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_checkpoint_written_beside_training_is_of_one_moment(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "cold_path" in settings:
        if settings["cold_path"] == "cloned":
            clone_by_copying(monkeypatch)
        settings = {"cold_path": str(tmp_path / "cold")}
    steps = interrupt_at(27, monkeypatch, die)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(frozen, "_BLOCK_BYTES", 1)  # rows are written one by one: many change before it is their turn
        run_on_copies(pipeline(checkpoint_steps=8, **settings), tmp_path / "cut")
    assert checkpoints_of(tmp_path / "cut")
    resumed = run_on_copies(pipeline(checkpoint_steps=0, **settings), tmp_path / "cut")
    assert 1 < steps[27] < 27, "the second run went on from a checkpoint of an earlier step than it was killed at"
    assert_same_model(run_on_copies(pipeline(checkpoint_steps=0, **settings), tmp_path / "whole"), resumed)


def test_the_checkpoint_before_stays_and_older_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(47, monkeypatch, die)
    with pytest.raises(Killed):
        run_on_copies(pipeline(), tmp_path)
    assert len(checkpoints_of(tmp_path)) == len(checkpoints_of(tmp_path, ".safetensors")) == 2


def test_the_rows_that_change_most_are_written_first(left: Path) -> None:
    stored = checkpoints_of(left, ".safetensors")[-1].read_bytes()
    header = json.loads(stored[8 : 8 + int.from_bytes(stored[:8], "little")])
    device, host = (
        [entry["data_offsets"][0] for name, entry in header.items() if name.startswith(tier)]
        for tier in ("device.", "host.")
    )
    assert len(device) == len(host) == 2
    assert max(device) < min(host)


@pytest.mark.parametrize("minutes", [0.0, 1e-9, 1e9])
def test_checkpoints_go_by_the_clock_too(minutes: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(47, monkeypatch, die)
    with pytest.raises(Killed):
        run_on_copies(pipeline(checkpoint_steps=0, checkpoint_minutes=minutes), tmp_path)
    assert len(checkpoints_of(tmp_path)) == (2 if minutes == 1e-9 else 0)


def test_a_run_killed_after_its_last_step_trains_no_step_again(
    whole: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = interrupt_at(-1, monkeypatch, die)
    with monkeypatch.context() as patch:
        patch.setattr("slipstream.stages.train._evaluate", lambda *args, **options: die())
        with pytest.raises(Killed):
            run_on_copies(pipeline(checkpoint_steps=0), tmp_path)
    steps.clear()
    assert_same_model(whole, run_on_copies(pipeline(checkpoint_steps=0), tmp_path))
    assert steps == []


def test_a_full_disk_under_a_checkpoint_ends_training_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: frozen.FrozenRows) -> Iterator[np.ndarray]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(frozen.FrozenRows, "blocks", fail)
    with pytest.raises(CapacityError, match=r"checkpoint-\d+\.safetensors`; it takes .* are free"):
        run_on_copies(pipeline(), tmp_path)


# --- asked to stop -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_the_next_run_repeats_no_step(
    number: signal.Signals, whole: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = interrupt_at(21, monkeypatch, lambda: os.kill(os.getpid(), number))
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run_on_copies(pipeline(checkpoint_steps=0), tmp_path)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert 21 <= len(steps) <= 22, "it stops at the end of its chunk"
    resumed = run_on_copies(pipeline(checkpoint_steps=0), tmp_path)
    assert steps == list(range(1, resumed.counts("train")["steps"] + 1))
    assert_same_model(whole, resumed)


def test_a_second_signal_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def insist() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    steps = interrupt_at(21, monkeypatch, insist)
    with pytest.raises(KeyboardInterrupt):
        run_on_copies(pipeline(checkpoint_steps=0), tmp_path)
    assert len(steps) == 21
    assert checkpoints_of(tmp_path) == []


def test_a_signal_where_no_checkpoints_are_kept_just_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(21, monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        run_on_copies(pipeline(checkpoint_steps=0, checkpoint_minutes=0.0), tmp_path)
    assert checkpoints_of(tmp_path) == []


def test_a_resumed_run_shows_at_once_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    steps = interrupt_at(21, monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run_on_copies(pipeline(checkpoint_steps=0), tmp_path)
    stopped_at, told = len(steps), []

    class Watch(Silent):
        def task(self, label: str, total: int | None, unit: str):
            return nullcontext(lambda done, note: told.append((label, done, note, len(steps))))

    with caplog.at_level("INFO", "slipstream"):
        resumed = run_on_copies(pipeline(checkpoint_steps=0), tmp_path, progress=Watch())
    label, done, note, steps_then = next(one for one in told if one[0] == "train")
    assert (label, note, steps_then) == ("train", f"from step {stopped_at}", stopped_at)
    assert stopped_at * 64 * 0.8 < done
    assert f"training goes on after step {stopped_at}" in caplog.text
    trained = resumed.counts("train")
    shown = sum(done for label, done, *_ in told if label == "train")
    assert shown == trained["samples_seen"] + trained["samples_dropped"], "all that was trained or skipped"
    dropped = [re.search(r"loss [0-9.]{6}  [0-9,]+ samples/s  skipped ([0-9]+)%", note) for *_, note, _ in told]
    assert 0 < int([one for one in dropped if one][-1][1]) < 20, "of all so far"


# --- damaged -------------------------------------------------------------------------------------------------


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def belong_to_another_run(file: Path) -> None:
    stored = json.loads(file.with_suffix(".json").read_text())
    stored["body"]["fingerprint"] = "other"
    stored["xxh3"] = checkpoint._digest(stored["body"])
    file.with_suffix(".json").write_text(json.dumps(stored))


def test_a_kill_leaves_whole_clones_alone_and_a_damaged_one_is_put_aside_with_its_checkpoint(
    whole: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clone_by_copying(monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupt_at(47, patch, die)
        run_on_copies(pipeline(cold_path=str(tmp_path / "cold")), tmp_path)
    assert list((tmp_path / "cold").iterdir()) == []
    before, newest = checkpoints_of(tmp_path, ".records")
    assert [path.stem for path in (before, newest)] == [path.stem for path in checkpoints_of(tmp_path)]
    assert sorted(newest.parent.glob(".*")) == []
    flip(newest)
    steps = interrupt_at(-1, monkeypatch, die)
    assert_same_model(whole, run_on_copies(pipeline(), tmp_path))
    assert f"the hash of `{newest.name}` is wrong" in caplog.text
    assert steps[0] == int(before.name[11:23]) + 1


@pytest.mark.parametrize("num_damaged", [1, 2])
@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink, belong_to_another_run])
def test_a_checkpoint_that_cannot_be_used_is_put_aside_and_the_one_before_is_taken(
    damage: Callable[[Path], None],
    suffix: str,
    num_damaged: int,
    whole: RunResult,
    left: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(left, tmp_path, dirs_exist_ok=True)
    names = [path.name for path in checkpoints_of(tmp_path, suffix)]
    for path in checkpoints_of(tmp_path, suffix)[-num_damaged:]:
        damage(path)
    # that training which goes on from a checkpoint ends with the same model is shown above; here once for each way
    # of going on, from the checkpoint before and from the beginning, after some tensors of a bad one were read
    to_the_end = damage is flip and suffix == ".safetensors"
    steps = interrupt_at(-1 if to_the_end else 1, monkeypatch, die)
    put_aside = []
    original = checkpoint.Checkpointer.train

    def look(self: checkpoint.Checkpointer, *args: object) -> None:
        put_aside.extend(path.name.removesuffix(".damaged") for path in checkpoints_of(tmp_path, ".damaged"))
        original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint.Checkpointer, "train", look)
    if to_the_end:
        assert_same_model(whole, run_on_copies(pipeline(), tmp_path))
    else:
        with pytest.raises(Killed):
            run_on_copies(pipeline(), tmp_path)
    if damage is Path.unlink and suffix == ".json":
        assert put_aside == []  # without it the other file counts as cut short
    else:
        hint = [name for name in names[-num_damaged:] if damage is not Path.unlink]
        assert set(put_aside) >= set(hint)
        assert caplog.text.count("cannot be used") == num_damaged
    first = int(names[0][11:23])
    assert steps[0] == (first + 1 if num_damaged == 1 else 1)
    if num_damaged == 2:
        assert ("training starts anew" in caplog.text) == bool(put_aside)


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder whose training was killed when it had two checkpoints."""
    folder = tmp_path_factory.mktemp("left")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        interrupt_at(47, patch, die)
        run_on_copies(pipeline(), folder)
    return folder


CHILD = """
import json, signal, sys, time
from pathlib import Path
from slipstream.config import build_pipeline
from slipstream.pipeline import run_pipeline
from slipstream.training.loop import Trainer

step = Trainer._train_batch
def step_slowly(self, *batch):
    step(self, *batch)
    print("step", flush=True)
    time.sleep(0.02)
Trainer._train_batch = step_slowly
run_pipeline(build_pipeline(json.loads(sys.argv[1])), Path(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("on_disk", [False, True])
def test_training_survives_kill_9_at_twenty_random_moments(on_disk: bool, tmp_path: Path) -> None:
    tree = TREE | {"dataset": {"source": "synthetic", "num_samples": 8000}}
    tree |= {"skip": {"refresh_steps": 9, "criterion": "stale"}}
    whole = run_pipeline(build_pipeline(tree), tmp_path / "whole")
    if on_disk:
        tree |= {"train": TREE["train"] | {"cold_path": str(tmp_path / "disk")}}
    run_pipeline(build_pipeline(tree), tmp_path / "cut", stages=["preprocess", "profile", "segregate"])
    rng = random.Random(0)
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, json.dumps(tree), str(tmp_path / "cut")],
            stdout=subprocess.PIPE,
            env=subprocess_environment() | {"OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        for _ in range(rng.randint(1, 12)):
            process.stdout.readline()
        time.sleep(rng.uniform(0, 0.04))
        assert process.poll() is None, "the training ended before it was killed"
        process.send_signal(rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM]))
        process.wait()
        process.stdout.close()
    assert not on_disk or list((tmp_path / "disk").iterdir()) == []
    resumed = run_pipeline(build_pipeline(tree), tmp_path / "cut")
    assert_same_model(whole, resumed)
