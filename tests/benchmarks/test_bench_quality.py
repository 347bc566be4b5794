from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from raw_logs import subprocess_environment

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_quality.py"


@pytest.mark.slow
def test_benchmark_runs_at_toy_size_and_leaves_nothing(tmp_path: Path):
    options = ["--pipeline", "tiny", "--set", "dataset.source=criteo", "--rows", "4000", "--seeds", "2"]
    command = [sys.executable, str(SCRIPT), *options, "--work", str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True, env=subprocess_environment())
    assert answer.returncode == 0, answer.stderr
    results = json.loads(answer.stdout.splitlines()[-1])["results"]
    assert set(results) == {"slipstream", "mean of all", "lightgbm", "deepctr", "dlrm"}
    assert [len(results[name]) for name in ("slipstream", "mean of all", "dlrm")] == [2, 1, 2]
    assert all(0.5 < run["test"]["auc"] < 1 for runs in results.values() for run in runs)
    assert not list(tmp_path.iterdir())
