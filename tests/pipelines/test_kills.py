"""A whole run, stopped a hundred times by all that stops a process, and the bytes of one that nobody disturbed.

`SLIPSTREAM_KILLS` sets another number; with `-s` each kill is told.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from raw_logs import run_files, subprocess_environment

PIPELINE = """
name = "run"
[dataset]
source = "synthetic"
num_samples = 30000
[preprocess]
freq_threshold = 2
samples_per_part = 1000
chunk_bytes = "64KiB"
num_threads = 2
[segregate]
policy = "sample-aware"
sample_aware_rounds = 3
hot_budget = "20%"
samples_per_shard = 500
[model]
embedding_dim = 8
bottom_mlp = [16, 8]
top_mlp = [16, 1]
[train]
batch_size = 64
checkpoint_steps = 20
[skip]
criterion = "stale"
target_drop = 0.3
"""
STAGES = ("generate", "preprocess", "profile", "segregate", "train")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
NUM_KILLS = int(os.environ.get("SLIPSTREAM_KILLS", "100"))
SECONDS_TO_LEAVE = 60
"""A process that was asked to stop must be gone after this; it takes a second or two."""


def start_run(pipeline: Path, runs: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "slipstream", "run", str(pipeline), "--runs", str(runs), "--quiet"],
        env=subprocess_environment() | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(pipeline: Path, runs: Path) -> None:
    process = start_run(pipeline, runs)
    said, _ = process.communicate()
    assert process.returncode == 0, said.decode()


def results(runs: Path) -> dict[str, bytes]:
    """Every file of a run that does not tell how long something took."""
    timed = ("manifest.json", "metrics.json", "events.out")
    files = run_files(runs / "run")
    return {
        name: body
        for name, body in files.items()
        if not (name.startswith("train/") and Path(name).name.startswith(timed))
    }


def stage_at_work(runs: Path) -> str | None:
    return next((stage for stage in STAGES if any((runs / "run" / stage).glob(".*.partial"))), None)


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_a_hundred_kills_over_all_stages_change_nothing(tmp_path: Path):
    pipeline = tmp_path / "run.toml"
    pipeline.write_text(PIPELINE)
    finish(pipeline, tmp_path / "whole")
    expected = results(tmp_path / "whole")
    assert {name.split("/")[0] for name in expected} >= set(STAGES)
    seconds = {
        stage: json.loads(next((tmp_path / "whole/run" / stage).glob("*/manifest.json")).read_text())["seconds"]
        for stage in STAGES
    }
    drawn = random.Random(20_261_124)
    hits: Counter[str] = Counter()
    signals: Counter[str] = Counter()
    runs = tmp_path / "runs"
    for attempt in range(3 * NUM_KILLS):
        if hits.total() >= NUM_KILLS:
            break
        wanted = STAGES[attempt % len(STAGES)]
        process = start_run(pipeline, runs)
        while process.poll() is None and stage_at_work(runs) != wanted:
            time.sleep(0.01)
        time.sleep(drawn.uniform(0, seconds[wanted]))
        how = drawn.choice(SIGNALS)
        process.send_signal(how)
        said, _ = process.communicate(timeout=SECONDS_TO_LEAVE)  # closes its pipe, too
        if process.returncode == 0:  # it came to its end before
            assert results(runs) == expected
            shutil.rmtree(runs)
            continue
        hits[wanted] += 1
        signals[how.name] += 1
        assert b"Traceback" not in said, said.decode()
        print(f"{hits.total()} of {NUM_KILLS}: {wanted}, by {how.name}", flush=True)  # noqa: T201 - asked for with -s
    finish(pipeline, runs)
    assert results(runs) == expected
    print(f"killed {hits.total()} times: {dict(hits)}, {dict(signals)}")  # noqa: T201 - asked for with -s
    assert hits.total() == NUM_KILLS
    assert min(hits[stage] for stage in STAGES) >= NUM_KILLS // 20
    assert signals.keys() == {one.name for one in SIGNALS}
