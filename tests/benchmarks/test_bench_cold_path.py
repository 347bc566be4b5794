from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from raw_logs import subprocess_environment

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_cold_path.py"


@pytest.mark.slow
def test_benchmark_runs_at_toy_size_and_leaves_nothing(tmp_path: Path):
    command = [sys.executable, str(SCRIPT), "--memory", "1GiB", "--table", "8MiB", "--steps", "20", "--batch", "64"]
    answer = subprocess.run(
        [*command, "--folder", str(tmp_path)], capture_output=True, text=True, env=subprocess_environment()
    )
    assert answer.returncode == 0, answer.stderr
    results = json.loads(answer.stdout.splitlines()[-1])["results"]
    assert {"in memory", "in a file"} <= set(results)
    assert all(one["is_equal"] and one["samples_per_second"] > 0 for one in results.values())
    assert ("in a file, limited" in results) == ("no control group may be made" not in answer.stdout)
    assert not list(tmp_path.iterdir())
