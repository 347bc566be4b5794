"""A killed training goes on from its checkpoint and ends with the parameters of an uninterrupted one."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from raw_logs import subprocess_environment
from safetensors.numpy import load_file, save_file

from slipstream.config import build_pipeline
from slipstream.errors import ArtifactError
from slipstream.pipeline import RunResult, run_pipeline
from slipstream.training import checkpoint

TREE = {
    "name": "resume",
    "dataset": {"source": "synthetic", "num_samples": 4000},
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
    skip = {key: train.pop(key) for key in ("criterion", "scope", "scorer", "movement", "window_steps") if key in train}
    return build_pipeline(sections | {"train": sections["train"] | train, "skip": sections["skip"] | skip})


def model_of(result: RunResult) -> dict[str, np.ndarray]:
    return load_file(result.stages["train"].artifact.path / "model.safetensors")


class Killed(BaseException):
    """Stands in for kill -9: nothing of the program may handle it."""


@pytest.mark.parametrize(
    "settings",
    [
        {"criterion": "stale"},
        pytest.param({"criterion": "stale", "movement": "net"}, marks=pytest.mark.slow),
        pytest.param({"criterion": "stale", "window_steps": 4}, marks=pytest.mark.slow),
        {"criterion": "importance", "scope": "all"},
        pytest.param({"criterion": "importance", "scope": "all", "scorer": "model"}, marks=pytest.mark.slow),
        {"criterion": "random", "order": "mixed"},
        {"mode": "cached", "cache_ratio": 0.6},
        pytest.param({"mode": "resident", "optimizer": "sgd"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_training_interrupted_anywhere_ends_with_the_same_parameters(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_pipeline(pipeline(**settings), tmp_path / "whole")
    run_pipeline(pipeline(**settings), tmp_path / "cut", stages=["preprocess", "segregate"])
    original = checkpoint.Checkpointer._save
    rng = random.Random(str(settings))
    interruptions = 0
    saves_until_cut = 0

    def save_then_die(self: checkpoint.Checkpointer, trainer: object) -> None:
        nonlocal saves_until_cut
        original(self, trainer)
        saves_until_cut -= 1
        if saves_until_cut <= 0:
            raise Killed

    monkeypatch.setattr(checkpoint.Checkpointer, "_save", save_then_die)
    while True:
        saves_until_cut = rng.randint(1, 6)
        try:
            resumed = run_pipeline(pipeline(**settings), tmp_path / "cut")
            break
        except Killed:
            interruptions += 1
    assert interruptions >= 3
    expected, found = model_of(whole), model_of(resumed)
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    for figure in ("steps", "samples_seen", "samples_dropped", "bytes_to_device", "threshold"):
        if figure == "bytes_to_device" and settings.get("mode") != "resident":
            continue  # rows staged when the run was cut are fetched once more
        assert whole.counts("train")[figure] == resumed.counts("train")[figure]
    for split in ("test", "val"):
        assert whole.counts("train")[split] == resumed.counts("train")[split]


def leave_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Interrupt a training right after its first checkpoint."""
    original = checkpoint.Checkpointer._save

    def save_then_die(self: checkpoint.Checkpointer, trainer: object) -> None:
        original(self, trainer)
        raise Killed

    monkeypatch.setattr(checkpoint.Checkpointer, "_save", save_then_die)
    with pytest.raises(Killed):
        run_pipeline(pipeline(), tmp_path)
    (path,) = tmp_path.glob("resume/train/.*.partial/work/checkpoint.safetensors")
    return path


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = leave_checkpoint(tmp_path, monkeypatch)
    tensors, metadata = checkpoint.read_tensors(path)
    save_file(
        {name: tensor.numpy() for name, tensor in tensors.items()}, path, metadata=metadata | {"fingerprint": "other"}
    )

    with pytest.raises(ArtifactError, match="checkpoint of run other"):
        run_pipeline(pipeline(), tmp_path)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = leave_checkpoint(tmp_path, monkeypatch)
    path.write_bytes(path.read_bytes()[:100])

    with pytest.raises(ArtifactError, match="safetensors"):
        run_pipeline(pipeline(), tmp_path)


CHILD = """
import json, sys, time
from pathlib import Path
from slipstream.config import build_pipeline
from slipstream.pipeline import run_pipeline
from slipstream.training.loop import Trainer

step = Trainer._step
def step_slowly(self, *batch):
    step(self, *batch)
    print("step", flush=True)
    time.sleep(0.02)
Trainer._step = step_slowly
run_pipeline(build_pipeline(json.loads(sys.argv[1])), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_training_survives_kill_9_at_twenty_random_moments(tmp_path: Path) -> None:
    tree = TREE | {"dataset": {"source": "synthetic", "num_samples": 8000}}
    tree |= {"skip": {"refresh_steps": 9, "criterion": "stale"}}
    whole = run_pipeline(build_pipeline(tree), tmp_path / "whole")
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
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    resumed = run_pipeline(build_pipeline(tree), tmp_path / "cut")
    expected, found = model_of(whole), model_of(resumed)
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
